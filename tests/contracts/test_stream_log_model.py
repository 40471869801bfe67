"""Whatever writers say, again or too late, and whatever Redis loses: its log answers as the one in memory does.

Hypothesis plays two workers that each hold what they hold, claims and repeats of any earlier append through either of
two processes, and a server that loses a run's list or its hash, or comes back with an older state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import headwater.streams.redis
from headwater.errors import LogLost, LogRefused
from headwater.events import Event
from headwater.runs import Lease
from headwater.streams import keys
from headwater.streams.base import Meta, new_epoch
from support.streams import MemoryWorld, RedisWorld, end, new_run, texts

T = TypeVar("T")

#: Seconds; the tenth of it in which appends are ordinary lasts until a rule ends it.
LEASE = 3600.0


@dataclass
class Hand:
    """A lease, in both worlds, and the log as its holder knows it."""

    real: Lease
    memory: Lease
    events: list[Event]
    #: Every append it made, for them to be repeated.
    said: list[list[Event]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].terminal


class Twins(RuleBasedStateMachine):
    world: RedisWorld
    runner: asyncio.Runner
    processes: Sequence[Any]

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryWorld()
        self.memory_log = self.memory.another(lease_seconds=LEASE)
        self.run = new_run()
        self.hands: list[Hand] = []
        #: Epochs of Redis, by those in memory.
        self.epochs: dict[str, str] = {}
        #: What was to be published.
        self.published: list[str] = []
        #: What brings the log back as it was saved.
        self.load: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()
        for process in self.processes:
            process._extended._ends = 0.0
        self.listener = self.world.raw.pubsub()
        self.go(self.listener.subscribe(keys.channel(self.run.id)))
        self.claim("a", 0, known=False)

    def go(self, doing: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(doing)

    def both(self, real: Coroutine[Any, Any, T], memory: Coroutine[Any, Any, T]) -> tuple[T, T] | LogRefused:
        """Do it in both worlds: it succeeds in both or is refused alike."""

        async def tried(doing: Coroutine[Any, Any, T]) -> T | LogRefused:
            try:
                return await doing
            except LogRefused as refusal:
                return refusal

        one, other = self.go(tried(real)), self.go(tried(memory))
        if isinstance(one, LogRefused) or isinstance(other, LogRefused):
            assert type(one) is type(other), f"{one!r} in Redis, {other!r} in memory"
            assert isinstance(one, LogRefused)
            return one
        return one, other

    @property
    def log(self) -> Any:
        return self.memory.memory._logs.get(self.run.id)

    def hand(self, number: int) -> Hand:
        return self.hands[-1 - number % len(self.hands)]

    # --- the workers ----------------------------------------------------------------------------

    @rule(holder=st.sampled_from("ab"), process=st.integers(0, 1), known=st.booleans())
    def claim(self, holder: str, process: int, known: bool) -> None:
        """`known`: its row tells the attempt."""
        attempt = max((hand.real.attempt for hand in self.hands), default=0) if known else 0
        # A name is that of one execution, which may ask again before it writes.
        again = bool(self.hands) and self.hands[-1].real.holder.startswith(holder) and not self.hands[-1].said
        holder = self.hands[-1].real.holder if again else f"{holder}{len(self.hands)}"
        run = new_run(id=self.run.id, attempt=attempt)
        torn = self.go(self.torn())
        claimed = self.both(self.processes[process].claim(run, holder), self.memory_log.claim(run, holder))
        if isinstance(claimed, LogRefused):
            return
        real, memory = claimed
        if torn:
            # Events were lost, or may have been: memory loses none and knows no such case.
            assert real.epoch not in self.epochs.values()
            self.log.epoch, self.log.events = new_epoch(), []
            memory = Lease(memory.run_id, memory.attempt, holder, self.log.epoch, 0, memory.cancelled)
        assert (real.attempt, real.length, real.cancelled) == (memory.attempt, memory.length, memory.cancelled)
        if again and real.attempt <= self.hands[-1].real.attempt:
            # All was lost in between. It knows of one lease only.
            self.hands.pop()
        self.hands.append(Hand(real, memory, list(self.log.events)))

    async def torn(self) -> bool:
        names = ("epoch", "chunk_count", "server")
        epoch, count, server = await self.world.raw.hmget(keys.metadata(self.run.id), *names)
        if epoch is None:
            return False
        length = await self.world.raw.llen(keys.chunks(self.run.id))
        return bool(server == "another" or length < int(count))

    @rule(count=st.integers(1, 3))
    def go_on(self, count: int) -> None:
        """As nearly all appends are."""
        self.append(0, 0, [3] * count)

    @rule(number=st.integers(0, 2), process=st.integers(0, 1), sizes=st.lists(st.sampled_from([3, 300]), min_size=1))
    def append(self, number: int, process: int, sizes: list[int]) -> None:
        hand = self.hand(number)
        if not hand.ended:
            name = f"{hand.real.attempt}{hand.real.holder}"
            self.say(hand, process, texts(len(hand.events) + 1, *(name.ljust(size, ".") for size in sizes)))

    def say(self, hand: Hand, process: int, batch: list[Event]) -> None:
        hand.said.append(batch)
        hand.events += batch
        if isinstance(self.write(hand, process, batch), LogLost):
            self.restore_of(hand, process)

    @rule(number=st.integers(0, 3), which=st.integers(0, 5), process=st.integers(0, 1), more=st.booleans())
    def say_again(self, number: int, which: int, process: int, more: bool) -> None:
        hand = self.hand(number)
        if hand.said:
            at = -1 - which % len(hand.said)
            batch = hand.said[at]
            rest = hand.events[batch[-1].seq :] if more else []
            self.write(hand, process, [*batch, *rest])

    def write(self, hand: Hand, process: int, batch: list[Event]) -> object:
        before = len(self.log.events) if self.log is not None else 0
        answers = self.both(
            self.processes[process].append(hand.real, batch), self.memory_log.append(hand.memory, batch)
        )
        if not isinstance(answers, LogRefused):
            assert answers[0] == answers[1]
            assert self.log.events[: batch[-1].seq] == hand.events[: batch[-1].seq]
            if new := self.log.events[before:]:
                lines = [event.encode().decode() for event in new]
                self.published.append("\n".join([f"{hand.real.epoch} {before + 1}", *lines]))
        return answers

    @rule(number=st.integers(0, 2), process=st.integers(0, 1))
    def restore(self, number: int, process: int) -> None:
        self.restore_of(self.hand(number), process)

    def restore_of(self, hand: Hand, process: int) -> None:
        was_open = self.log is None or not self.log.status.terminal
        answers = self.both(
            self.processes[process].restore(hand.real, self.run, hand.events),
            self.memory_log.restore(hand.memory, self.run, hand.events),
        )
        if not isinstance(answers, LogRefused):
            assert answers[0] == answers[1]
            assert self.log.events[: len(hand.events)] == hand.events
            if was_open:
                self.published.append(f"{hand.real.epoch} {answers[0].count + 1}\n")

    @rule(process=st.integers(0, 1))
    def renew(self, process: int) -> None:
        answers = self.both(
            self.processes[process].renew([hand.real for hand in self.hands]),
            self.memory_log.renew([hand.memory for hand in self.hands]),
        )
        assert not isinstance(answers, LogRefused)
        assert answers[0] == answers[1]

    @rule(what=st.sampled_from(["cancel", "end", "hand over", "announce", "let the lease run out", "pack"]))
    def do(self, what: str) -> None:
        log, run_id, hand = self.processes[1], self.run.id, self.hands[-1]
        match what:
            case "cancel":
                self.both(log.cancel(run_id), self.memory_log.cancel(run_id))
            case "end" if not hand.ended:
                self.say(hand, 1, [end(len(hand.events) + 1)])
            case "hand over":
                self.both(log.release(hand.real), self.memory_log.release(hand.memory))
            case "announce":
                self.both(log.open(self.run, 10), self.memory_log.open(self.run, 10))
            case "let the lease run out" if self.log is not None and not self.log.status.terminal:
                self.log.lease_until = 0
                self.go(self.world.raw.hset(keys.metadata(run_id), "lease_until", 0))
                for process in self.processes:
                    process._extended._ends = 0.0
            case "pack" if self.log is not None and self.log.status.terminal:
                meta = self.go(log.meta(run_id))
                self.go(log._pack(meta))

    @rule(what=st.sampled_from(["all", "its hash", "its list", "what came after it was saved", "nothing: it is saved"]))
    def lose(self, what: str) -> None:
        run_id = self.run.id
        match what:
            case "all":
                self.both(self.processes[0].forget(run_id), self.memory_log.forget(run_id))
            case "its hash":
                self.go(self.world.raw.delete(keys.metadata(run_id)))
                self.go(self.memory_log.forget(run_id))
            case "its list" if self.log is not None and not self.log.status.terminal:
                self.go(self.world.raw.delete(keys.chunks(run_id)))
                self.log.events.clear()
            case "what came after it was saved":
                for load in self.load:
                    self.go(load())
            case "nothing: it is saved":
                self.load = [self.go(world.save(run_id)) for world in (self.world, self.memory)]

    # --- what holds -----------------------------------------------------------------------------

    @invariant()
    def both_have_the_same(self) -> None:
        one, other = self.go(self.world.log.meta(self.run.id)), self.go(self.memory_log.meta(self.run.id))
        assert _known(one) == _known(other)
        if one is None or other is None:
            return
        assert self.epochs.setdefault(other.epoch, one.epoch) == one.epoch
        events = self.go(self.world.events(self.run.id))
        assert [event.encode() for event in events] == [event.encode() for event in self.log.events]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))

    @invariant()
    def nothing_stays_for_ever(self) -> None:
        async def ttls() -> list[int]:
            return [await self.world.raw.ttl(name(self.run.id)) for name in (keys.metadata, keys.chunks, keys.run)]

        assert -1 not in self.go(ttls())

    def teardown(self) -> None:
        self.go(self.world.log.forget(self.run.id))
        assert self.go(self.heard()) == self.published

    async def heard(self) -> list[str]:
        """All that was published, each once and in order."""
        await self.world.raw.publish(keys.channel(self.run.id), "that is all")
        heard: list[str] = []
        while (message := await self.listener.get_message(timeout=5)) is not None and message["data"] != "that is all":
            heard += [message["data"]] if message["type"] == "message" else []
        await self.listener.aclose()
        return heard


def _known(meta: Meta | None) -> object:
    if meta is None:
        return None
    return (meta.status, meta.attempt, meta.count, meta.cancelled, meta.lease_left > 0)


@pytest.mark.timeout(900)
def test_the_log_in_redis_answers_as_the_one_in_memory(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that few and small events take all ways.
    monkeypatch.setattr(headwater.streams.redis, "MANY", 4)
    monkeypatch.setattr(headwater.streams.redis, "LARGE", 1_500)
    with asyncio.Runner() as runner:
        world = RedisWorld(redis_url)

        class Machine(Twins):
            pass

        Machine.world, Machine.runner = world, runner
        Machine.processes = [world.another(lease_seconds=LEASE) for _ in range(2)]
        try:
            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=60,
                    stateful_step_count=40,
                    deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                ),
            )
        finally:
            runner.run(world.close())
