"""A reader that is cut at every point of a stream and comes back has read the same as one that was not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from chaos.proxy import Proxy
from headwater.events import Event, EventType, content, done, progress, reasoning, usage
from headwater.runs import Lease
from support.api import Api, serving, settings_for

#: Pieces that are hard to cut in the middle: characters of several bytes, line ends, what looks like a frame.
EVENTS: Final = [
    Event(EventType.STATE, {"state": "running", "attempt": 1}),
    reasoning("Hm — "),
    content("Hello"),
    content(", wörld 🌊\n\n"),
    Event(EventType.RESET, {"reason": "worker_lost", "attempt": 2}),
    Event(EventType.STATE, {"state": "running", "attempt": 2}),
    content('data: {"seq":1}\r\n\r\nid: x-1\n\n'),
    progress("writing", 0.5, "half"),
    content("日本語"),
    content(""),
    usage(3, 4),
    done(),
]
#: Connections at once, each through a proxy of its own.
LANES: Final = 4

Told = list[tuple[str, Mapping[str, Any]]]


@pytest.fixture
async def api(tmp_path: Path, redis_url: str, database_url: str) -> AsyncIterator[Api]:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as running:
        yield running


async def begun(api: Api) -> tuple[str, Lease]:
    """A run that somebody holds and that has said nothing."""
    run_id = (await api.ask(await api.chat()))["task_id"]
    return run_id, await api.claim(run_id)


async def told(api: Api, events: Sequence[Event] = EVENTS) -> str:
    """A run that has said these events."""
    run_id, lease = await begun(api)
    await api.say(lease, 1, *events)
    return run_id


def port_of(api: Api) -> int:
    return int(api.base_url.rpartition(":")[2])


# --- what came over a connection ---------------------------------------------------------------


async def fetch(port: int, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    """All bytes of a response until the connection ends or breaks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    raw = b""
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode())
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                raw += data
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return raw


def body_of(raw: bytes) -> bytes:
    """As much of the body as came, out of its chunks."""
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found or b"transfer-encoding: chunked" not in head.lower():
        return rest
    body = b""
    while rest:
        size, found, rest = rest.partition(b"\r\n")
        if not found or int(size, 16) == 0:
            break
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


def frames(raw: bytes) -> Told:
    """Whole frames as `(id, data)`."""
    *whole, _ = body_of(raw).split(b"\n\n")
    found: Told = []
    for frame in whole:
        fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if ": " in line)
        if "data" in fields:
            found.append((fields["id"], orjson.loads(fields["data"])))
    return found


# --- server-sent events ------------------------------------------------------------------------


async def at_every_byte(api: Api, whole: bytes, check: Callable[[int, int], Awaitable[None]]) -> None:
    """Call `check(proxy's port, n)` for every n from the end of the head on, with a proxy that cuts after n bytes."""
    head = whole.index(b"\r\n\r\n")

    async def lane(first: int) -> None:
        async with Proxy(("127.0.0.1", port_of(api))).run() as proxy:
            for n in range(head + first, len(whole) + 1, LANES):
                proxy.cut_after = n
                await check(proxy.port, n)

    async with asyncio.TaskGroup() as tasks:
        for first in range(1, LANES + 1):
            tasks.create_task(lane(first))


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_stream_cut_at_every_byte_is_read_whole(api: Api, by_header: bool) -> None:
    path = f"/api/stream/{await told(api)}"
    whole = await fetch(port_of(api), path)
    expected = frames(whole)
    assert [data["type"] for _, data in expected] == [event.type for event in EVENTS]
    resumed: set[int] = set()

    async def check(port: int, n: int) -> None:
        before = await fetch(port, path)
        # Cut where it should be, or a little shorter as a whole: its `retry` differs.
        assert len(before) == n or before.endswith(b"\r\n0\r\n\r\n")
        seen = frames(before)
        cursor = seen[-1][0] if seen else ""
        headers = {"Last-Event-ID": cursor} if by_header and cursor else {}
        query = f"?after={cursor}" if not by_header and cursor else ""
        after = await fetch(port_of(api), path + query, headers)
        assert seen + frames(after) == expected, n
        assert after.startswith(b"HTTP/1.1 204" if len(seen) == len(expected) else b"HTTP/1.1 200")
        resumed.add(len(seen))

    await at_every_byte(api, whole, check)
    assert resumed == set(range(len(EVENTS) + 1))


async def test_a_stream_of_several_runs_cut_at_every_byte_is_read_whole(api: Api) -> None:
    # The frames are as those of one run; what is new is that each run has a cursor of its own.
    events = EVENTS[-4:]
    ids = [await told(api, events), await told(api, events)]
    whole = await fetch(port_of(api), f"/api/stream?runs={','.join(ids)}")
    expected = by_run(frames(whole))
    assert {run_id: len(seen) for run_id, seen in expected.items()} == dict.fromkeys(ids, len(events))

    async def check(port: int, n: int) -> None:
        seen = by_run(frames(await fetch(port, f"/api/stream?runs={','.join(ids)}")))
        wanted = ",".join(f"{run_id}:{seen[run_id][-1][0]}" if seen.get(run_id) else run_id for run_id in ids)
        rest = by_run(frames(await fetch(port_of(api), f"/api/stream?runs={wanted}")))
        assert {run_id: seen.get(run_id, []) + rest.get(run_id, []) for run_id in ids} == expected, n

    await at_every_byte(api, whole, check)


def by_run(seen: Told) -> dict[str, Told]:
    found: dict[str, Told] = {}
    for cursor, data in seen:
        found.setdefault(data["run_id"], []).append((cursor, data))
    return found


class Live:
    """A reader on a connection that stays open."""

    def __init__(self, api: Api, path: str, cursor: str) -> None:
        self._api, self._path, self._cursor = api, path, cursor
        self._raw = b""

    async def __aenter__(self) -> Live:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port_of(self._api))
        resume = f"Last-Event-ID: {self._cursor}\r\n" if self._cursor else ""
        self._writer.write(f"GET {self._path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{resume}\r\n".encode())
        return self

    async def __aexit__(self, *_: object) -> None:
        # Reset, as when a network goes away.
        self._writer.transport.abort()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def seen(self, count: int) -> Told:
        """The first events, once so many are there."""
        async with asyncio.timeout(10):
            while len(found := frames(self._raw)) < count:
                data = await self._reader.read(65536)
                assert data, "the stream ended early"
                self._raw += data
        return found


def cuts() -> Iterator[tuple[int, int]]:
    """After how many events a reader is cut, and how many more are said until it is back."""
    for cut in range(len(EVENTS)):
        for missed in {0, 1, (len(EVENTS) - cut) // 2, len(EVENTS) - cut}:
            yield cut, missed


async def test_a_live_stream_cut_after_every_event_is_read_whole(api: Api) -> None:
    async def check(cut: int, missed: int) -> None:
        run_id, lease = await begun(api)
        path = f"/api/stream/{run_id}"
        async with Live(api, path, "") as reader:
            for seq, event in enumerate(EVENTS[:cut], 1):
                await api.say(lease, seq, event)
            seen = (await reader.seen(cut))[:cut]
        back = cut + missed
        for seq, event in enumerate(EVENTS[cut:back], cut + 1):
            await api.say(lease, seq, event)
        async with Live(api, path, seen[-1][0] if seen else "") as reader:
            for seq, event in enumerate(EVENTS[back:], back + 1):
                await api.say(lease, seq, event)
            seen += await reader.seen(len(EVENTS) - cut)
        assert seen == frames(await fetch(port_of(api), path)), (cut, missed)

    for cut, missed in cuts():
        await check(cut, missed)


# --- polling -----------------------------------------------------------------------------------


async def polled(api: Api, run_id: str, cursor: str | None, **query: Any) -> tuple[list[Any], str | None, bool]:
    given = {**query, **({"after": cursor} if cursor else {})}
    page = (await api.http.get(f"/api/runs/{run_id}/events", params=given)).json()
    assert not page["reset"]
    return page["items"], page["cursor"], page["done"]


async def test_polling_cut_after_every_event_reads_the_whole(api: Api) -> None:
    run_id = await told(api)
    expected, _, over = await polled(api, run_id, None)
    assert over
    assert [item["type"] for item in expected] == [event.type for event in EVENTS]
    for cut in range(1, len(EVENTS) + 1):
        first, cursor, over = await polled(api, run_id, None, limit=cut)
        assert over == (cut == len(EVENTS))
        rest, _, over = await polled(api, run_id, cursor)
        assert over
        assert first + rest == expected


async def test_polling_a_live_run_event_by_event_reads_the_whole(api: Api) -> None:
    async def read(run_id: str, limit: int) -> Sequence[Any]:
        seen: list[Any] = []
        cursor, over = None, False
        while not over:
            items, cursor, over = await polled(api, run_id, cursor, limit=limit, wait=10)
            seen += items
        return seen

    run_id, lease = await begun(api)
    reading = [asyncio.create_task(read(run_id, limit)) for limit in (1, 2, 5, 100)]
    for seq, event in enumerate(EVENTS, 1):
        await api.say(lease, seq, event)
        # Let some of them ask again in between.
        await polled(api, run_id, None)
    expected, _, _ = await polled(api, run_id, None)
    async with asyncio.timeout(20):
        assert all([await task == expected for task in reading])


async def test_no_part_of_a_polled_page_passes_for_a_page(api: Api) -> None:
    """So nobody goes on from a page that was cut; it is asked for again."""
    page = (await api.http.get(f"/api/runs/{await told(api)}/events")).content
    for n in range(len(page)):
        with pytest.raises(orjson.JSONDecodeError):
            orjson.loads(page[:n])
