"""The hub over a log in memory whose push can be as bad as a network's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from headwater.events import Cursor, Event
from headwater.hub import Batch, Hub, Subscription
from headwater.hub.hub import PAGE
from headwater.runs import Lease, Run
from headwater.streams.base import Page
from headwater.telemetry import Telemetry
from support.rough import RoughLog
from support.streams import end, new_run, numbered, seqs
from support.wait import eventually


class Scene:
    """A hub, its log and one run that a worker holds."""

    def __init__(self, hub: Hub, log: RoughLog, telemetry: Telemetry) -> None:
        self.hub = hub
        self.log = log
        self.push = log.push
        self.telemetry = telemetry
        self.run: Run = new_run()
        self.lease: Lease

    async def begin(self) -> Scene:
        self.lease = await self.log.claim(self.run, "worker")
        return self

    async def write(self, first: int, last: int) -> None:
        await self.log.append(self.lease, numbered(first, last))

    async def finish(self, seq: int) -> None:
        await self.log.append(self.lease, [end(seq)])

    def join(self, after: int | None = None, epoch: str | None = None) -> Subscription:
        cursor = None if after is None else Cursor(epoch or self.lease.epoch, after)
        return self.hub.subscribe(self.run.id, cursor)

    async def live(self, after: int | None = None) -> Subscription:
        """A reader that has caught up with what is written."""
        reader = self.join(after)
        meta = await self.log.meta(self.run.id)
        assert meta is not None
        if meta.count > (after or 0):
            await take(reader, meta.count)
        await eventually(lambda: self.hub._channels[self.run.id].confirmed)
        await nothing(reader)
        return reader


@asynccontextmanager
async def a_scene(**settings: object) -> AsyncIterator[Scene]:
    log, telemetry = RoughLog(), Telemetry()
    hub = Hub(log, **{"history": None, "telemetry": telemetry, "watchdog": 60.0, "heartbeat": 15.0, **settings})  # type: ignore[arg-type]
    await hub.start()
    try:
        yield await Scene(hub, log, telemetry).begin()
    finally:
        log.gate.set()
        await hub.stop()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with a_scene() as scene:
        yield scene


async def take(reader: Subscription, last: int) -> list[Event]:
    """Events up to seq `last`; fails at a reset or an early end."""
    events: list[Event] = []
    while not events or events[-1].seq < last:
        batch = await asyncio.wait_for(reader.next(), 60)
        assert batch is not None
        assert not batch.reset
        events += batch.events
    return events


async def rest(reader: Subscription) -> list[Event]:
    """Events to the end of the stream."""
    events: list[Event] = []
    while (batch := await asyncio.wait_for(reader.next(), 60)) is not None:
        assert not batch.reset
        events += batch.events
    return events


async def nothing(reader: Subscription) -> None:
    """There is nothing to be had now."""
    waiting = asyncio.ensure_future(reader.next())
    await eventually(lambda: waiting.done() or (reader._waiter is not None and not reader._behind))
    assert not waiting.done()
    waiting.cancel()


class TestReading:
    async def test_a_reader_gets_what_is_written_and_the_end(self, scene: Scene) -> None:
        await scene.write(1, 3)
        reader = scene.join()
        assert seqs(await take(reader, 3)) == [1, 2, 3]
        await scene.write(4, 4)
        await scene.finish(5)
        assert seqs(await rest(reader)) == [4, 5]
        assert await reader.next() is None
        assert not reader.drained

    async def test_two_that_join_at_the_same_moment_both_get_everything(self, scene: Scene) -> None:
        await scene.write(1, 2)
        one, two = scene.join(), scene.join()
        await scene.write(3, 4)
        await scene.finish(5)
        assert seqs(await rest(one)) == seqs(await rest(two)) == [1, 2, 3, 4, 5]

    async def test_live_readers_share_a_batch_and_its_encoding(self, scene: Scene) -> None:
        one, two = await scene.live(), await scene.live()
        await scene.write(1, 2)
        first, second = await one.next(), await two.next()
        assert first is second
        assert first is not None
        encoded: list[Batch] = []

        def encode(batch: Batch) -> bytes:
            encoded.append(batch)
            return b"frame"

        assert first.encoded("native", encode) is first.encoded("native", encode)
        assert first.encoded("other", encode) == b"frame"
        assert len(encoded) == 2

    async def test_a_live_reader_does_not_read_the_log(self, scene: Scene) -> None:
        reader = await scene.live()
        reads = len(scene.log.reads)
        for seq in range(1, 20):
            await scene.write(seq, seq)
        await scene.finish(20)
        assert len(await rest(reader)) == 20
        assert len(scene.log.reads) == reads

    @pytest.mark.parametrize("after", range(7))
    @pytest.mark.parametrize("written", range(7))
    async def test_a_reader_goes_on_after_its_cursor_wherever_batches_begin(
        self, scene: Scene, written: int, after: int
    ) -> None:
        after = min(after, written)
        if written:
            await scene.write(1, written)
        scene.log.gate.clear()
        reader = scene.join(after)
        following = asyncio.ensure_future(rest(reader))
        await eventually(lambda: scene.log.reads)
        # Pushed while the page is under way, as one batch that begins before and ends after the page.
        events = [*numbered(1, 6), end(7)]
        await scene.log.append(scene.lease, events[written:])
        for first in range(1, 8):
            scene.hub._channels[scene.run.id].published(Batch(scene.lease.epoch, events[first - 1 :]))
        scene.log.gate.set()
        assert seqs(await following) == list(range(after + 1, 8))

    async def test_a_long_log_is_read_page_by_page_while_it_grows(self, scene: Scene) -> None:
        await scene.write(1, PAGE * 2 + 10)
        reader = scene.join()
        first = await reader.next()
        assert first is not None
        assert seqs(first.events) == list(range(1, PAGE + 1))
        await scene.write(PAGE * 2 + 11, PAGE * 2 + 20)
        await scene.finish(PAGE * 2 + 21)
        assert seqs(await rest(reader)) == list(range(PAGE + 1, PAGE * 2 + 22))

    async def test_what_is_written_before_the_subscription_stands_is_not_missed(self, scene: Scene) -> None:
        scene.push.holding = True
        reader = scene.join()
        await scene.write(1, 2)
        await asyncio.sleep(0)
        scene.push.mail = [message for message in scene.push.mail if message[0] == "subscribed"]
        assert scene.log.reads == []
        scene.push.deliver()
        assert seqs(await take(reader, 2)) == [1, 2]

    async def test_one_that_joins_others_gets_what_they_had_before(self, scene: Scene) -> None:
        await scene.write(1, 3)
        await scene.live()
        assert seqs(await take(scene.join(), 3)) == [1, 2, 3]

    async def test_a_run_nobody_knows_yet_is_waited_for(self, scene: Scene) -> None:
        run = new_run()
        reader = scene.hub.subscribe(run.id, None)
        await eventually(lambda: scene.push.followed == [run.id])
        await nothing(reader)
        lease = await scene.log.claim(run, "worker")
        await scene.log.append(lease, [*numbered(1, 2), end(3)])
        assert seqs(await rest(reader)) == [1, 2, 3]

    async def test_a_next_that_is_cancelled_loses_nothing(self, scene: Scene) -> None:
        await scene.write(1, 3)
        scene.log.gate.clear()
        reader = scene.join()
        for _ in range(3):
            scene.log.reads.clear()
            waiting = asyncio.ensure_future(reader.next())
            await eventually(lambda: scene.log.reads)
            waiting.cancel()
            await asyncio.wait([waiting])
        scene.log.gate.set()
        assert seqs(await take(reader, 3)) == [1, 2, 3]


class TestHoles:
    async def test_a_lost_message_is_read_from_the_log(self, scene: Scene) -> None:
        reader = await scene.live()
        scene.push.holding = True
        for seq in (1, 2, 3):
            await scene.write(seq, seq)
        await eventually(lambda: len(scene.push.mail) == 3)
        del scene.push.mail[1]
        scene.push.deliver(2)
        assert seqs(await take(reader, 3)) == [1, 2, 3]

    async def test_repeated_and_late_messages_are_seen_once(self, scene: Scene) -> None:
        reader = await scene.live()
        scene.push.holding = True
        for seq in range(1, 6):
            await scene.write(seq, seq)
        await eventually(lambda: len(scene.push.mail) == 5)
        one, two, three, four, five = scene.push.mail
        for message in (one, one, three, two, five, four, one, five):
            scene.push.hand_over(message)
        scene.push.mail.clear()
        assert seqs(await take(reader, 5)) == [1, 2, 3, 4, 5]
        await nothing(reader)

    async def test_a_lost_last_message_is_found_by_the_watchdog(self) -> None:
        async with a_scene(watchdog=0.05) as scene:
            reader = await scene.live()
            scene.push.connected = False
            await scene.write(1, 2)
            await scene.finish(3)
            assert seqs(await rest(reader)) == [1, 2, 3]

    async def test_without_any_confirmation_the_watchdog_lets_readers_read(self) -> None:
        async with a_scene(watchdog=0.05) as scene:
            scene.push.connected = False
            await scene.write(1, 2)
            reader = scene.join()
            assert seqs(await take(reader, 2)) == [1, 2]

    async def test_a_connection_that_is_made_again_brings_what_was_missed(self, scene: Scene) -> None:
        reader = await scene.live()
        await scene.write(1, 1)
        assert seqs(await take(reader, 1)) == [1]
        scene.push.sever()
        await scene.write(2, 4)
        scene.push.mend()
        assert seqs(await take(reader, 4)) == [2, 3, 4]
        await scene.finish(5)
        assert seqs(await rest(reader)) == [5]

    async def test_what_is_said_during_a_read_leads_to_a_further_one(self, scene: Scene) -> None:
        await scene.write(1, 2)
        scene.log.gate.clear()
        reader = scene.join()
        following = asyncio.ensure_future(take(reader, 3))
        await eventually(lambda: scene.log.reads)
        # The page is on its way without it, its message is lost, and the connection was made again before.
        scene.push.sever()
        await scene.write(3, 3)
        scene.push.mend()
        await eventually(lambda: scene.hub._channels[scene.run.id].confirmed)
        scene.log.gate.set()
        assert seqs(await following) == [1, 2, 3]

    async def test_a_confirmation_of_an_earlier_subscription_hides_nothing(self, scene: Scene) -> None:
        scene.push.holding = True
        first = scene.join()
        await eventually(lambda: len(scene.push.mail) == 1)
        first.close()
        reader = scene.join()
        await eventually(lambda: len(scene.push.mail) == 2)
        scene.push.deliver()
        await nothing(reader)
        # Between the two confirmations the server has no subscription of ours.
        await scene.write(1, 2)
        await eventually(lambda: len(scene.push.mail) == 2)
        scene.push.mail.pop()
        scene.push.deliver()
        assert seqs(await take(reader, 2)) == [1, 2]


class TestSlowReaders:
    async def test_one_that_does_not_read_holds_a_bounded_buffer_and_still_gets_everything(self) -> None:
        async with a_scene(max_pending=2_000) as scene:
            slow, quick = await scene.live(), await scene.live()
            seen: list[Event] = []
            for seq in range(1, 1_001):
                await scene.write(seq, seq)
                seen += await take(quick, seq)
                assert slow._pending_bytes <= 2_000
                assert slow._pending_bytes == sum(batch.size for batch in slow._pending)
            await scene.finish(1_001)
            assert seqs(seen) == list(range(1, 1_001))
            assert seqs(await rest(slow)) == list(range(1, 1_002))
            assert seqs(await rest(quick)) == [1_001]

    async def test_what_is_larger_than_the_buffer_is_read_from_the_log(self) -> None:
        async with a_scene(max_pending=10) as scene:
            reader = await scene.live()
            await scene.write(1, 50)
            await scene.finish(51)
            assert seqs(await rest(reader)) == list(range(1, 52))


class Stored:
    """A history with one run."""

    def __init__(self, run_id: str, events: list[Event]) -> None:
        self._run_id = run_id
        self._events = events

    async def page(self, run_id: str) -> Page | None:
        return Page("stored", self._events, len(self._events), True) if run_id == self._run_id else None


class TestEndsAndLosses:
    async def test_at_the_end_of_a_closed_log_the_stream_ends_at_once(self, scene: Scene) -> None:
        await scene.write(1, 2)
        await scene.finish(3)
        assert await rest(scene.join(3)) == []
        assert await rest(scene.join(7)) == []
        assert seqs(await rest(scene.join(2))) == [3]

    async def test_a_cursor_of_another_epoch_is_told_and_gets_all(self, scene: Scene) -> None:
        await scene.write(1, 3)
        reader = scene.join(2, epoch="gone")
        reset = await reader.next()
        assert reset is not None
        assert (reset.reset, reset.epoch, list(reset.events)) == (True, scene.lease.epoch, [])
        assert seqs(await take(reader, 3)) == [1, 2, 3]

    async def test_a_cursor_of_another_epoch_that_has_seen_nothing_needs_no_reset(self, scene: Scene) -> None:
        await scene.write(1, 3)
        assert seqs(await take(scene.join(0, epoch="gone"), 3)) == [1, 2, 3]

    async def test_a_cursor_beyond_the_end_of_an_open_log_is_told_and_gets_all(self, scene: Scene) -> None:
        await scene.write(1, 3)
        reader = scene.join(5)
        reset = await reader.next()
        assert reset is not None
        assert (reset.reset, reset.epoch) == (True, scene.lease.epoch)
        assert seqs(await take(reader, 3)) == [1, 2, 3]

    async def test_a_log_that_is_lost_and_restored_goes_on_without_a_trace(self, scene: Scene) -> None:
        reader = await scene.live()
        await scene.write(1, 3)
        await take(reader, 3)
        await scene.log.forget(scene.run.id)
        await scene.log.restore(scene.lease, scene.run, numbered(1, 5))
        await scene.finish(6)
        assert seqs(await rest(reader)) == [4, 5, 6]

    async def test_what_was_restored_is_read_though_nothing_follows(self, scene: Scene) -> None:
        reader = await scene.live()
        await scene.write(1, 3)
        await take(reader, 3)
        await scene.log.forget(scene.run.id)
        await scene.log.restore(scene.lease, scene.run, numbered(1, 5))
        assert seqs(await take(reader, 5)) == [4, 5]

    async def test_a_log_that_is_lost_and_begun_again_is_said(self, scene: Scene) -> None:
        reader = await scene.live()
        await scene.write(1, 3)
        await take(reader, 3)
        await scene.log.forget(scene.run.id)
        scene.lease = await scene.log.claim(scene.run, "another")
        await scene.write(1, 5)
        reset = await reader.next()
        assert reset is not None
        assert (reset.reset, reset.epoch) == (True, scene.lease.epoch)
        await scene.finish(6)
        assert seqs(await rest(reader)) == [1, 2, 3, 4, 5, 6]

    async def test_while_a_log_begun_again_is_empty_what_is_shown_stands(self) -> None:
        async with a_scene(watchdog=0.02) as scene:
            reader = await scene.live()
            await scene.write(1, 3)
            await take(reader, 3)
            await scene.log.forget(scene.run.id)
            await scene.log.open(scene.run, 60)
            waiting = asyncio.ensure_future(reader.next())
            reads = len(scene.log.reads)
            await eventually(lambda: len(scene.log.reads) > reads + 1)
            assert not waiting.done()
            await scene.log.restore(scene.lease, scene.run, numbered(1, 4))
            batch = await waiting
            assert batch is not None
            assert (batch.reset, seqs(batch.events)) == (False, [4])

    async def test_an_expired_log_is_served_from_the_history(self) -> None:
        run = new_run()
        async with a_scene(history=Stored(run.id, [*numbered(1, 3), end(4)])) as scene:
            assert seqs(await rest(scene.hub.subscribe(run.id, None))) == [1, 2, 3, 4]
            assert seqs(await rest(scene.hub.subscribe(run.id, Cursor("stored", 2)))) == [3, 4]
            assert await rest(scene.hub.subscribe(run.id, Cursor("stored", 4))) == []
            reader = scene.hub.subscribe(run.id, Cursor("expired", 2))
            reset = await reader.next()
            assert reset is not None
            assert (reset.reset, reset.epoch) == (True, "stored")
            assert seqs(await rest(reader)) == [1, 2, 3, 4]
            assert scene.push.followed == []

    async def test_a_reader_whose_log_vanished_gets_the_stored_end(self) -> None:
        run = new_run()
        async with a_scene(history=Stored(run.id, [*numbered(1, 3), end(4)]), watchdog=0.02) as scene:
            lease = await scene.log.claim(run, "worker")
            reader = scene.hub.subscribe(run.id, None)
            await scene.log.append(lease, numbered(1, 2))
            await take(reader, 2)
            await scene.log.forget(run.id)
            reset = await reader.next()
            assert reset is not None
            assert reset.reset
            assert seqs(await rest(reader)) == [1, 2, 3, 4]

    async def test_while_the_log_is_away_readers_wait_and_then_go_on(self) -> None:
        async with a_scene(heartbeat=0.1) as scene:
            await scene.write(1, 2)
            scene.log.away = True
            reader = scene.join()
            beat = await asyncio.wait_for(reader.next(), 60)
            assert beat is not None
            assert (list(beat.events), beat.reset) == ([], False)
            scene.log.away = False
            assert seqs(await take(reader, 2)) == [1, 2]


class TestLife:
    async def test_a_quiet_stream_gives_a_sign_of_life(self) -> None:
        async with a_scene(heartbeat=0.05) as scene:
            reader = await scene.live()
            for _ in range(3):
                beat = await asyncio.wait_for(reader.next(), 60)
                assert beat is not None
                assert (list(beat.events), beat.reset) == ([], False)
            await scene.finish(1)
            assert [event.seq for event in await rest(reader)] == [1]

    async def test_a_reader_that_leaves_is_woken_and_its_run_no_longer_followed(self, scene: Scene) -> None:
        reader, other = await scene.live(), await scene.live()
        waiting = asyncio.ensure_future(reader.next())
        await eventually(lambda: reader._waiter is not None)
        reader.close()
        assert await waiting is None
        assert not reader.drained
        assert scene.push.followed == [scene.run.id]
        other.close()
        other.close()
        assert scene.push.followed == []
        assert scene.telemetry.registry.get_sample_value("headwater_readers") == 0

    async def test_one_that_leaves_and_returns_at_once_misses_nothing(self, scene: Scene) -> None:
        reader = await scene.live()
        await scene.write(1, 2)
        await take(reader, 2)
        reader.close()
        again = scene.join(2)
        await scene.write(3, 4)
        await scene.finish(5)
        assert seqs(await rest(again)) == [3, 4, 5]
        assert scene.push.followed == []

    async def test_a_hub_that_drains_ends_its_streams_and_says_why(self, scene: Scene) -> None:
        reader = await scene.live()
        waiting = asyncio.ensure_future(reader.next())
        await eventually(lambda: reader._waiter is not None)
        await scene.hub.drain()
        assert await waiting is None
        assert reader.drained
        late = scene.join()
        assert await late.next() is None
        assert late.drained

    async def test_an_ended_stream_is_not_called_drained(self, scene: Scene) -> None:
        reader = scene.join()
        await scene.finish(1)
        assert seqs(await rest(reader)) == [1]
        await scene.hub.drain()
        assert not reader.drained

    async def test_before_the_start_nobody_can_subscribe(self) -> None:
        hub = Hub(RoughLog(), history=None, telemetry=Telemetry())
        with pytest.raises(RuntimeError):
            hub.subscribe(new_run().id, None)

    async def test_reads_are_counted_with_their_reason(self, scene: Scene) -> None:
        counted: list[str] = []

        def listener(name: str, _: float, labels: dict[str, str]) -> None:
            if name == "headwater_hub_rereads_total":
                counted.append(labels["reason"])

        scene.telemetry.listen(listener)
        reader = await scene.live()
        scene.push.sever()
        await scene.write(1, 1)
        scene.push.mend()
        await take(reader, 1)
        assert counted == ["join", "join"]
