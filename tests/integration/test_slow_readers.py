"""A thousand readers that never read, at a server in a process of its own: its memory stays flat and nobody waits."""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import termios
from pathlib import Path

import orjson
import redis.asyncio

from headwater import streams
from headwater.events import content, done
from headwater.runs import Run
from headwater.streams import keys
from support.reader import Reader, ask
from support.stack import StackMaker
from support.wait import eventually

READERS = 1_000
#: 20 MB of text in events of 40 kB.
EVENTS, SIZE = 500, 40_000
#: Bytes the server may grow meanwhile: what a hub keeps for a reader and two frames on their way to its socket, of the
#: 20 MB that each does not read. How near it comes depends on which readers a busy machine serves first.
GROWTH = READERS * (262_144 + 2 * SIZE)


async def test_readers_that_never_read_cost_a_server_no_memory(make_stack: StackMaker) -> None:
    stack = await make_stack(workers=0, settings={"HEADWATER_MAX_STREAMS": str(READERS + 10)})
    log = streams.connect(stack.redis_url)
    deaf: list[socket.socket] = []
    async with stack.client() as http:
        accepted = await ask(http, "Much")
        run_id = accepted["task_id"]
        try:
            lease = await log.claim(await _run(stack.redis_url, run_id), "test")
            await log.append(lease, [content("x").stamped(1, 1)])
            deaf += [_deaf(stack.server.port, f"/api/stream/{run_id}") for _ in range(READERS)]
            # Each has the first event: all are past their first read of the log.
            await eventually(lambda: all(_waiting(one) > 300 for one in deaf), 90, every=0.2)
            healthy = asyncio.create_task(Reader(stack.base_url, run_id).read(240))
            before = await asyncio.to_thread(_memory, stack.server.pid)
            most = before
            for seq in range(2, EVENTS + 2):
                await log.append(lease, [content("x" * SIZE).stamped(seq, 1)])
                most = max(most, await asyncio.to_thread(_memory, stack.server.pid))
            await log.append(lease, [done().stamped(EVENTS + 2, 1)])
            reader = await healthy
            most = max(most, await asyncio.to_thread(_memory, stack.server.pid))
            print(f"\nserver: {before / 1e6:.0f} MB with {READERS} readers, at most {most / 1e6:.0f} MB later")
            assert (len(reader.text), reader.end) == (EVENTS * SIZE + 1, "done")
            assert most - before < GROWTH
            # It still takes requests.
            assert (await http.get("/healthz")).status_code == 200
        finally:
            for one in deaf:
                one.close()
            await log.close()


async def _run(redis_url: str, run_id: str) -> Run:
    async with redis.asyncio.Redis.from_url(redis_url) as raw:
        return Run.from_json(orjson.loads(await raw.get(keys.run(run_id)) or b""))


def _deaf(port: int, path: str) -> socket.socket:
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", port))
    reader.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    return reader


def _waiting(reader: socket.socket) -> int:
    """Bytes that have come and were not read."""
    count = array.array("i", [0])
    fcntl.ioctl(reader, termios.FIONREAD, count)
    return count[0]


def _memory(pid: int) -> int:
    """Resident bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024
