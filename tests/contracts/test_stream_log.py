"""What every StreamLog does, over all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from headwater.errors import Fenced, LeaseHeld, LogClosed, LogLost
from headwater.events import Cursor, Event, EventType
from headwater.runs import RunState
from headwater.streams.base import PAGE_BYTES, Appended, Renewed, StreamLog
from support.streams import MemoryWorld, PackedWorld, RedisWorld, World, end, new_run, numbered, seqs, texts

#: Seconds; short enough to wait for on a real server.
SHORT = 0.05


@pytest.fixture(params=["memory", "redis", "packed"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    world: World
    if request.param == "memory":
        world = MemoryWorld()
    else:
        kind = RedisWorld if request.param == "redis" else PackedWorld
        world = kind(request.getfixturevalue("redis_url"))
    yield world
    await world.close()


@pytest.fixture
def log(world: World) -> StreamLog:
    return world.log


class TestClaim:
    async def test_the_first_claim_is_attempt_one_of_a_new_log(self, log: StreamLog) -> None:
        lease = await log.claim(new_run(), "worker")
        assert (lease.attempt, lease.length, lease.holder, lease.cancelled) == (1, 0, "worker", False)
        assert Cursor.parse(f"{lease.epoch}-0").epoch == lease.epoch

    async def test_it_keeps_the_epoch_of_an_announced_run(self, log: StreamLog) -> None:
        run = new_run()
        await log.open(run, 10)
        announced = await log.meta(run.id)
        assert announced is not None
        assert (await log.claim(run, "worker")).epoch == announced.epoch

    async def test_the_attempt_is_above_the_one_of_the_run(self, log: StreamLog) -> None:
        assert (await log.claim(new_run(attempt=4), "worker")).attempt == 5

    async def test_the_attempt_is_above_the_one_of_the_log(self, log: StreamLog) -> None:
        run = new_run()
        await log.release(await log.claim(run, "one"))
        assert (await log.claim(run, "two")).attempt == 2

    async def test_a_held_run_is_refused_to_others(self, log: StreamLog) -> None:
        run = new_run()
        await log.claim(run, "one")
        with pytest.raises(LeaseHeld) as refused:
            await log.claim(run, "two")
        assert 0 < refused.value.extra["left"] <= 10_000

    async def test_the_holder_that_asks_again_gets_the_same_attempt(self, log: StreamLog) -> None:
        # The reply was lost: nobody has worked on it or died in between.
        run = new_run()
        first = await log.claim(run, "one")
        assert await log.claim(run, "one") == first
        await log.append(first, numbered(1, 1))
        with pytest.raises(LeaseHeld):
            await log.claim(run, "two")

    async def test_the_holder_that_asks_again_after_its_lease_gets_a_further_attempt(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        first = await log.claim(run, "one")
        await world.lease_runs_out(run.id)
        second = await log.claim(run, "one")
        assert (second.attempt, second.epoch) == (2, first.epoch)
        with pytest.raises(Fenced):
            await log.append(first, numbered(1, 1))

    async def test_the_holder_that_asks_again_for_a_run_of_a_later_attempt_gets_one_above_it(
        self, log: StreamLog
    ) -> None:
        run = new_run()
        await log.claim(run, "one")
        assert (await log.claim(replace(run, attempt=4), "one")).attempt == 5

    async def test_a_lease_that_ran_out_is_taken_over_where_it_stood(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        first = await log.claim(run, "one")
        await log.append(first, numbered(1, 3))
        await world.lease_runs_out(run.id)
        second = await log.claim(run, "two")
        assert (second.attempt, second.epoch, second.length) == (2, first.epoch, 3)

    async def test_of_many_at_once_exactly_one_gets_it(self, world: World) -> None:
        run = new_run()
        logs = [world.another() for _ in range(8)]
        claims = await asyncio.gather(
            *(log.claim(run, f"worker {n}") for n, log in enumerate(logs)), return_exceptions=True
        )
        assert sorted(type(claim).__name__ for claim in claims) == ["Lease", *["LeaseHeld"] * 7]

    async def test_an_ended_run_is_refused(self, log: StreamLog) -> None:
        run = new_run()
        await log.append(await log.claim(run, "one"), [end(1)])
        with pytest.raises(LogClosed):
            await log.claim(run, "one")


class TestAppend:
    async def test_events_are_read_as_they_were_written(self, world: World) -> None:
        run = new_run()
        lease = await world.log.claim(run, "worker")
        written = texts(1, "Grüße", "\n\n", "\N{GRINNING FACE}", '"\\', "\x00")
        assert await world.log.append(lease, written[:2]) == Appended(2, False)
        assert await world.log.append(lease, written[2:]) == Appended(5, False)
        assert await world.events(run.id) == written
        assert [event.encode() for event in await world.events(run.id)] == [event.encode() for event in written]

    async def test_it_extends_the_lease(self, world: World) -> None:
        run = new_run()
        lease = await world.another(lease_seconds=1).claim(run, "worker")
        await world.log.append(lease, numbered(1, 1))
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert meta.lease_left > 1_000

    async def test_so_does_one_that_is_repeated(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        lease = await log.claim(run, "worker")
        await log.append(lease, numbered(1, 1))
        await world.lease_runs_out(run.id)
        await world.log.append(lease, numbered(1, 1))
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert meta.lease_left > 1_000
        await world.log.append(lease, [end(2)])
        assert (await world.log.append(lease, [end(2)])).count == 2
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert meta.lease_left == 0

    async def test_each_one_counts_at_once_for_whoever_asks(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        for seq in (3, 4):
            await world.log.append(lease, numbered(seq, seq))
            asked, cancelled = await world.log.meta(run.id), await world.log.cancel(run.id)
            assert asked is not None
            assert cancelled is not None
            assert (asked.count, cancelled.count) == (seq, seq)

    async def test_repeated_it_counts_once(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 3)
        assert await world.log.append(lease, numbered(2, 3)) == Appended(3, False)
        assert seqs(await world.events(run.id)) == [1, 2, 3]

    async def test_repeated_with_more_it_writes_the_rest(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 3)
        assert await world.log.append(lease, numbered(2, 6)) == Appended(6, False)
        assert await world.events(run.id) == numbered(1, 6)

    async def test_something_else_at_a_place_that_is_taken_is_refused(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 3)
        with pytest.raises(Fenced):
            await world.log.append(lease, numbered(2, 4, "other"))
        assert await world.events(run.id) == numbered(1, 3)

    async def test_an_older_attempt_is_fenced(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        zombie = await log.claim(run, "one")
        await world.lease_runs_out(run.id)
        await log.claim(run, "two")
        with pytest.raises(Fenced):
            await log.append(zombie, numbered(1, 1))
        assert await world.events(run.id) == []

    async def test_a_holder_whose_lease_ran_out_goes_on_while_nobody_else_took_it(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        lease = await log.claim(run, "one")
        await world.lease_runs_out(run.id)
        assert (await log.append(lease, numbered(1, 1))).count == 1

    async def test_a_place_beyond_the_end_means_a_lost_tail(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 5)
        await world.lose_tail(run.id, 3)
        with pytest.raises(LogLost):
            await world.log.append(lease, numbered(6, 6))

    async def test_without_a_log_it_is_lost(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 1)
        await world.log.forget(run.id)
        with pytest.raises(LogLost):
            await world.log.append(lease, numbered(2, 2))

    async def test_the_same_attempt_number_in_other_hands_after_a_loss_is_fenced(self, world: World) -> None:
        run = new_run()
        zombie = await world.written(run, 2, "one")
        await world.log.forget(run.id)
        heir = await world.log.claim(run, "two")
        assert heir.attempt == zombie.attempt
        with pytest.raises(Fenced):
            await world.log.append(zombie, numbered(1, 2))

    @pytest.mark.parametrize(
        ("event", "state"),
        [
            (EventType.DONE, RunState.DONE),
            (EventType.ERROR, RunState.FAILED),
            (EventType.CANCELLED, RunState.CANCELLED),
        ],
    )
    async def test_a_terminal_event_closes_the_log_and_gives_up_the_lease(
        self, world: World, event: EventType, state: RunState
    ) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.append(lease, [*numbered(3, 3), end(4, Event(event, {}))])
        meta = await world.log.meta(run.id)
        page = await world.log.read(run.id, 0, 10)
        assert meta is not None
        assert page is not None
        assert (meta.status, meta.count, meta.lease_left) == (state, 4, 0)
        assert (page.closed, seqs(page.events)) == (True, [1, 2, 3, 4])

    async def test_a_closed_log_takes_the_same_end_again_and_nothing_else(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.append(lease, [end(3)])
        assert (await world.log.append(lease, [end(3)])).count == 3
        with pytest.raises(LogClosed):
            await world.log.append(lease, numbered(4, 4))
        assert seqs(await world.events(run.id)) == [1, 2, 3]

    async def test_two_workers_that_race_leave_a_dense_log_in_which_the_later_attempt_wins(self, world: World) -> None:
        one, two = world.another(lease_seconds=SHORT), world.another()
        run = new_run()
        zombie = await one.claim(run, "one")
        await world.lease_runs_out(run.id)

        async def write(log: StreamLog, name: str) -> int:
            """Append event by event from where the log stands, until the run is somebody else's."""
            lease = zombie if name == "one" else await two.claim(run, "two")
            seq = lease.length
            try:
                for _ in range(50):
                    await log.append(lease, numbered(seq + 1, seq + 1, f"{lease.attempt}:"))
                    seq += 1
            except Fenced:
                pass
            return lease.attempt

        attempts = await asyncio.gather(write(one, "one"), write(two, "two"), return_exceptions=True)
        if isinstance(attempts[1], LeaseHeld):
            # The first got in before and renewed its lease by it: then all of it is the first's.
            assert await world.events(run.id) == numbered(1, 50, "1:")
            return
        events = await world.events(run.id)
        assert seqs(events) == list(range(1, len(events) + 1))
        writers = [event.data["text"].split(":")[0] for event in events]
        assert writers == sorted(writers)
        assert writers[-50:] == ["2"] * 50


class TestRestore:
    async def test_a_log_that_was_lost_is_there_again_under_its_epoch(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 3)
        await world.log.forget(run.id)
        assert await world.log.restore(lease, run, numbered(1, 4)) == Appended(4, False)
        assert (await world.log.append(lease, numbered(5, 5))).count == 5
        page = await world.log.read(run.id, 0, 10)
        assert page is not None
        assert (page.epoch, page.events) == (lease.epoch, numbered(1, 5))
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert (meta.status, meta.attempt, meta.owner_id) == (RunState.RUNNING, 1, "local")
        assert meta.lease_left > 0

    async def test_a_lost_tail_is_completed(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 5)
        await world.lose_tail(run.id, 2)
        assert (await world.log.restore(lease, run, numbered(1, 6))).count == 6
        assert await world.events(run.id) == numbered(1, 6)

    async def test_the_longer_one_is_kept(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 5)
        assert (await world.log.restore(lease, run, numbered(1, 2))).count == 5
        assert await world.events(run.id) == numbered(1, 5)

    async def test_it_replaces_a_log_that_was_only_announced_again(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.forget(run.id)
        await world.log.open(new_run(id=run.id, attempt=1), 10)
        with pytest.raises(LogLost):
            await world.log.append(lease, numbered(3, 3))
        assert await world.log.renew([lease]) == [Renewed.LOST]
        await world.log.restore(lease, run, numbered(1, 3))
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert (meta.epoch, meta.count) == (lease.epoch, 3)

    async def test_it_keeps_a_cancel_that_was_asked_for_meanwhile(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.forget(run.id)
        await world.log.open(run, 10)
        await world.log.cancel(run.id)
        assert (await world.log.restore(lease, run, numbered(1, 2))).cancelled

    async def test_it_takes_the_run_back_from_a_lower_attempt(self, world: World) -> None:
        run = new_run(attempt=1)
        lease = await world.written(run, 2, "one")
        await world.log.forget(run.id)
        lower = await world.log.claim(new_run(id=run.id), "two")
        assert lower.attempt < lease.attempt
        await world.log.append(lower, numbered(1, 4, "low"))
        await world.log.restore(lease, run, numbered(1, 2))
        assert await world.events(run.id) == numbered(1, 2)
        with pytest.raises(Fenced):
            await world.log.append(lower, numbered(5, 5, "low"))

    async def test_it_takes_back_what_an_earlier_attempt_wrote_to_a_log_of_before_its_claim(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        zombie = await log.claim(run, "one")
        await log.append(zombie, numbered(1, 2))
        come_back = await world.save(run.id)
        await world.lease_runs_out(run.id)
        lease = await world.log.claim(run, "two")
        await world.log.append(lease, numbered(3, 4, "two:"))
        await come_back()
        await log.append(zombie, numbered(3, 3, "one:"))
        with pytest.raises(LogLost):
            await world.log.append(lease, numbered(5, 5, "two:"))
        written = [*numbered(1, 2), *numbered(3, 5, "two:")]
        assert (await world.log.restore(lease, run, written)).count == 5
        assert await world.events(run.id) == written
        with pytest.raises(Fenced):
            await log.append(zombie, numbered(4, 4, "one:"))

    async def test_a_higher_attempt_keeps_the_run(self, world: World) -> None:
        run = new_run()
        zombie = await world.written(run, 2, "one")
        await world.log.forget(run.id)
        await world.log.claim(new_run(id=run.id, attempt=1), "two")
        with pytest.raises(Fenced):
            await world.log.restore(zombie, run, numbered(1, 2))

    async def test_so_does_the_same_attempt_in_other_hands(self, world: World) -> None:
        run = new_run()
        zombie = await world.written(run, 2, "one")
        await world.log.forget(run.id)
        await world.log.claim(run, "two")
        with pytest.raises(Fenced):
            await world.log.restore(zombie, run, numbered(1, 2))

    async def test_a_run_that_was_handed_over_is_not_restored_by_its_former_holder(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.release(lease)
        with pytest.raises(Fenced):
            await world.log.restore(lease, run, numbered(1, 2))

    async def test_an_ended_run_is_refused(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.append(lease, [end(3)])
        with pytest.raises(LogClosed):
            await world.log.restore(lease, run, numbered(1, 4))

    async def test_with_the_terminal_event_it_closes_the_log_and_may_be_repeated(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.forget(run.id)
        for _ in range(2):
            assert (await world.log.restore(lease, run, [*numbered(1, 2), end(3)])).count == 3
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert (meta.status, meta.lease_left) == (RunState.DONE, 0)

    async def test_a_long_log_is_restored_whole(self, world: World) -> None:
        run = new_run()
        lease = await world.log.claim(run, "worker")
        await world.log.forget(run.id)
        assert (await world.log.restore(lease, run, numbered(1, 20_000))).count == 20_000
        assert seqs(await world.events(run.id)) == list(range(1, 20_001))

    async def test_a_run_without_events_yet_is_restored_too(self, world: World) -> None:
        run = new_run()
        lease = await world.log.claim(run, "worker")
        await world.log.forget(run.id)
        assert (await world.log.restore(lease, run, [])).count == 0
        assert (await world.log.append(lease, numbered(1, 1))).count == 1


class TestRenew:
    async def test_every_lease_gets_its_own_answer_in_order(self, world: World) -> None:
        log = world.log
        held, cancelled, fenced, ended, lost = [new_run() for _ in range(5)]
        leases = [await log.claim(run, "worker") for run in (held, cancelled, fenced, ended, lost)]
        await log.cancel(cancelled.id)
        await log.claim(replace(fenced, attempt=1), "worker")
        await log.append(leases[3], [end(1)])
        await log.forget(lost.id)
        assert await log.renew(leases) == [
            Renewed.HELD,
            Renewed.CANCELLED,
            Renewed.FENCED,
            Renewed.FENCED,
            Renewed.LOST,
        ]
        assert await log.renew([]) == []

    async def test_it_extends_the_lease(self, world: World) -> None:
        run = new_run()
        lease = await world.another(lease_seconds=1).claim(run, "worker")
        await world.log.renew([lease])
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert meta.lease_left > 1_000


class TestRelease:
    async def test_a_run_that_was_handed_over_is_queued_and_due_at_once(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 2)
        await world.log.release(lease)
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert (meta.status, meta.lease_left) == (RunState.QUEUED, 0)
        assert [due.run_id for due in await world.log.due(10)] == [run.id]
        heir = await world.log.claim(run, "two")
        assert (heir.attempt, heir.length, heir.epoch) == (2, 2, lease.epoch)

    async def test_its_former_holder_writes_no_more(self, world: World) -> None:
        lease = await world.written(new_run(), 2)
        await world.log.release(lease)
        with pytest.raises(Fenced):
            await world.log.append(lease, numbered(3, 3))

    async def test_a_fenced_holder_hands_nothing_over(self, world: World) -> None:
        run = new_run()
        zombie = await world.log.claim(run, "one")
        await world.log.claim(replace(run, attempt=1), "one")
        await world.log.release(zombie)
        with pytest.raises(LeaseHeld):
            await world.log.claim(run, "two")

    async def test_an_ended_or_forgotten_run_is_left_alone(self, world: World) -> None:
        run, other = new_run(), new_run()
        lease, lost = await world.log.claim(run, "worker"), await world.log.claim(other, "worker")
        await world.log.append(lease, [end(1)])
        await world.log.forget(other.id)
        await world.log.release(lease)
        await world.log.release(lost)
        meta = await world.log.meta(run.id)
        assert meta is not None
        assert meta.status is RunState.DONE
        assert await world.log.meta(other.id) is None


class TestCancel:
    async def test_a_queued_run_says_so_when_it_is_claimed(self, log: StreamLog) -> None:
        run = new_run()
        await log.open(run, 10)
        meta = await log.cancel(run.id)
        assert meta is not None
        assert (meta.cancelled, meta.status) == (True, RunState.QUEUED)
        assert (await log.claim(run, "worker")).cancelled

    async def test_a_running_run_hears_of_it_at_the_next_append(self, world: World) -> None:
        run = new_run()
        lease = await world.written(run, 1)
        await world.log.cancel(run.id)
        assert await world.log.append(lease, numbered(2, 2)) == Appended(2, True)

    async def test_an_ended_run_is_not_touched(self, world: World) -> None:
        run = new_run()
        await world.log.append(await world.log.claim(run, "worker"), [end(1)])
        meta = await world.log.cancel(run.id)
        assert meta is not None
        assert (meta.cancelled, meta.status) == (False, RunState.DONE)

    async def test_nothing_is_known_of_an_unknown_run(self, log: StreamLog) -> None:
        run = new_run()
        assert await log.cancel(run.id) is None
        assert await log.meta(run.id) is None


class TestOpen:
    async def test_a_run_is_queued_and_can_be_read_before_anybody_has_it(self, log: StreamLog) -> None:
        run = new_run(chat_id="chat-1")
        await log.open(run, 10)
        meta, page = await log.meta(run.id), await log.read(run.id, 0, 10)
        assert meta is not None
        assert page is not None
        assert (meta.status, meta.attempt, meta.count, meta.chat_id) == (RunState.QUEUED, 0, 0, "chat-1")
        assert (page.epoch, page.events, page.count, page.closed) == (meta.epoch, [], 0, False)

    async def test_opened_again_it_changes_nothing(self, world: World) -> None:
        run = new_run()
        await world.log.open(run, 10)
        queued = await world.log.meta(run.id)
        await world.log.open(run, 10)
        assert await world.log.meta(run.id) == queued
        lease = await world.written(run, 2)
        await world.log.open(run, 10)
        assert (await world.log.append(lease, [end(3)])).count == 3
        ended = await world.log.meta(run.id)
        await world.log.open(run, 10)
        assert await world.log.meta(run.id) == ended


class TestDue:
    async def test_an_announced_run_is_due_after_its_grace(self, world: World) -> None:
        now, later = new_run(input={"text": "hi"}), new_run()
        await world.log.open(now, 0)
        await world.log.open(later, 60)
        (due,) = await world.log.due(10)
        assert (due.run_id, due.run) == (now.id, now)
        assert due.meta is not None
        assert due.meta.status is RunState.QUEUED

    async def test_asking_changes_nothing_and_a_further_grace_does(self, world: World) -> None:
        run = new_run()
        await world.log.open(run, 0)
        assert len(await world.log.due(10)) == len(await world.log.due(10)) == 1
        await world.log.open(run, 60)
        assert await world.log.due(10) == []

    async def test_a_held_run_is_not_due_until_its_lease_runs_out(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        await world.log.open(run, 0)
        lease = await world.log.claim(run, "worker")
        assert await world.log.due(10) == []
        await log.append(lease, numbered(1, 1))
        await world.lease_runs_out(run.id)
        # It was claimed with a longer lease; whoever looks for what is due has to look now.
        await world.look_soon(run.id)
        (due,) = await world.log.due(10)
        assert due.run_id == run.id
        assert due.meta is not None
        assert (due.meta.status, due.meta.count) == (RunState.RUNNING, 1)

    async def test_a_lease_that_is_renewed_keeps_it_from_being_due(self, world: World) -> None:
        log, run = world.another(lease_seconds=SHORT), new_run()
        lease = await log.claim(run, "worker")
        await world.lease_runs_out(run.id)
        await world.log.renew([lease])
        assert await world.log.due(10) == []

    async def test_an_ended_run_is_never_due(self, world: World) -> None:
        run = new_run()
        await world.log.open(run, 0)
        await world.log.append(await world.log.claim(run, "worker"), [end(1)])
        await world.log.open(run, 0)
        assert await world.log.due(10) == []

    async def test_the_longest_waiting_come_first_and_no_more_than_asked(self, world: World) -> None:
        # Unlike the leases, graces below zero need no waiting for.
        runs = [new_run() for _ in range(5)]
        for n, run in enumerate(runs):
            await world.log.open(run, -n)
        assert [due.run_id for due in await world.log.due(3)] == [run.id for run in runs[:1:-1]]
        assert [due.run_id for due in await world.log.due(10)] == [run.id for run in runs[::-1]]
        assert [due.run_id for due in await world.log.due(2, 2)] == [run.id for run in runs[2:0:-1]]
        assert await world.log.due(10, 5) == []

    async def test_runs_that_are_held_or_over_do_not_hide_those_that_are_due(self, world: World) -> None:
        for n in range(20):
            run = new_run()
            await world.log.open(run, -100)
            lease = await world.log.claim(run, "worker")
            if n % 2:
                await world.log.append(lease, [end(1)])
            await world.look_soon(run.id)
        waiting = [new_run() for _ in range(3)]
        for run in waiting:
            await world.log.open(run, 0)
        assert {due.run_id for due in await world.log.due(3)} == {run.id for run in waiting}

    async def test_a_forgotten_run_is_not_due(self, world: World) -> None:
        run = new_run()
        await world.log.open(run, 0)
        await world.log.forget(run.id)
        assert await world.log.due(10) == []
        assert await world.log.read(run.id, 0, 10) is None


class TestRemind:
    async def test_a_run_that_was_lost_sight_of_is_due_again(self, log: StreamLog, world: World) -> None:
        queued, running = new_run(), new_run()
        await log.open(queued, 0)
        await world.another(lease_seconds=SHORT).claim(running, "worker")
        await world.lease_runs_out(running.id)
        for run in (queued, running):
            await world.lose_sight(run.id)
        await log.remind([queued.id, running.id], 0)
        found = {due.run_id: due for due in await log.due(10)}
        assert set(found) == {queued.id, running.id}
        assert found[queued.id].run == queued

    async def test_a_run_that_is_in_sight_stays_where_it_is(self, log: StreamLog) -> None:
        soon, later = new_run(), new_run()
        await log.open(soon, 0)
        await log.open(later, 60)
        await log.remind([soon.id, later.id], 0)
        await log.remind([soon.id, later.id], 60)
        await log.remind([], 0)
        assert [due.run_id for due in await log.due(10)] == [soon.id]


class TestReading:
    """The table of centrifuge: from where, in which log, gives what."""

    async def test_an_unknown_run_has_no_log(self, log: StreamLog) -> None:
        assert await log.read(new_run().id, 0, 10) is None

    @pytest.mark.parametrize(
        ("after", "limit", "got"),
        [
            (0, 100, [1, 2, 3, 4, 5]),
            (0, 2, [1, 2]),
            (2, 2, [3, 4]),
            (2, 100, [3, 4, 5]),
            (4, 1, [5]),
            (5, 100, []),
            (9, 100, []),
        ],
    )
    async def test_a_page_begins_after_the_position(self, world: World, after: int, limit: int, got: list[int]) -> None:
        run = new_run()
        lease = await world.written(run, 5)
        page = await world.log.read(run.id, after, limit)
        assert page is not None
        assert (seqs(page.events), page.epoch, page.count, page.closed) == (got, lease.epoch, 5, False)

    async def test_a_page_of_large_events_ends_early_but_never_without_any(self, world: World) -> None:
        run = new_run()
        large = texts(1, *("x" * (PAGE_BYTES // 4) for _ in range(10)), "y" * PAGE_BYTES * 2, "z")
        await world.log.append(await world.log.claim(run, "worker"), large)
        sizes, after = [], 0
        while (page := await world.log.read(run.id, after, 100)) is not None and page.events:
            sizes.append(len(page.events))
            after = page.events[-1].seq
        assert sizes == [4, 4, 3, 1]
        assert await world.events(run.id) == large

    async def test_a_log_that_was_begun_again_says_another_epoch(self, world: World) -> None:
        run = new_run()
        first = await world.written(run, 5)
        await world.log.forget(run.id)
        await world.written(run, 2)
        page = await world.log.read(run.id, 5, 10)
        assert page is not None
        assert page.epoch != first.epoch
        assert (page.events, page.count) == ([], 2)

    async def test_an_ended_log_is_read_until_its_ttl_and_then_gone(self, world: World) -> None:
        log, run = world.another(ttl=1), new_run()
        lease = await log.claim(run, "worker")
        await log.append(lease, [*numbered(1, 2), end(3)])
        page = await log.read(run.id, 0, 10)
        assert page is not None
        assert page.closed
        await world.ttl_runs_out(run.id)
        assert await log.read(run.id, 0, 10) is None
        assert await log.meta(run.id) is None

    async def test_many_metas_come_in_order_with_none_for_the_unknown(self, world: World) -> None:
        one, two = new_run(), new_run(owner_id="other", kind="shorts", chat_id="c")
        await world.written(one, 2)
        await world.log.open(two, 10)
        first, nothing, second = await world.log.metas([one.id, new_run().id, two.id])
        assert nothing is None
        assert first is not None
        assert second is not None
        assert (first.run_id, first.count, first.status, first.attempt) == (one.id, 2, RunState.RUNNING, 1)
        assert (second.owner_id, second.kind, second.chat_id, second.count) == ("other", "shorts", "c", 0)
        assert await world.log.metas([]) == []

    async def test_it_answers_a_ping(self, log: StreamLog) -> None:
        await log.ping()


class TestParked:
    async def test_whoever_waits_for_a_run_is_known_by_it(self, log: StreamLog) -> None:
        first, other, waiting = new_run(), new_run(), new_run()
        for run in (first, other):
            await log.open(run, 10)
        await log.park(waiting, [first.id, other.id], 10)
        await log.park(waiting, [first.id], 10)
        assert await log.parked(first.id) == [waiting]
        assert await log.parked(other.id) == [waiting]
        assert await log.parked(waiting.id) == []

    async def test_they_are_known_after_its_end_and_forgotten_with_it(self, log: StreamLog) -> None:
        first, waiting = new_run(), new_run()
        lease = await log.claim(first, "worker")
        await log.park(waiting, [first.id], 10)
        await log.append(lease, [end(1)])
        assert await log.parked(first.id) == [waiting]
        await log.forget(first.id)
        assert await log.parked(first.id) == []

    async def test_a_parked_run_is_due_after_its_grace(self, world: World) -> None:
        first, waiting = new_run(), new_run()
        await world.log.open(first, 10)
        await world.log.park(waiting, [first.id], 0)
        assert [due.run for due in await world.log.due(10)] == [waiting]
