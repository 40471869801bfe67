"""Who goes first: priorities and owners' turns, over a real Redis, a real broker and real workers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import redis.asyncio

from headwater import streams
from headwater.clock import SystemClock
from headwater.errors import LogUnavailable
from headwater.events import Event, EventType
from headwater.ids import new_id
from headwater.queue import BELLS, CHAT_QUEUE, JOBS_QUEUE, Dispatcher, lists_of, make_celery
from headwater.runs import Priority, Run
from headwater.service import running
from headwater.settings import Settings
from headwater.shares import Shares
from headwater.streams.base import StreamLog
from headwater.streams.places import Places
from headwater.sweeper import Sweeper
from headwater.telemetry import Telemetry
from support.openai_scenarios import Scenario, chunk
from support.openai_server import OpenAIServer
from support.runs import new_run
from support.stack import Stack, StackMaker
from support.wait import eventually

BACKGROUND, NORMAL, URGENT = Priority.BACKGROUND, Priority.NORMAL, Priority.URGENT


def question(text: str = "Why?", owner: str = "me", kind: str = "chat", priority: Priority = NORMAL) -> Run:
    asked = {"messages": [{"role": "user", "content": text}]}
    run = new_run(kind, input=asked, owner_id=owner, priority=priority, created_at=SystemClock().now_ms())
    return replace(run, chat_id=None, message_id=None)


class Desk:
    """Hands runs to a broker as a server does, and sees what became of them."""

    def __init__(self, log: StreamLog, dispatcher: Dispatcher, raw: redis.asyncio.Redis) -> None:
        self.log = log
        self.dispatcher = dispatcher
        self.raw = raw

    async def hand_in(self, *runs: Run) -> None:
        for run in runs:
            await self.log.open(run, 15)
            self.dispatcher.enqueue(run)

    async def waiting(self) -> int:
        """Messages in the broker."""
        return await self.log.depth(*lists_of(CHAT_QUEUE, JOBS_QUEUE))

    async def parked(self, owner: str, what: str = "bells:chat:normal") -> int:
        return int(await self.raw.zcard(f"headwater:owner:{{{owner}}}:{what}:waiting"))

    async def events(self, run: Run) -> Sequence[Event]:
        page = await self.log.read(run.id, 0, 1000)
        return page.events if page is not None else ()

    async def begun(self, *runs: Run) -> None:
        for run in runs:
            await eventually(partial(self.events, run))

    async def ended(self, *runs: Run, within: float = 90) -> None:
        async def all_of_them() -> bool:
            return all(meta and meta.status.terminal for meta in await self.log.metas([run.id for run in runs]))

        await eventually(all_of_them, within)

    async def order(self, *runs: Run) -> list[Run]:
        """As they ended."""
        ends = {run.id: (await self.events(run))[-1].at for run in runs}
        return sorted(runs, key=lambda run: ends[run.id])

    async def most_at_once(self, *runs: Run) -> int:
        """Runs that were under way at the same time."""
        steps: list[tuple[int, int]] = []
        for run in runs:
            events = await self.events(run)
            steps += [(events[0].at, 1), (events[-1].at, -1)]
        most = now = 0
        for _, step in sorted(steps):
            now += step
            most = max(most, now)
        return most


@asynccontextmanager
async def desk(redis_url: str) -> AsyncIterator[Desk]:
    celery = make_celery(Settings(redis_url=redis_url))
    log = streams.connect(redis_url)
    places = Places(redis_url)
    try:
        async with (
            redis.asyncio.Redis.from_url(redis_url, decode_responses=True) as raw,
            running(dispatcher := Dispatcher(celery, telemetry=Telemetry(), places=places)),
        ):
            yield Desk(log, dispatcher, raw)
    finally:
        await log.close()
        places.close()
        await asyncio.to_thread(celery.close)


@asynccontextmanager
async def one_slot_taken(stack: Stack, model: OpenAIServer) -> AsyncIterator[Desk]:
    """A worker that does one run at a time and is at one until the block ends."""
    name = f"slot-{new_id()}"
    model.scenarios[name] = Scenario([{"wait": name}, {"chunk": chunk("x")}, {"chunk": chunk(finish="stop")}])
    async with desk(stack.redis_url) as made:
        first = question(f"Hold. [[scenario:{name}]]", owner="somebody")
        await made.hand_in(first)

        await made.begun(first)
        yield made
        model.release(name)
        await made.ended(first)


async def test_urgent_runs_go_before_background_and_questions_before_jobs(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    stack = await make_stack(servers=0, settings={"HEADWATER_WORKER_CONCURRENCY": "1"})
    # Every run is its owner's first; the order of handing in is the reverse of that of going.
    handed_in = [
        question(owner="a", kind="job", priority=BACKGROUND),
        question(owner="b", priority=BACKGROUND),
        question(owner="c", kind="job"),
        question(owner="d"),
        question(owner="e", kind="job", priority=URGENT),
        question(owner="f", priority=URGENT),
    ]
    async with one_slot_taken(stack, openai_server) as at:
        await at.hand_in(*handed_in)
        await eventually(lambda: _equals(at.waiting, len(handed_in)))
    async with desk(stack.redis_url) as at:
        await at.ended(*handed_in)
        assert await at.order(*handed_in) == handed_in[::-1]


async def test_two_hundred_questions_of_one_owner_do_not_delay_those_of_another(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    stack = await make_stack(servers=0, settings={"HEADWATER_WORKER_CONCURRENCY": "1"})
    many = [question("[[words:1]] [[rate:0]]", owner="many") for _ in range(200)]
    few = [question("[[words:1]] [[rate:0]]", owner="few") for _ in range(3)]
    async with one_slot_taken(stack, openai_server) as at:
        await at.hand_in(*many)
        await eventually(lambda: _equals(partial(at.parked, "many"), 200 - BELLS))
        await at.hand_in(*few)
        await eventually(lambda: _equals(at.waiting, BELLS + len(few)))
    async with desk(stack.redis_url) as at:
        await at.ended(*few)
        before = [run for run in many if (meta := await at.log.meta(run.id)) and meta.status.terminal]
        order = await at.order(*before, *few)
        assert order.index(few[0]) <= 1, "an owner's first goes before the further ones of others"
        assert order.index(few[-1]) < BELLS + len(few)
        # The rest is only many.
        stack.worker.change(HEADWATER_WORKER_CONCURRENCY="50")
        await stack.worker.restart()
        await at.ended(*many)


async def _equals(ask: object, wanted: int) -> bool:
    assert callable(ask)
    return bool(await ask() == wanted)


async def test_no_more_runs_of_an_owner_than_allowed_are_under_way_and_all_of_them_end(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    limits = {"HEADWATER_WORKER_CONCURRENCY": "20", "HEADWATER_OWNER_RUNS": "2", "HEADWATER_LEASE_SECONDS": "4"}
    stack = await make_stack(servers=0, workers=2, settings=limits)
    async with desk(stack.redis_url) as at:
        many = [question(held(openai_server, "many"), owner="many") for _ in range(24)]
        jobs = [question(owner="many", kind="job") for _ in range(3)]
        few = [question(held(openai_server, "few"), owner="few") for _ in range(2)]
        await at.hand_in(*many)
        await eventually(lambda: at.parked("many", "runs:chat"))
        await at.hand_in(*jobs, *few)
        await at.ended(*jobs)
        await at.begun(*few)
        openai_server.release("few")
        await at.ended(*few)
        # Neither its own jobs nor others' questions waited for its questions, which all wait still.
        assert await at.parked("many", "runs:chat")
        stack.workers[0].kill()
        await stack.workers[0].start()
        openai_server.release("many")
        await at.ended(*many, within=120)
        assert await at.most_at_once(*few) == 2
        unbroken = [run for run in many if len(await _attempts(at, run)) == 1]
        assert len(unbroken) >= len(many) - 2
        assert 1 <= await at.most_at_once(*unbroken) <= 2


def held(model: OpenAIServer, name: str) -> str:
    """A question whose answer begins, and ends when `name` is released."""
    model.scenarios[name] = Scenario([{"chunk": chunk("x")}, {"wait": name}, {"chunk": chunk(finish="stop")}])
    return f"[[scenario:{name}]]"


async def _attempts(at: Desk, run: Run) -> list[Event]:
    return [event for event in await at.events(run) if event.type is EventType.STATE]


# --- places, one by one ---------------------------------------------------------------------------


@pytest.fixture
def places(redis_url: str) -> Iterator[Places]:
    made = Places(redis_url)
    yield made
    made.close()


@pytest.fixture
async def log(redis_url: str) -> AsyncIterator[StreamLog]:
    made = streams.connect(redis_url)
    yield made
    await made.close()


async def test_who_comes_later_waits_and_is_next_in_order(places: Places, log: StreamLog) -> None:
    runs = [question() for _ in range(5)]
    for run in runs:
        await log.open(run, 15)
    taken = [places.take(run, "x", -n, places=2, seconds=60) for n, run in enumerate(runs)]
    assert taken == [0, 1, None, None, None]
    assert places.take(runs[0], "x", 0, places=2, seconds=60) == 1, "it has its place already"
    assert places.take(question(owner="other"), "x", 0, places=2, seconds=60) == 0
    assert places.take(question(), "y", 0, places=2, seconds=60) == 0
    assert places.give(runs[0], "x", places=2) == [runs[4]], "the lowest order, not the earliest"
    assert places.give(runs[0], "x", places=2) == [runs[3]], "nobody took the place yet"
    assert places.give(runs[1], "x", places=1) == [runs[2]]
    assert places.give(runs[1], "x", places=1) == []


async def test_a_run_that_is_gone_gives_its_turn_to_the_next(places: Places, log: StreamLog) -> None:
    first, gone, last = (question() for _ in range(3))
    await log.open(last, 15)
    for order, run in enumerate((first, gone, last)):
        places.take(run, "x", order, places=1, seconds=60)
    assert places.give(first, "x", places=1) == [last]


async def test_a_turn_that_was_lost_on_its_way_is_rung_for_by_the_sweeper(
    places: Places, log: StreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (question() for _ in range(3))
    for order, run in enumerate((first, second, third)):
        await log.open(run, 0.01 if run is second else 60)
        places.take(run, "x", order, places=1, seconds=60)
    with monkeypatch.context() as patch:
        # As when the process dies in between: the run is no longer among those that wait.
        patch.setattr(places, "_runs", lambda ids: (_ for _ in ()).throw(LogUnavailable("gone")))
        with pytest.raises(LogUnavailable):
            places.give(first, "x", places=1)
    rung: dict[str, int | None] = {}

    def ring(run: Run) -> None:
        rung[run.id] = places.take(run, "x", 9, places=1, seconds=60)

    async def nothing(*_: object) -> list[Run]:
        return []

    sweeper = Sweeper(
        log,
        unfinished=nothing,
        enqueue=ring,
        repair=nothing,
        cancel=nothing,
        clock=SystemClock(),
        telemetry=Telemetry(),
        grace=0.01,
    )

    async def swept() -> bool:
        await sweeper.sweep(rows=False)
        return second.id in rung

    await eventually(swept)
    assert rung == {second.id: 0}
    assert places.give(second, "x", places=1) == [third]


async def test_a_place_that_nobody_keeps_is_free_again_and_one_that_is_kept_is_not(places: Places) -> None:
    lost, kept, late = (question() for _ in range(3))
    for run in (lost, kept):
        places.take(run, "x", 0, places=2, seconds=0.05)
    places.keep([kept], lambda run: "x", seconds=60)
    await eventually(lambda: places.take(late, "x", 0, places=2, seconds=60) == 1)
    assert places.take(lost, "x", 0, places=2, seconds=60) is None


async def test_a_redis_that_forgot_learns_of_the_runs_under_way_again(places: Places, log: StreamLog) -> None:
    rung: list[Run] = []
    shares = Shares(places, limit=1, lease_seconds=10, ring=rung.append)
    first, second = question(), question()
    await log.open(second, 15)
    assert await shares.admit(first)
    places._redis.flushall()
    await shares.keep()
    await log.open(second, 15)
    assert not await shares.admit(second)
    shares.let_go(first)
    await shares.ended(first)
    assert rung == [second]
    assert await shares.admit(second)


async def test_a_place_that_is_given_back_while_places_are_kept_is_free(
    places: Places, log: StreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = Shares(places, limit=1, lease_seconds=60, ring=lambda run: None)
    first, second = question(), question()
    await log.open(second, 15)
    assert await shares.admit(first)
    begun, go, keep = threading.Event(), threading.Event(), places.keep

    def slow(*arguments: Any, **options: Any) -> None:
        begun.set()
        go.wait()
        keep(*arguments, **options)

    monkeypatch.setattr(places, "keep", slow)
    keeping = asyncio.create_task(shares.keep())
    await eventually(begun.is_set)
    shares.let_go(first)
    ending = asyncio.create_task(shares.ended(first))
    # Time enough for an end that does not wait.
    await asyncio.wait({ending}, timeout=0.2)
    go.set()
    await asyncio.gather(keeping, ending)
    assert await shares.admit(second)
