"""A stream's bytes on a real socket are the same, whether they went straight to it or by the server's `send`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from headwater.events import content, done
from headwater.runs import Lease
from headwater.transports import sse
from headwater.transports.direct import direct
from support.api import Api, serving, settings_for
from support.wait import eventually


@pytest.fixture
async def api(tmp_path: Path, redis_url: str, database_url: str) -> AsyncIterator[Api]:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as running:
        yield running


class Wire:
    """A connection of its own; what comes on it, byte for byte."""

    def __init__(self, api: Api, path: str) -> None:
        self._api = api
        self._path = path
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self.bytes = b""

    async def open(self, headers: bytes = b"") -> Wire:
        port = int(self._api.base_url.rpartition(":")[2])
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        self._writer.write(f"GET {self._path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode())
        self.say(headers + b"\r\n")
        return self

    def say(self, more: bytes) -> None:
        self._writer.write(more)

    def leave(self) -> None:
        self._writer.close()

    async def until(self, part: bytes) -> None:
        async with asyncio.timeout(60):
            while part not in self.bytes:
                got = await self._reader.read(65_536)
                assert got
                self.bytes += got

    async def rest(self) -> bytes:
        """All chunks behind the first, which is the reader's own."""
        await self.until(b"0\r\n\r\n")
        self._writer.close()
        body = self.bytes.partition(b"\r\n\r\n")[2]
        return re.sub(rb"\A[0-9a-f]+\r\nretry: \d+\n\n\r\n", b"", body)


async def test_no_task_waits_for_a_reader_to_leave_and_its_leaving_is_heard_behind_a_body(
    api: Api,
) -> None:
    run_id, _ = await _begin(api)
    wire = await Wire(api, f"/api/stream/{run_id}").open(b"Content-Length: 500000\r\n")
    await wire.until(b"first of")
    # More than uvicorn reads ahead for who asks.
    wire.say(b"x" * 400_000)
    waiting = [task.get_coro() for task in asyncio.all_tasks()]
    assert [one for one in waiting if "_Watcher" in getattr(one, "__qualname__", "")] == []
    assert api.graph.streams.open_now
    wire.leave()
    await eventually(lambda: not api.graph.streams.open_now)


async def test_a_connection_on_which_a_stream_ended_serves_the_next_request(api: Api) -> None:
    run_id, lease = await _begin(api)
    wire = await Wire(api, f"/api/stream/{run_id}").open()
    await wire.until(b"first of")
    await api.say(lease, 2, done())
    await wire.until(b"\r\n0\r\n\r\n")
    wire.bytes = b""
    wire.say(b"GET /api/stream/no-such HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: the-second\r\n\r\n")
    await wire.until(b"the-second")
    assert wire.bytes.startswith(b"HTTP/1.1 422 ")
    wire.leave()


@pytest.mark.parametrize("several", [False, True])
async def test_the_bytes_are_the_same_straight_and_by_send(
    api: Api, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    pushed: list[Any] = []

    def spy(*arguments: Any) -> Any:
        make = direct(*arguments)
        assert make is not None
        return lambda form: _noting(make(form), pushed)

    run_ids, leases = zip(*[await _begin(api) for _ in range(2 if several else 1)], strict=True)
    path = f"/api/stream?runs={','.join(run_ids)}" if several else f"/api/stream/{run_ids[0]}"
    monkeypatch.setattr(sse, "direct", spy)
    straight = await Wire(api, path).open()
    await straight.until(b"retry: ")
    monkeypatch.setattr(sse, "direct", lambda *_: None)
    by_send = await Wire(api, path).open()
    for wire in (straight, by_send):
        for run_id in run_ids:
            await wire.until(f'"text":"first of {run_id}"'.encode())
    seq = 2
    for texts in (["a"], ["bü", "c\n\n", "d" * 3000], ["e" * 9000], ["f"]):
        for lease in leases:
            await api.say(lease, seq, *[content(text) for text in texts])
            # One after the other, so that both see the runs in one order.
            for wire in (straight, by_send):
                await wire.until(f"id: {lease.epoch}-{seq + len(texts) - 1}\n".encode())
        seq += len(texts)
    for lease in leases:
        await api.say(lease, seq, done())
        for wire in (straight, by_send):
            await wire.until(f"id: {lease.epoch}-{seq}\n".encode())
    one, other = await straight.rest(), await by_send.rest()
    first = 2 if several else 1
    # What is read from the log may be cut into other chunks; what was pushed comes as it was published.
    assert _live(one, first) == _live(other, first) != b""
    # All but the batch too large for it.
    assert pushed.count(True) == 3 * len(run_ids)
    assert pushed.count(False) == len(run_ids)


async def _begin(api: Api) -> tuple[str, Lease]:
    run_id = (await api.ask(await api.chat()))["task_id"]
    lease = await api.claim(run_id)
    await api.say(lease, 1, content(f"first of {run_id}"))
    return run_id, lease


def _live(body: bytes, first: int) -> bytes:
    return b"\r\n".join(body.split(b"\r\n")[2 * first :])


def _noting(push: Any, pushed: list[Any]) -> Any:
    def noting(batch: Any) -> bool:
        pushed.append(push(batch))
        return bool(pushed[-1])

    return noting
