"""Whatever the push does, and whatever the log loses: every reader sees each epoch's events once, in order, to the end.

Hypothesis plays the network, the server's faults, the worker and the readers, one step at a time,
in a loop whose time passes by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from headwater.clock import FrozenClock
from headwater.errors import LogLost
from headwater.events import Cursor, Event, EventType, content, done
from headwater.hub import Batch, Hub, Subscription
from headwater.streams.base import Page
from headwater.telemetry import Telemetry
from headwater.transcript import Transcript
from support.rough import RoughLog, VirtualLoop
from support.streams import new_run

T = TypeVar("T")

#: Bytes; a handful of events, so that slow readers overflow.
MAX_PENDING = 400


class Reader:
    """What one reader was told, and that it was told right."""

    def __init__(self, model: HubModel, subscription: Subscription, after: Cursor | None) -> None:
        self._model = model
        self.subscription = subscription
        self.epoch = after.epoch if after else ""
        self.seq = after.seq if after else 0
        #: What it shows since the last reset; None while it was not there from the beginning.
        self.shown: list[Event] | None = None if self.seq else []
        #: The terminal event came, since it last joined.
        self.ended = False
        self.over = False
        #: A `next` that waits.
        self.waiting: asyncio.Task[Batch | None] | None = None

    def see(self, batch: Batch | None) -> None:
        if batch is None:
            self.over = True
            return
        assert not self.ended, f"{batch} after the terminal event"
        if batch.reset:
            self.epoch, self.seq, self.shown = batch.epoch, 0, []
        for event in batch.events:
            if self.seq == 0:
                self.epoch = batch.epoch
            assert batch.epoch == self.epoch
            assert event.seq == self.seq + 1
            assert event == self._model.epochs[self.epoch][self.seq]
            self.seq, self.ended = event.seq, event.terminal
            if self.shown is not None:
                self.shown.append(event)


class HubModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.log = RoughLog(clock=FrozenClock())
        self.push = self.log.push
        self.push.holding = True
        self.run = new_run()
        #: Every event ever written, by epoch.
        self.epochs: dict[str, list[Event]] = {}
        self.over = False
        self.readers: list[Reader] = []
        self.hub = Hub(self.log, history=self, telemetry=Telemetry(), watchdog=5, heartbeat=15, max_pending=MAX_PENDING)
        self.go(self.hub.start())
        self.claim()

    def go(self, doing: Coroutine[Any, Any, T]) -> T:
        async def settled() -> T:
            done_ = await doing
            for _ in range(5):
                await asyncio.sleep(0)
            return done_

        return self.loop.run_until_complete(settled())

    def do(self, act: Callable[[], T]) -> T:
        """What is not a coroutine, but happens on the loop."""

        async def acting() -> T:
            return act()

        return self.go(acting())

    async def page(self, run_id: str) -> Page | None:
        """The history: a run that has ended is stored, in fewer and larger pieces."""
        return Page("stored", self.epochs["stored"], len(self.epochs["stored"]), True) if self.over else None

    # --- the worker -----------------------------------------------------------------------------

    def claim(self) -> None:
        self.lease = self.go(self.log.claim(self.run, "worker"))
        self.mine = self.epochs.setdefault(self.lease.epoch, [])
        assert len(self.mine) == self.lease.length

    def write(self, *events: Event) -> None:
        stamped = [event.stamped(len(self.mine) + n, 0) for n, event in enumerate(events, 1)]
        # Known before it is written: a reader may see it as soon as it is.
        self.mine += stamped
        try:
            self.go(self.log.append(self.lease, stamped))
        except LogLost:
            self.go(self.log.restore(self.lease, self.run, self.mine))

    def running(self) -> bool:
        return not self.over

    @precondition(running)
    @rule(pieces=st.integers(1, 4))
    def the_worker_writes(self, pieces: int) -> None:
        self.write(*(content(f"{self.lease.attempt}.{len(self.mine) + n} ") for n in range(pieces)))

    @precondition(running)
    @rule()
    def the_worker_dies_and_another_attempt_begins(self) -> None:
        self.claim()
        self.write(Event(EventType.RESET, {"reason": "worker_lost", "attempt": self.lease.attempt}))

    @precondition(running)
    @rule()
    def the_worker_ends(self) -> None:
        self.write(content("."), done())
        self.over = True
        text = Transcript.of(self.mine).content
        self.epochs["stored"] = [content(text).stamped(1, 0), done().stamped(2, 0)]

    # --- the server and the network -------------------------------------------------------------

    @rule()
    def the_log_is_lost(self) -> None:
        self.go(self.log.forget(self.run.id))

    @rule(away=st.booleans())
    def the_log_goes_away_or_comes_back(self, away: bool) -> None:
        self.log.away = away

    @rule()
    def the_connection_breaks(self) -> None:
        self.do(self.push.sever)

    @rule()
    def the_connection_is_made_again(self) -> None:
        self.do(self.push.mend)

    def under_way(self) -> bool:
        return bool(self.push.mail)

    @precondition(under_way)
    @rule(count=st.integers(1, 5))
    def messages_arrive(self, count: int) -> None:
        self.do(lambda: self.push.deliver(count))

    @precondition(under_way)
    @rule(which=st.integers(0, 50))
    def a_message_arrives_before_its_turn_or_twice(self, which: int) -> None:
        self.do(lambda: self.push.hand_over(self.push.mail[which % len(self.push.mail)]))

    @precondition(under_way)
    @rule(which=st.integers(0, 50))
    def a_message_is_lost(self, which: int) -> None:
        del self.push.mail[which % len(self.push.mail)]

    @precondition(under_way)
    @rule(which=st.integers(0, 50))
    def a_message_is_late(self, which: int) -> None:
        self.push.mail.append(self.push.mail.pop(which % len(self.push.mail)))

    @rule(seconds=st.sampled_from([0.05, 1.0, 6.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.go(asyncio.sleep(seconds))

    # --- the readers ----------------------------------------------------------------------------

    @precondition(lambda self: len(self.readers) < 8)
    @rule()
    def a_reader_joins(self) -> None:
        self.join(None)

    @precondition(lambda self: len(self.readers) < 8)
    @rule(data=st.data())
    def a_reader_joins_with_a_cursor(self, data: st.DataObject) -> None:
        epoch = data.draw(st.sampled_from([*self.epochs, "unheard0of"]))
        self.join(Cursor(epoch, data.draw(st.integers(0, len(self.epochs.get(epoch, [])) + 2))))

    def join(self, after: Cursor | None) -> None:
        subscription = self.do(lambda: self.hub.subscribe(self.run.id, after))
        self.readers.append(Reader(self, subscription, after))

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 7), batches=st.integers(1, 4))
    def a_reader_reads(self, which: int, batches: int) -> None:
        reader = self.readers[which % len(self.readers)]
        for _ in range(batches):
            self.read(reader, 0.01)

    def read(self, reader: Reader, patience: float) -> None:
        async def next_() -> Batch | None:
            return await reader.subscription.next()

        if reader.waiting is None:
            reader.waiting = self.loop.create_task(next_())
        waiting = reader.waiting
        self.go(asyncio.wait([waiting], timeout=patience))
        if waiting.done():
            reader.waiting = None
            reader.see(waiting.result())

    @rule(slow=st.booleans())
    def reads_take_long_or_end(self, slow: bool) -> None:
        """What was read is on its way while all else goes on."""
        if slow:
            self.log.gate.clear()
        else:
            self.do(self.log.gate.set)

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 7))
    def a_reader_loses_patience(self, which: int) -> None:
        self.give_up(self.readers[which % len(self.readers)])

    def give_up(self, reader: Reader) -> None:
        """Cancel its `next`; what that had already is still given."""
        waiting, reader.waiting = reader.waiting, None
        if waiting is not None:
            waiting.cancel()
            self.go(asyncio.wait([waiting]))
            if not waiting.cancelled():
                reader.see(waiting.result())

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 7))
    def a_reader_leaves_and_returns(self, which: int) -> None:
        reader = self.readers[which % len(self.readers)]

        self.give_up(reader)

        def return_() -> Subscription:
            reader.subscription.close()
            return self.hub.subscribe(self.run.id, Cursor(reader.epoch, reader.seq) if reader.seq else None)

        reader.subscription = self.do(return_)
        # Past the end of a log that is lost by now, it is given the stored answer anew.
        reader.ended = reader.over = False

    @invariant()
    def no_reader_hoards(self) -> None:
        for reader in self.readers:
            pending = reader.subscription._pending
            assert sum(batch.size for batch in pending) == reader.subscription._pending_bytes <= MAX_PENDING

    # --- in the end -----------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.log.away = False
            self.push.holding = False
            self.do(self.log.gate.set)
            if not self.over:
                self.the_worker_ends()
            self.do(lambda: self.push.deliver(len(self.push.mail)))
            for reader in self.readers:
                self.read_to_the_end(reader)
            assert self.push.followed == []
        finally:
            for reader in self.readers:
                if reader.waiting is not None:
                    reader.waiting.cancel()
            self.go(self.hub.stop())
            self.loop.close()

    def read_to_the_end(self, reader: Reader) -> None:
        for _ in range(200):
            if reader.over:
                break
            # The connection may never come back: the watchdog must do.
            self.read(reader, 20.0)
        assert reader.over, "the stream has no end"
        assert not reader.subscription.drained
        if reader.shown is None:
            # It joined in the middle, and what it was given from there was checked as it came.
            assert reader.seq >= len(self.epochs[reader.epoch])
            return
        transcript = Transcript.of(reader.shown)
        assert [event.terminal for event in reader.shown].count(True) == 1
        assert transcript.end is not None
        assert transcript.content == self.epochs["stored"][0].data["text"]


@pytest.mark.timeout(900)
def test_every_reader_sees_every_event_once_and_in_order_whatever_happens() -> None:
    run_state_machine_as_test(
        HubModel,
        settings=settings(
            max_examples=40,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
