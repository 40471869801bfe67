"""The benchmarks' load client and publisher do and count what they say: figures that others rest on."""

from __future__ import annotations

import asyncio
import json
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
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either form of the load programs."""
    if request.param == "Python":
        folder = Path(streams.__file__).parent
        monkeypatch.setattr(streams, "command_of", lambda name: [sys.executable, "-S", str(folder / f"{name}.py")])
    elif len(command_of("sseload")) > 1:
        pytest.skip("without a C compiler the benchmarks use the Python programs, which are tested beside this")


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


async def test_every_event_counts_once_however_the_bytes_are_cut(programs: None) -> None:
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
        streams.Readers(port, paths, len(paths), warmup=0.1, seconds=5.0, grace=0.1) as readers,
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
    assert seen["p50_us"] < 30_000_000 < seen["p999_us"]


async def test_a_subscriber_gets_what_the_publisher_counts(programs: None, tmp_path: Path) -> None:
    redis = Redis(tmp_path / "redis")
    redis.start()
    names = [f"channel-{number}" for number in range(7)]
    targets = [f"*3\r\n$7\r\nPUBLISH\r\n${len(name)}\r\n{name}\r\n$@event#@\r\n@event@\r\n" for name in names]
    spec = streams.Spec(redis.port, rate=40, tick=0.001, connections=1, answer=":", size=30, targets=targets)
    try:
        async with (
            streams.Publisher(spec) as publisher,
            streams.Readers(
                redis.port, [f"SUBSCRIBE {' '.join(names)}"], 1, warmup=0.3, seconds=1.0, grace=3.0
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


async def test_the_publisher_numbers_and_measures_its_events_and_keeps_a_targets_order(programs: None) -> None:
    seqs: dict[bytes, list[int]] = {}
    places: dict[bytes, set[int]] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            target, seq_size, seq, size, event = line.rstrip(b"\n").split(b" ", 4)
            assert (int(seq_size), int(size)) == (len(seq), len(event))
            read = json.loads(event)
            assert read | {"t": 0, "at": 0} == {"seq": int(seq), "type": "content", "at": 0, "t": 0, "text": "xxxxx"}
            assert b'"t":%d,' % read["t"] in event
            seqs.setdefault(target, []).append(int(seq))
            places.setdefault(target, set()).add(id(writer))
            writer.write(b"do")
            if seq == b"1":
                # A piece of an answer is none.
                await eventually(lambda: all_read(writer))
            writer.write(b"ne\n")
        writer.close()

    async with listening(serve) as port:
        targets = [f"a%d@{number} @seq#@ @seq@ @event#@ @event@\n" for number in range(3)]
        spec = streams.Spec(port, rate=40, tick=0.001, connections=2, answer="done", size=5, targets=targets)
        async with streams.Publisher(spec) as publisher:
            begin = time.monotonic_ns()
            publisher.go()
            await eventually(lambda: len(seqs.get(b"a%d@2", ())) >= 10)
            sent = await publisher.stop(begin, time.monotonic_ns())
    assert sent["published"] == sent["sent"] == sent["answered"] == sum(map(len, seqs.values()))
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in seqs.values())
    # The first and the third share the first connection.
    first, second, third = (places[b"a%%d@%d" % number] for number in range(3))
    assert first == third != second
    assert len(first) == len(second) == 1
