"""The sweeper over the memory log: what it rings for, what it announces, what it mends, what it leaves alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from headwater import sweeper
from headwater.clock import FrozenClock
from headwater.errors import JournalUnavailable, LogUnavailable, StoreUnavailable
from headwater.events import content, done
from headwater.runs import Run, RunState
from headwater.service import running
from headwater.streams.base import Due
from headwater.streams.memory import MemoryStreamLog
from headwater.sweeper import Sweeper
from headwater.telemetry import Telemetry
from support.runs import new_run
from support.wait import eventually

GRACE = 15.0


class Yard:
    """A log, rows, and a sweeper between them."""

    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.log = MemoryStreamLog(ttl=3600, lease_seconds=10, clock=self.clock)
        self.rows: list[Run] = []
        self.rows_away = False
        self.enqueued: list[str] = []
        self.repaired: list[str] = []
        self.cancelled: list[str] = []
        self.repair_error: Exception | None = None
        self.cancel_error: Exception | None = None
        self.telemetry = Telemetry()
        self.actions: list[str] = []
        self.telemetry.listen(lambda name, value, labels: self.actions.append(labels["action"]))
        self.sweeper = self.new_sweeper()

    def new_sweeper(self, every: float = 0.001) -> Sweeper:
        return Sweeper(
            self.log,
            unfinished=self.unfinished,
            enqueue=lambda run: self.enqueued.append(run.id),
            repair=self.repair,
            cancel=self.cancel,
            clock=self.clock,
            telemetry=self.telemetry,
            grace=GRACE,
            every=every,
        )

    async def unfinished(self, skip: int) -> Sequence[Run]:
        if self.rows_away:
            raise StoreUnavailable("away")
        return self.rows[skip : skip + sweeper.BATCH]

    async def repair(self, run: Run) -> Run:
        if self.repair_error is not None:
            raise self.repair_error
        self.repaired.append(run.id)
        return run

    async def cancel(self, run: Run) -> None:
        if self.cancel_error is not None:
            raise self.cancel_error
        self.cancelled.append(run.id)

    async def ended(self) -> Run:
        """A run whose log is closed and whose row still waits."""
        run = new_run()
        lease = await self.log.claim(run, "w")
        await self.log.append(lease, [content("x").stamped(1, 1), done().stamped(2, 2)])
        self.rows.append(run)
        return run


async def test_a_run_that_was_cancelled_and_that_nobody_holds_is_ended_and_not_rung_for() -> None:
    yard = Yard()
    run = new_run()
    await yard.log.open(run, GRACE)
    await yard.log.cancel(run.id)
    assert await yard.sweeper.sweep() == 0
    yard.clock.advance(GRACE + 1)
    assert await yard.sweeper.sweep() == 1
    assert (yard.cancelled, yard.enqueued) == ([run.id], [])


async def test_a_run_that_the_log_lost_sight_of_is_pointed_out_to_it() -> None:
    reminded: list[str] = []

    class Blind(MemoryStreamLog):
        async def remind(self, run_ids: Sequence[str], seconds: float) -> None:
            assert seconds == GRACE
            reminded.extend(run_ids)

    yard = Yard()
    yard.log = Blind(ttl=3600, lease_seconds=10, clock=yard.clock)
    yard.sweeper = yard.new_sweeper()
    queued, held, dropped, unknown = (new_run() for _ in range(4))
    await yard.log.open(queued, GRACE)
    await yard.log.claim(dropped, "w")
    yard.clock.advance(11)
    await yard.log.claim(held, "w")
    yard.rows = [queued, held, dropped, unknown, await yard.ended()]
    await yard.sweeper.sweep()
    assert reminded == [queued.id, dropped.id]


async def test_a_run_that_nobody_claimed_in_time_is_enqueued_again() -> None:
    yard = Yard()
    run = new_run()
    await yard.log.open(run, GRACE)
    assert await yard.sweeper.sweep() == 0
    yard.clock.advance(GRACE + 1)
    assert await yard.sweeper.sweep() == 1
    assert yard.enqueued == [run.id]
    assert yard.actions == ["enqueued"]


async def test_a_run_whose_worker_died_is_enqueued_again() -> None:
    yard = Yard()
    run = new_run()
    await yard.log.claim(run, "dead")
    yard.clock.advance(9)
    assert await yard.sweeper.sweep() == 0
    yard.clock.advance(2)
    await yard.sweeper.sweep()
    assert yard.enqueued == [run.id]


async def test_a_bell_is_not_rung_at_every_look() -> None:
    yard = Yard()
    queued, orphan = new_run(), new_run()
    await yard.log.open(queued, 1)
    await yard.log.claim(orphan, "dead")
    yard.clock.advance(11)
    for _ in range(7):
        await yard.sweeper.sweep()
        yard.clock.advance(2)
    assert sorted(yard.enqueued) == sorted([queued.id, orphan.id])
    yard.clock.advance(GRACE)
    await yard.sweeper.sweep()
    assert len(yard.enqueued) == 4


async def test_another_sweeper_does_not_ring_for_a_queued_run_as_well() -> None:
    yard = Yard()
    await yard.log.open(new_run(), 1)
    yard.clock.advance(2)
    await yard.sweeper.sweep()
    await yard.new_sweeper().sweep()
    assert len(yard.enqueued) == 1


async def test_a_run_that_dies_again_is_rung_for_again() -> None:
    yard = Yard()
    run = new_run()
    for _ in range(2):
        await yard.log.claim(run, "dead")
        yard.clock.advance(11)
        await yard.sweeper.sweep()
    assert yard.enqueued == [run.id, run.id]


async def test_a_due_entry_without_its_run_is_removed() -> None:
    class Forgetful(MemoryStreamLog):
        forgotten: list[str] = []  # noqa: RUF012 - one test, one list

        async def due(self, limit: int, skip: int = 0) -> list[Due]:
            return [Due("gone", None, None)]

        async def forget(self, run_id: str) -> None:
            self.forgotten.append(run_id)

    yard = Yard()
    yard.log = Forgetful(ttl=1, lease_seconds=10)
    await yard.new_sweeper().sweep()
    assert Forgetful.forgotten == ["gone"]
    assert yard.enqueued == []


async def test_a_row_that_redis_forgot_is_announced_and_rung_for_after_a_grace() -> None:
    yard = Yard()
    run = new_run()
    yard.rows.append(run)
    await yard.sweeper.sweep()
    meta = await yard.log.meta(run.id)
    assert meta is not None
    assert meta.status is RunState.QUEUED
    # A worker that still holds it has this long to write its log again.
    assert yard.enqueued == []
    yard.clock.advance(GRACE + 1)
    await yard.sweeper.sweep()
    assert yard.enqueued == [run.id]


async def test_a_run_that_somebody_works_on_is_left_alone() -> None:
    yard = Yard()
    run = new_run()
    yard.rows.append(run)
    await yard.log.claim(run, "alive")
    assert await yard.sweeper.sweep() == 0
    assert (yard.enqueued, yard.repaired) == ([], [])


async def test_a_row_behind_a_closed_log_is_mended_at_the_second_look() -> None:
    yard = Yard()
    run = await yard.ended()
    assert await yard.sweeper.sweep() == 0
    assert await yard.sweeper.sweep() == 1
    assert yard.repaired == [run.id]


async def test_a_row_that_catches_up_by_itself_is_not_mended() -> None:
    yard = Yard()
    await yard.ended()
    await yard.sweeper.sweep()
    yard.rows.clear()
    await yard.sweeper.sweep()
    assert yard.repaired == []


async def test_runs_that_stay_due_do_not_hide_those_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "BATCH", 2)
    yard = Yard()
    # As when the only worker of a queue is gone: nobody claims what is rung for.
    runs = [new_run() for _ in range(5)]
    for run in runs:
        await yard.log.claim(run, "dead")
    yard.clock.advance(11)
    for _ in range(3):
        await yard.sweeper.sweep(rows=False)
    assert yard.enqueued == [run.id for run in runs]
    yard.clock.advance(GRACE)
    for _ in range(3):
        await yard.sweeper.sweep(rows=False)
    assert yard.enqueued == [run.id for run in runs] * 2


async def test_rows_that_stay_do_not_hide_those_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "BATCH", 2)
    yard = Yard()
    held = [new_run() for _ in range(4)]
    for run in held:
        await yard.log.claim(run, "alive")
    forgotten = new_run()
    yard.rows = [*held, forgotten]
    ended = await yard.ended()
    for _ in range(3):
        await yard.sweeper.sweep()
    assert await yard.log.meta(forgotten.id) is not None
    # Behind its log for a whole round, and not only since another look of this one.
    assert yard.repaired == []
    for _ in range(4):
        await yard.sweeper.sweep()
    assert yard.repaired == [ended.id]


async def test_it_goes_on_at_once_while_there_are_rows_it_has_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "BATCH", 2)
    yard = Yard()
    yard.rows = [new_run() for _ in range(5)]
    # The clock stands still: a second round is not due.
    async with running(yard.sweeper):
        await eventually(lambda: yard.actions.count("announced") == 5)


async def test_a_row_that_cannot_be_mended_does_not_keep_the_sweeper_from_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    yard = Yard()
    await yard.ended()
    await yard.sweeper.sweep()
    forgotten = new_run()
    yard.rows.append(forgotten)
    yard.repair_error = JournalUnavailable("full")
    await yard.sweeper.sweep()
    assert await yard.log.meta(forgotten.id) is not None
    # A disk that is full is no fault of ours and is told in one line.
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(("error", "faults"), [(JournalUnavailable("full"), 0), (RuntimeError("a fault"), 1)])
async def test_a_cancel_that_fails_is_told_once_and_does_not_keep_the_sweeper_from_others(
    error: Exception, faults: int, caplog: pytest.LogCaptureFixture
) -> None:
    yard = Yard()
    cancelled, queued = new_run(), new_run()
    for run in (cancelled, queued):
        await yard.log.open(run, 1)
    await yard.log.cancel(cancelled.id)
    yard.clock.advance(2)
    yard.cancel_error = error
    for _ in range(2):
        await yard.sweeper.sweep(rows=False)
    assert yard.enqueued == [queued.id]
    assert [cancelled.id in record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == [True]
    assert len([record for record in caplog.records if record.exc_info]) == faults
    yard.cancel_error = None
    await yard.sweeper.sweep()
    assert yard.cancelled == [cancelled.id]


async def test_a_row_that_cannot_be_compared_does_not_keep_the_sweeper_from_others() -> None:
    class Odd(MemoryStreamLog):
        async def open(self, run: Run, grace: float) -> None:
            if run is odd:
                raise RuntimeError("a fault")
            await super().open(run, grace)

    yard = Yard()
    yard.log = Odd(ttl=3600, lease_seconds=10, clock=yard.clock)
    yard.sweeper = yard.new_sweeper()
    odd, other = new_run(), new_run()
    yard.rows = [odd, other]
    assert await yard.sweeper.sweep() == 1
    assert await yard.log.meta(other.id) is not None


async def test_the_log_is_swept_while_the_store_is_away_and_the_other_way_round() -> None:
    yard = Yard()
    run = new_run()
    await yard.log.open(run, 1)
    yard.clock.advance(2)
    yard.rows_away = True
    assert await yard.sweeper.sweep() == 1

    class Away(MemoryStreamLog):
        async def due(self, limit: int, skip: int = 0) -> list[Due]:
            raise LogUnavailable("away")

    yard.rows_away = False
    yard.log = Away(ttl=1, lease_seconds=10)
    yard.rows.append(new_run())
    assert await yard.new_sweeper().sweep() == 1


async def test_it_sweeps_by_itself_while_it_runs() -> None:
    yard = Yard()
    run = new_run()
    await yard.log.open(run, 1)
    yard.clock.advance(2)
    async with running(yard.sweeper):
        await eventually(lambda: yard.enqueued == [run.id])


async def test_a_run_that_waits_in_a_long_queue_is_rung_for_more_and_more_rarely() -> None:
    yard = Yard()
    run = new_run(created_at=yard.clock.now_ms())
    await yard.log.open(run, GRACE)
    for _ in range(300):
        yard.clock.advance(2)
        await yard.sweeper.sweep(rows=False)
    assert 4 <= len(yard.enqueued) <= 7


async def test_a_run_that_waits_for_another_is_rung_for_only_after_that_ones_end() -> None:
    yard = Yard()
    first = new_run()
    waiting = new_run(waits_for=(first.id,))
    lease = await yard.log.claim(first, "w")
    await yard.log.park(waiting, [first.id], GRACE)
    for _ in range(3):
        yard.clock.advance(GRACE - 6)
        await yard.log.renew([lease])
        await yard.sweeper.sweep()
    assert yard.enqueued == []
    await yard.log.append(lease, [done().stamped(1, 1)])
    yard.clock.advance(GRACE)
    await yard.sweeper.sweep()
    assert yard.enqueued == [waiting.id]
