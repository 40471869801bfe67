"""The benchmarks' load client and publisher count right: figures that others rest on."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from benchmarks.load import streams
from benchmarks.load.programs import command_of

from headwater.dev.services import Redis
from support.wait import eventually

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(params=["compiled", "Python"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either of the two load clients."""
    if request.param == "Python":
        script = Path(streams.__file__).with_name("sseload.py")
        monkeypatch.setattr(streams, "command_of", lambda name: [sys.executable, "-S", str(script)])
    elif len(command_of("sseload")) > 1:
        pytest.skip("without a C compiler the benchmarks use the Python client, which is tested beside this")


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    """A server on loopback; its port."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()


def event(t: int) -> bytes:
    return b'id: 1\r\ndata: {"seq":1,"t":%d,"text":"\\"t\\":5"}\r\n\r\n' % t


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def all_read(writer: asyncio.StreamWriter) -> bool:
    """Whether the other end has read everything, so that what is written next is a read of its own."""
    port = f":{writer.get_extra_info('peername')[1]:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return all(line[4].endswith(":00000000") for line in lines if line[1].endswith(port))


async def test_every_event_counts_once_however_the_bytes_are_cut(client: None) -> None:
    measuring = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        if path == b"/refused":
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
        else:
            writer.write(HEAD + chunk(b": hello\n\n"))
            await measuring.wait()
        if path == b"/whole":
            # Several in one chunk, and two chunks in one write.
            writer.write(chunk(event(time.monotonic_ns()) * 30) + chunk(event(time.monotonic_ns())))
        elif path == b"/cut":
            # Cut within the key, before the number and within it.
            for cut in (1, 2, 3, 4, 8):
                data = chunk(event(time.monotonic_ns()))
                at = data.index(b'"t":') + cut
                writer.write(data[:at])
                await eventually(lambda: all_read(writer))
                writer.write(data[at:])
        elif path == b"/old":
            # Published before the window and late: it arrives, but is none of what the window had to deliver.
            writer.write(chunk(event(time.monotonic_ns() - 60_000_000_000)))
        elif path == b"/ends":
            writer.write(chunk(event(time.monotonic_ns())) + b"0\r\n\r\n")
            writer.close()
        await reader.read()
        writer.close()

    paths = ["/whole", "/cut", "/old", "/ends", "/refused"]
    async with (
        listening(serve) as port,
        streams.Readers(port, paths, len(paths), warmup=0.1, seconds=2.0, grace=0.1) as readers,
    ):
        assert await readers.said("open") == "open 4"
        await readers.said("measure")
        measuring.set()
        await readers.said("measured")
        seen = await readers.result()
    assert {name: seen[name] for name in ("open", "refused", "ended")} == {"open": 3, "refused": 1, "ended": 1}
    assert seen["events"] == 31 + 5 + 1 + 1
    assert seen["delivered"] == 31 + 5 + 1
    # One of 38 is a minute old.
    assert seen["p50_us"] < 2_000_000 < seen["p999_us"]


async def test_a_subscriber_gets_what_the_publisher_counts(client: None, tmp_path: Path) -> None:
    redis = Redis(tmp_path / "redis")
    redis.start()
    names = [f"channel-{number}" for number in range(7)]
    spec = {
        "port": redis.port,
        "rate": 40,
        "tick": 0.001,
        "connections": 1,
        "answer": ":",
        "size": 30,
        "targets": [f"*3\r\n$7\r\nPUBLISH\r\n${len(name)}\r\n{name}\r\n$@event#@\r\n@event@\r\n" for name in names],
    }
    try:
        async with (
            streams.Publisher(spec) as publisher,
            streams.Readers(
                redis.port, [f"SUBSCRIBE {' '.join(names)}"], 1, warmup=0.3, seconds=1.0, grace=1.0
            ) as readers,
        ):
            await readers.said("open")
            publisher.go()
            seen = await readers.result()
            sent = await publisher.stop(seen["from_ns"], seen["to_ns"])
    finally:
        redis.stop()
    assert sent["answered"] == sent["sent"] > sent["published"] > 0
    assert seen["delivered"] == sent["published"]
