"""The SSE endpoint as an ASGI application, over a hub and a log in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, MutableMapping, Sequence
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from headwater.access import Caller
from headwater.clock import FrozenClock
from headwater.errors import BadCursor, HeadwaterError, InvalidInput, NotFound, StoreUnavailable, TooMany, Unavailable
from headwater.events import Event, content, done
from headwater.hub import Hub, Subscription
from headwater.hub.hub import LEAST_PENDING
from headwater.ids import new_id
from headwater.runs import Lease, Run
from headwater.streams.base import Page
from headwater.streams.memory import MemoryStreamLog
from headwater.telemetry import Telemetry
from headwater.transports import sse
from headwater.transports.base import Streams
from headwater.transports.sse import MAX_RUNS, TURNS, StreamEndpoint
from support.wait import eventually

CALLER = Caller("local")


class Reader:
    """An ASGI server and its client in one: calls the endpoint and keeps what it sends."""

    def __init__(self, world: World, run_id: str | None, query: str = "", *, method: str = "GET") -> None:
        self.world = world
        self.run_id = run_id
        self.scope: MutableMapping[str, Any] = {"type": "http", "method": method, "query_string": query.encode()}
        self.scope["headers"] = []
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.finished = False
        self.gone = asyncio.Event()
        #: Cleared: the reader takes nothing more.
        self.taking = asyncio.Event()
        self.taking.set()
        self.task: asyncio.Task[None] | None = None

    def start(self) -> Reader:
        self.task = asyncio.create_task(
            self.world.endpoint(self.scope, self._receive, self._send, CALLER, self.run_id, "request-1")
        )
        return self

    async def read(self) -> Reader:
        """Until the response ends."""
        if self.task is None:
            self.start()
        assert self.task is not None
        await asyncio.wait_for(self.task, 60)
        return self

    async def until(self, text: bytes) -> None:
        await eventually(lambda: text in self.body)

    @property
    def ids(self) -> list[str]:
        return [line[4:].decode() for line in self.body.split(b"\n") if line.startswith(b"id: ")]

    async def _receive(self) -> dict[str, Any]:
        if "asked" not in self.scope:
            self.scope["asked"] = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await self.taking.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        else:
            self.body += message["body"]
            self.finished = not message["more_body"]


class World:
    """A log, a hub and the endpoint; every run belongs to the caller unless said otherwise."""

    def __init__(self, **limits: Any) -> None:
        self.log = MemoryStreamLog()
        self.telemetry = Telemetry()
        self.clock = FrozenClock()
        heartbeat = limits.pop("heartbeat", 15.0)
        self.hub = Hub(self.log, history=None, telemetry=self.telemetry, heartbeat=heartbeat, clock=self.clock)
        self.streams = Streams(**{"limit": 100, "telemetry": self.telemetry, **limits})
        self.foreign: set[str] = set()
        #: Runs of which nobody can tell whose they are.
        self.untold: set[str] = set()
        #: Cleared: whoever asks whose runs these are waits.
        self.telling = asyncio.Event()
        self.telling.set()
        #: Reads that have begun and wait for `reading`.
        self.waiting = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self.endpoint = StreamEndpoint(self.hub, self.streams, may=self.may, may_each=self.may_each, read=self.read)
        self.leases: dict[str, Lease] = {}

    async def may(self, caller: Caller, run_id: str) -> None:
        if run_id in self.foreign:
            raise NotFound("There is no such run.")

    async def may_each(self, caller: Caller, run_ids: Sequence[str]) -> dict[str, HeadwaterError]:
        await self.telling.wait()
        unknown = {run_id: NotFound("There is no such run.") for run_id in run_ids if run_id in self.foreign}
        return {**unknown, **{one: StoreUnavailable("PostgreSQL is away.") for one in run_ids if one in self.untold}}

    async def read(self, run_id: str, after: int, limit: int) -> Page | None:
        self.waiting += 1
        await self.reading.wait()
        self.waiting -= 1
        return await self.log.read(run_id, after, limit)

    async def run(self, *texts: str, end: bool = False) -> str:
        """A run with a `content` event per text."""
        run = Run(new_id(), "chat", "local", {}, 1)
        await self.log.open(run, 10)
        self.leases[run.id] = await self.log.claim(run, "test")
        if texts:
            await self.say(run.id, 1, *[content(text) for text in texts])
        if end:
            await self.say(run.id, len(texts) + 1, done())
        return run.id

    async def say(self, run_id: str, first: int, *events: Event) -> None:
        stamped = [event.stamped(first + i, 1) for i, event in enumerate(events)]
        await self.log.append(self.leases[run_id], stamped)

    def epoch(self, run_id: str) -> str:
        return self.leases[run_id].epoch


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.hub.start()
    yield world
    world.streams.close()
    await world.hub.stop()


async def test_the_first_bytes_are_a_retry_and_headers_that_keep_proxies_from_holding_back(world: World) -> None:
    reader = Reader(world, await world.run()).start()
    await reader.until(b"retry: ")
    assert reader.status == 200
    assert reader.headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert reader.headers[b"cache-control"] == b"no-store, no-transform"
    assert reader.headers[b"x-accel-buffering"] == b"no"
    assert reader.headers[b"x-content-type-options"] == b"nosniff"
    assert reader.headers[b"x-request-id"] == b"request-1"
    assert 500 <= int(reader.body.split(b"\n")[0].removeprefix(b"retry: ")) <= 1500
    reader.gone.set()
    await reader.read()


async def test_a_stream_goes_from_the_past_into_the_present_and_ends_with_the_run(world: World) -> None:
    run_id = await world.run("a", "b")
    reader = Reader(world, run_id).start()
    await reader.until(b'"b"')
    await world.say(run_id, 3, content("c"))
    await reader.until(b'"c"')
    await world.say(run_id, 4, done())
    await reader.read()
    assert reader.ids == [f"{world.epoch(run_id)}-{seq}" for seq in (1, 2, 3, 4)]
    assert reader.finished
    assert not len(world.streams)


async def test_a_reader_goes_on_behind_its_cursor_by_header_or_by_query_and_the_header_wins(world: World) -> None:
    run_id = await world.run("a", "b", "c", end=True)
    epoch = world.epoch(run_id)
    by_query = await Reader(world, run_id, f"after={epoch}-2").read()
    assert by_query.ids == [f"{epoch}-3", f"{epoch}-4"]
    both = Reader(world, run_id, f"after={epoch}-1")
    both.scope["headers"] = [(b"last-event-id", f"{epoch}-3".encode())]
    assert (await both.read()).ids == [f"{epoch}-4"]


async def test_past_the_end_is_204_so_that_an_event_source_stays_away(world: World) -> None:
    run_id = await world.run("a", end=True)
    reader = await Reader(world, run_id, f"after={world.epoch(run_id)}-2").read()
    assert (reader.status, reader.body, reader.finished) == (204, b"", True)


async def test_a_cursor_of_another_log_is_answered_with_reset_and_the_whole_story(world: World) -> None:
    run_id = await world.run("a", end=True)
    reader = await Reader(world, run_id, "after=lost-7").read()
    epoch = world.epoch(run_id)
    assert reader.ids == [f"{epoch}-0", f"{epoch}-1", f"{epoch}-2"]
    assert b"event: reset" in reader.body


@pytest.mark.parametrize("cursor", ["7", "abc-", "-1", "ABC-1", "abc-01", "abc-1e3", "abc-1 2"])
async def test_a_cursor_that_cannot_be_read_is_refused_before_anything_is_sent(world: World, cursor: str) -> None:
    reader = Reader(world, await world.run(), f"after={cursor.replace(' ', '%20')}")
    with pytest.raises(BadCursor):
        await reader.read()
    assert reader.status == 0


async def test_malformed_foreign_and_wrong_method_are_refused(world: World) -> None:
    with pytest.raises(InvalidInput):
        await Reader(world, "nonsense").read()
    run_id = await world.run()
    world.foreign.add(run_id)
    with pytest.raises(NotFound):
        await Reader(world, run_id).read()
    with pytest.raises(HTTPException) as refused:
        await Reader(world, run_id, method="HEAD").read()
    assert (refused.value.status_code, refused.value.headers) == (405, {"Allow": "GET"})


async def test_a_reader_that_leaves_is_forgotten(world: World) -> None:
    run_id = await world.run("a")
    reader = Reader(world, run_id).start()
    await reader.until(b'"a"')
    assert len(world.streams) == 1
    reader.gone.set()
    await reader.read()
    assert len(world.streams) == 0
    assert not reader.finished


async def test_a_reader_that_left_before_its_stream_began_is_no_fault(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class Closed:
        """uvloop's transport after its connection was lost."""

        def set_write_buffer_limits(self, high: int) -> None:
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    class Gone(Reader):
        transport = Closed()

    reader = Gone(world, await world.run("a"))
    reader.gone.set()
    await reader.read()
    assert len(world.streams) == 0
    assert not reader.finished
    assert not caplog.records


async def test_a_quiet_stream_has_a_heartbeat() -> None:
    world = World(heartbeat=0.05)
    await world.hub.start()
    reader = Reader(world, await world.run()).start()
    await reader.until(b": hb\n\n: hb\n\n")
    reader.gone.set()
    await reader.read()
    world.streams.close()
    await world.hub.stop()


async def test_draining_ends_every_stream_cleanly_and_takes_no_new_one(world: World) -> None:
    run_id = await world.run("a")
    readers = [Reader(world, run_id).start() for _ in range(3)]
    several = Reader(world, None, f"runs={run_id},{await world.run('b')}").start()
    for reader in (*readers, several):
        await reader.until(b"id: ")
    world.streams.drain()
    for reader in (*readers, several):
        await reader.read()
        assert reader.finished
        assert reader.body.endswith(b"\n\n")
        # The second `retry`, behind what was said.
        assert reader.body.count(b"retry: ") == 2
    with pytest.raises(Unavailable):
        await Reader(world, run_id).read()


async def test_a_reader_that_takes_nothing_is_given_up() -> None:
    world = World(send_timeout=0.1)
    await world.hub.start()
    run_id = await world.run("a")
    reader = Reader(world, run_id).start()
    await reader.until(b'"a"')
    reader.taking.clear()
    await world.say(run_id, 2, content("b"))
    # No uvicorn here to cut the connection, so the task itself is ended.
    with pytest.raises(asyncio.CancelledError):
        await reader.read()
    assert len(world.streams) == 0
    world.streams.close()
    await world.hub.stop()


async def test_a_reader_that_takes_nothing_does_not_hold_up_the_end_of_the_server(world: World) -> None:
    run_id = await world.run("a")
    reader = Reader(world, run_id).start()
    await reader.until(b'"a"')
    reader.taking.clear()
    await world.say(run_id, 2, content("b"))
    world.streams.drain()
    with pytest.raises(asyncio.CancelledError):
        await reader.read()


async def test_an_owner_has_a_limit_of_open_streams() -> None:
    world = World(limit=2)
    await world.hub.start()
    run_id = await world.run("a")
    readers = [Reader(world, run_id).start() for _ in range(2)]
    for reader in readers:
        await reader.until(b'"a"')
    with pytest.raises(TooMany):
        await Reader(world, run_id).read()
    readers[0].gone.set()
    await readers[0].read()
    third = Reader(world, run_id).start()
    await third.until(b'"a"')
    for reader in (readers[1], third):
        reader.gone.set()
        await reader.read()
    world.streams.close()
    await world.hub.stop()


# --- several runs on one stream -------------------------------------------------------------------


async def test_several_runs_share_a_stream_that_ends_with_the_last_of_them(world: World) -> None:
    first, second = await world.run("a"), await world.run("b")
    reader = Reader(world, None, f"runs={first},{second}:{world.epoch(second)}-1").start()
    await reader.until(b'"a"')
    await world.say(first, 2, done())
    await reader.until(f"{world.epoch(first)}-2".encode())
    await world.say(second, 2, content("c"))
    await reader.until(b'"c"')
    assert reader.task is not None
    assert not reader.task.done()
    await world.say(second, 3, done())
    assert (await reader.read()).finished
    assert b'"text":"b"' not in reader.body
    frames = [line for line in reader.body.split(b"\n") if line.startswith(b"data: ")]
    assert [second.encode() in line for line in frames] == [False, False, True, True]


async def test_an_unknown_run_among_others_is_named_and_the_others_go_on(world: World) -> None:
    known, foreign = await world.run("a", end=True), new_id()
    world.foreign.add(foreign)
    reader = await Reader(world, None, f"runs={foreign},{known}").read()
    assert reader.status == 200
    error = next(line for line in reader.body.split(b"\n") if foreign.encode() in line)
    assert b'"code":"not_found"' in error
    assert reader.ids == [f"{world.epoch(known)}-1", f"{world.epoch(known)}-2"]


async def test_a_run_that_nobody_can_tell_of_now_is_named_and_the_others_go_on(world: World) -> None:
    known, untold = await world.run("a", end=True), new_id()
    world.untold.add(untold)
    reader = await Reader(world, None, f"runs={untold},{known}").read()
    assert reader.status == 200
    frame = next(part for part in reader.body.split(b"\n\n") if untold.encode() in part)
    assert frame.startswith(b"event: error\n")
    assert b'"code":"store_unavailable"' in frame
    assert b'"retryable":true' in frame
    assert reader.ids == [f"{world.epoch(known)}-1", f"{world.epoch(known)}-2"]


async def test_the_ends_of_several_runs_are_looked_for_at_once(world: World) -> None:
    runs = [await world.run("a") for _ in range(24)]
    world.reading.clear()
    reader = Reader(world, None, "runs=" + ",".join(f"{one}:{world.epoch(one)}-1" for one in runs)).start()
    await eventually(lambda: world.waiting == len(runs))
    world.reading.set()
    await reader.until(b"retry: ")
    reader.gone.set()
    await reader.read()


async def test_a_log_that_does_not_answer_holds_up_several_runs_no_longer_than_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "LOOK", 0.01)
    run_id = await world.run("a")
    world.reading.clear()
    reader = Reader(world, None, f"runs={run_id}:{world.epoch(run_id)}-1").start()
    await reader.until(b"retry: ")
    reader.gone.set()
    await reader.read()


async def test_streams_count_while_their_runs_are_still_being_looked_up() -> None:
    world = World(limit=2)
    await world.hub.start()
    query = f"runs={await world.run('a')}"
    world.telling.clear()
    readers = [Reader(world, None, query).start() for _ in range(2)]
    await eventually(lambda: len(world.streams) == 2)
    with pytest.raises(TooMany):
        await Reader(world, None, query).read()
    world.telling.set()
    for reader in readers:
        await reader.until(b'"a"')
        reader.gone.set()
        await reader.read()
    assert len(world.streams) == 0
    world.streams.close()
    await world.hub.stop()


async def test_a_server_that_begins_to_stop_while_runs_are_looked_up_sends_their_reader_away(world: World) -> None:
    world.telling.clear()
    reader = Reader(world, None, f"runs={await world.run('a')}").start()
    await eventually(lambda: len(world.streams) == 1)
    world.streams.drain()
    world.telling.set()
    with pytest.raises(Unavailable):
        await reader.read()
    assert reader.status == 0


async def test_several_runs_all_past_their_end_are_204(world: World) -> None:
    runs = [await world.run("a", end=True) for _ in range(2)]
    query = "runs=" + ",".join(f"{run_id}:{world.epoch(run_id)}-2" for run_id in runs)
    assert (await Reader(world, None, query).read()).status == 204


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("", InvalidInput),
        ("runs=", InvalidInput),
        ("runs=nonsense", InvalidInput),
        ("runs=" + ",".join(new_id() for _ in range(MAX_RUNS + 1)), InvalidInput),
        (f"runs={new_id()}:nonsense", BadCursor),
    ],
)
async def test_a_list_of_runs_that_cannot_be_read_is_refused(world: World, query: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await Reader(world, None, query).read()


async def test_a_slow_reader_of_several_runs_bounds_what_is_kept_for_it(world: World) -> None:
    run_id = await world.run("first")
    reader = Reader(world, None, f"runs={run_id}").start()
    await reader.until(b'"first"')
    reader.taking.clear()
    for seq in range(2, 402):
        await world.say(run_id, seq, content("x" * 1000))
    reader.taking.set()
    await world.say(run_id, 402, done())
    await reader.read()
    assert reader.ids == [f"{world.epoch(run_id)}-{seq}" for seq in range(1, 403)]


async def test_the_time_from_the_worker_to_a_socket_is_told_once_per_pushed_batch(world: World) -> None:
    told: list[float] = []
    world.telemetry.listen(lambda name, value, _: told.append(value) if name == "headwater_delivery_seconds" else None)
    run_id = await world.run("past")
    readers = [Reader(world, run_id).start() for _ in range(3)]
    for reader in readers:
        await reader.until(b'"past"')
    assert told == []
    event = content("now").stamped(2, world.clock.now_ms())
    world.clock.advance(0.04)
    await world.log.append(world.leases[run_id], [event])
    await world.say(run_id, 3, done())
    for reader in readers:
        await reader.read()
    # The last batch of a stream is not timed: nobody waits for its write any more.
    await world.hub.stop()
    assert told == [0.04]


async def test_a_reader_of_many_runs_that_takes_nothing_bounds_what_all_of_them_keep(world: World) -> None:
    runs = [await world.run("first") for _ in range(MAX_RUNS)]
    kept: list[Subscription] = []
    subscribe = world.hub.subscribe

    def remember(*arguments: Any, **named: Any) -> Subscription:
        kept.append(subscribe(*arguments, **named))
        return kept[-1]

    world.hub.subscribe = remember  # type: ignore[method-assign]
    reader = Reader(world, None, f"runs={','.join(runs)}").start()
    await eventually(lambda: reader.body.count(b'"first"') == MAX_RUNS)
    reads: Counter[str] = Counter()
    world.telemetry.listen(
        lambda name, value, labels: reads.update({labels["reason"]: 1} if "reason" in labels else {})
    )
    reader.taking.clear()
    for seq in range(2, 42):
        for run_id in runs:
            await world.say(run_id, seq, content("x" * 1000))
    await eventually(lambda: reads["slow"] + reads["hole"] > 0)
    most = world.hub.max_pending // MAX_RUNS
    assert all(one._pending_bytes <= max(most, LEAST_PENDING) for one in kept)
    # Only so many have read a page that they cannot get rid of.
    assert reads.total() <= TURNS
    reader.taking.set()
    for run_id in runs:
        await world.say(run_id, 42, done())
    await reader.read()
    for run_id in runs:
        epoch = world.epoch(run_id)
        assert [one for one in reader.ids if one.startswith(epoch)] == [f"{epoch}-{seq}" for seq in range(1, 43)]
