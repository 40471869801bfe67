"""Attempt: one claimed run from its first event to its last, or to the moment another worker has it.

The order at the end is fixed: every event in the log, still ours, rows saved, terminal event. So who
sees the end finds the rows, and a worker that dies in between leaves a run that its next attempt ends
from the saved row instead of answering twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from headwater.clock import Clock
from headwater.errors import DeadlineExceeded, Fenced, Interrupted, LogUnavailable, RunFailed, Unavailable
from headwater.events import Event, EventType, done
from headwater.messages import Message
from headwater.pipelines.base import OnWorkerLost, Pipeline
from headwater.records import Record
from headwater.runner import endings
from headwater.runner.leases import Hold, Stop
from headwater.runner.writer import Writer
from headwater.runs import Lease, Run, RunState
from headwater.settings import Settings
from headwater.streams.base import Page, Renewed, StreamLog
from headwater.telemetry import Telemetry
from headwater.transcript import Transcript

logger = logging.getLogger(__name__)

Save = Callable[[Sequence[Record]], Awaitable[object]]

#: Events of one read of a log.
READ_PAGE: Final = 1_000
#: Seconds a stopped pipeline has to give back what it holds.
CLOSE_GRACE: Final = 3.0


class Shares(Protocol):
    """How many runs of an owner are under way: `headwater.shares`."""

    async def admit(self, run: Run) -> bool: ...
    def let_go(self, run: Run) -> None: ...
    async def ended(self, run: Run) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What every run of a process works with."""

    log: StreamLog
    pipelines: Mapping[str, Pipeline]
    save: Save
    clock: Clock
    telemetry: Telemetry
    settings: Settings
    #: The newest copy of a run in journal and store; None when unknown.
    known: Callable[[str], Awaitable[Run | None]]
    #: Hands a run to the queue; never blocks.
    requeue: Callable[[Run], None]
    #: The events of a run that has ended, made from its rows; None when it has not.
    history: Callable[[str], Awaitable[Page | None]]
    #: Told that a run's message was taken out of the queue; never blocks.
    answered: Callable[[Run], None] | None = None
    #: Who may begin; None when anybody may.
    shares: Shares | None = None

    async def stored(self, run_id: str) -> Run | None:
        """What is stored of the run; None also when that cannot be told now."""
        try:
            return await self.known(run_id)
        except Unavailable as error:
            logger.warning("What is stored of run %s cannot be read now: %s", run_id, error)
            return None

    async def told(self, run_id: str) -> Sequence[Event]:
        """What a run that has ended said, from its rows; empty when it has not ended or that cannot be told now."""
        try:
            page = await self.history(run_id)
        except Unavailable as error:
            logger.warning("The rows of run %s cannot be read now: %s", run_id, error)
            return ()
        return page.events if page is not None else ()


class Attempt:
    """One attempt at a run that this process holds. `earlier` is what attempts before it left in the log."""

    def __init__(self, parts: Parts, run: Run, lease: Lease, hold: Hold, earlier: Sequence[Event]) -> None:
        self._parts = parts
        self._lease = lease
        self._hold = hold
        self._earlier = earlier
        self._began = parts.clock.monotonic()
        self._run = run.started(lease.attempt, parts.clock.now_ms())
        self._pipeline = parts.pipelines.get(run.kind)
        self._policy = self._pipeline.on_worker_lost if self._pipeline is not None else OnWorkerLost.RESTART
        self._deadline = self._pipeline.deadline if self._pipeline is not None else None
        self._deadline = self._deadline if self._deadline is not None else parts.settings.run_deadline
        self._writer = Writer(
            parts.log,
            hold,
            self._run,
            earlier,
            clock=parts.clock,
            telemetry=parts.telemetry,
            flush=parts.settings.flush_ms / 1000,
        )
        #: The save of the running row, which must be through before the last one.
        self._saving: asyncio.Task[None] | None = None
        #: Nothing that the pipeline still says counts.
        self._over = False

    async def close(self) -> None:
        """Leave nothing of the attempt behind on the loop."""
        await self._writer.stop()
        if self._saving is not None:
            await asyncio.wait({self._saving})

    async def live(self) -> Run | None:
        """Bring the run to its end and return it so; None when it was handed over.

        Raises Fenced and LogClosed when another attempt has it, LogUnavailable when the worker goes
        down while Redis is away.
        """
        if self._lease.attempt > 1:
            stored = await self._parts.stored(self._run.id)
            told = await self._parts.told(self._run.id) if stored is not None and stored.state.terminal else ()
            if stored is not None and told:
                return await self._conclude(stored, told)
        end = self._verdict()
        if end is None:
            end = await self._drive()
        if end is not None:
            return await self.finish(end)
        if self._hold.reason is Stop.FENCED:
            raise Fenced
        return await self._hand_over()

    # --- the beginning --------------------------------------------------------------------------

    def _verdict(self) -> Event | None:
        """The end of a run that needs its pipeline no more; else None, with the attempt's first events written."""
        if self._lease.cancelled:
            return endings.cancelled()
        lost = endings.lost_attempts(self._lease.attempt, self._earlier)
        if lost >= self._parts.settings.max_attempts:
            return endings.failure(Interrupted(f"The worker died {lost} times while it worked on this. Try again."))
        if self._pipeline is None:
            return endings.failure(
                RunFailed(f"This worker knows no runs of the kind {self._run.kind!r}.", code="unknown_kind")
            )
        if endings.shows(self._earlier):
            if self._policy is OnWorkerLost.INTERRUPT:
                return endings.failure(Interrupted("The worker was lost while it answered. What it said is kept."))
            if self._policy is OnWorkerLost.RESTART:
                reason = endings.HANDED_OVER if endings.handed_over(self._earlier) else "worker_lost"
                self._writer.add(Event(EventType.RESET, {"reason": reason, "attempt": self._lease.attempt}))
        state = {"state": RunState.RUNNING.value, "attempt": self._lease.attempt}
        self._writer.add(Event(EventType.STATE, state))
        return None

    async def _conclude(self, stored: Run, told: Sequence[Event]) -> Run:
        """An earlier attempt saved the end and died before saying it: say it."""
        said, end = told[:-1], told[-1]
        if _text(self._earlier) != _text(said):
            # The log lacks what the dead worker had only in memory, so all of it is told again.
            if endings.shows(self._earlier):
                self._writer.add(Event(EventType.RESET, {"reason": "worker_lost", "attempt": self._lease.attempt}))
            for event in said:
                # Within a log the attempt only grows: who tells it now is this one.
                told_by = {"attempt": self._lease.attempt} if event.type is EventType.STATE else {}
                self._writer.add(Event(event.type, {**event.data, **told_by}))
        await self._writer.end(Event(end.type, end.data, 0, self._parts.clock.now_ms()), patient=True)
        self._ended(stored)
        return stored

    # --- the middle -----------------------------------------------------------------------------

    async def _drive(self) -> Event | None:
        """Run the pipeline until it ends or is stopped; None when the run is not ours to end."""
        # Beside the pipeline, not before it: the first token does not wait for a disk.
        self._saving = asyncio.create_task(self._keep_running())
        writing = self._writer.start()
        pump = asyncio.create_task(self._pump())
        stopped = asyncio.create_task(self._hold.stopped.wait())
        try:
            watched: set[asyncio.Task[object]] = {writing, pump, stopped}
            await asyncio.wait(watched, timeout=self._deadline, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            self._over = True
            finished = pump.done()
            if not finished:
                pump.cancel()
                await asyncio.wait({pump}, timeout=CLOSE_GRACE)
            failed = writing.exception() if writing.done() and not writing.cancelled() else None
            await self._writer.stop()
        if failed is not None:
            raise failed
        if not finished and self._hold.reason is None:
            self._hold.stop(Stop.DEADLINE)
        return self._end_of(pump.result() if finished else None)

    def _end_of(self, end: Event | None) -> Event | None:
        if self._hold.reason is Stop.FENCED:
            return None
        if end is not None:
            # The pipeline was quicker than whoever wanted to stop it.
            return end
        if self._hold.reason is Stop.CANCEL:
            return endings.cancelled()
        if self._hold.reason is Stop.DEADLINE:
            return endings.failure(DeadlineExceeded(f"The answer took longer than {self._deadline:g} seconds."))
        return None

    async def _pump(self) -> Event:
        """Pipeline → writer. Returns the terminal event that the pipeline came to."""
        try:
            return await self._follow()
        except RunFailed as error:
            logger.info("Run %s failed: %s: %s", self._run.id, error.code, error)
            return endings.failure(error)
        except BaseException:
            # Also SystemExit, which would take the loop and every run on it along, and a CancelledError that nobody
            # asked for: a pipeline calls foreign code. Only our own cancel goes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            logger.exception("The pipeline %s of run %s raised", self._run.kind, self._run.id)
            return endings.internal()

    async def _follow(self) -> Event:
        assert self._pipeline is not None
        said = Transcript.of(self._earlier if self._policy is OnWorkerLost.CONTINUE else ())
        spoken = False
        events = self._pipeline.events(self._run, said)
        try:
            async for event in events:
                if event.terminal or self._over:
                    return event
                if not spoken and event.type is EventType.CONTENT:
                    spoken = True
                    self._first_token()
                self._writer.add(event)
                if self._writer.full:
                    await self._writer.room()
        finally:
            # A generator that is left in the middle is closed now, not when it is collected: the
            # connection to the model's API ends with it.
            if hasattr(events, "aclose"):
                await events.aclose()
        return done()

    def _first_token(self) -> None:
        waited = max(0, self._parts.clock.now_ms() - self._run.created_at) / 1000
        self._parts.telemetry.observe("headwater_first_token_seconds", waited, kind=self._run.kind)

    # --- the end --------------------------------------------------------------------------------

    async def finish(self, end: Event, *, patient: bool = True) -> Run:
        """End the run with `end` and return it so. Raises Fenced, LogClosed, and LogUnavailable unless `patient`."""
        await self._still_ours()
        run, end, records = self._outcome(end)
        if self._saving is not None:
            await asyncio.wait({self._saving})
        step = self._parts.telemetry.step
        step("finish.written")
        await self._keep(records)
        step("finish.saved")
        await self._writer.end(end, patient=patient)
        step("finish.told")
        self._ended(run)
        return run

    async def give_up(self) -> Run | None:
        """Something that nobody expected came before the first step. End the run once its attempts are spent."""
        if endings.lost_attempts(self._lease.attempt + 1, self._earlier) >= self._parts.settings.max_attempts:
            return await self.finish(endings.internal(), patient=False)
        await self._parts.log.release(self._lease)
        return None

    async def _still_ours(self) -> None:
        """Write the rest, or at least ask: what a newer attempt says must not be written over.

        With Redis away the answer is saved all the same, as its version loses against a newer attempt's.
        """
        try:
            if await self._writer.flush():
                return
            answer = (await self._parts.log.renew([self._lease]))[0]
            if answer is Renewed.FENCED:
                raise Fenced
            if answer is Renewed.LOST:
                self._hold.lost = True
                await self._writer.flush()
        except LogUnavailable as error:
            logger.warning("Run %s ends while its log is away: %s", self._run.id, error)

    def _outcome(self, end: Event) -> tuple[Run, Event, list[Record]]:
        transcript, now = self._writer.transcript, self._parts.clock.now_ms()
        messages: Sequence[Message] = ()
        usage = transcript.usage
        try:
            usage = self._pipeline.usage(self._run, transcript) if self._pipeline is not None else usage
            end = Event(end.type, end.data, 0, now)
            transcript.end = end
            run = endings.ended(self._run, end, transcript, usage)
            messages = self._pipeline.results(run, transcript) if self._pipeline is not None else ()
        except Exception:
            logger.exception("The results of run %s cannot be made", self._run.id)
            internal = endings.internal()
            end = Event(internal.type, internal.data, 0, now)
            run = endings.ended(self._run, end, transcript, usage)
        data = dict(end.data)
        if usage is not None:
            data["usage"] = dict(usage)
        if run.message_id is not None:
            data["message_id"] = run.message_id
        return run, Event(end.type, data, end.seq, end.at), [*map(Record.of, messages), Record.of(run)]

    async def _keep_running(self) -> None:
        await self._keep([Record.of(self._run)])
        self._parts.telemetry.step("claim.saved")

    async def _keep(self, records: Sequence[Record]) -> None:
        """Save, or say that it failed: the sweeper makes the rows again from the log as long as it lives."""
        try:
            await self._parts.save(records)
        except Unavailable as error:
            logger.warning("Rows of run %s are not saved; they are made again from its log: %s", self._run.id, error)
        except Exception:
            logger.exception("Rows of run %s are not saved; they are made again from its log", self._run.id)

    async def _hand_over(self) -> Run | None:
        """The worker goes down: leave the run so that another one takes it at once."""
        await self._writer.flush()
        if self._policy is OnWorkerLost.INTERRUPT and endings.shows(self._writer.events):
            return await self.finish(
                endings.failure(Interrupted("The worker was stopped while it answered. What it said is kept."))
            )
        state = {"state": RunState.QUEUED.value, "attempt": self._lease.attempt, "reason": endings.HANDED_OVER}
        self._writer.add(Event(EventType.STATE, state))
        await self._writer.flush()
        await self._parts.log.release(self._lease)
        self._parts.requeue(self._run)
        return None

    def _ended(self, run: Run) -> None:
        code = str(run.error["code"]) if run.error else ""
        telemetry = self._parts.telemetry
        telemetry.count("headwater_runs_ended_total", kind=run.kind, state=run.state.value, code=code)
        telemetry.observe("headwater_run_seconds", self._parts.clock.monotonic() - self._began, kind=run.kind)
        logger.info("Run %s ended at attempt %d: %s %s", run.id, self._lease.attempt, run.state, code)


async def read_log(log: StreamLog, run_id: str) -> list[Event]:
    """All events of a log, empty without one. Raises LogUnavailable."""
    events: list[Event] = []
    while (page := await log.read(run_id, len(events), READ_PAGE)) is not None:
        events.extend(page.events)
        if not page.events or len(events) >= page.count:
            break
    return events


def _text(events: Sequence[Event]) -> tuple[str, str]:
    transcript = Transcript.of(events)
    return transcript.reasoning, transcript.content
