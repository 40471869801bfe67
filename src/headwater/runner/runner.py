"""Runner: claim, pipeline, log, save, and exactly one terminal event. Knows no Celery, no HTTP.

What can happen to an attempt, and what it leaves:

    the pipeline returns          done
    the pipeline raises           error, by the exception's code
    somebody cancels              cancelled, with what was said
    it takes too long             error `deadline`, with what was said
    the worker goes down          nothing terminal: the run is released and goes on elsewhere
    a newer attempt has the run   nothing: it stops without another word
    Redis is away                 it goes on in memory and writes when Redis is back
    Redis lost the log            it is written again from memory
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from headwater.clock import Clock
from headwater.errors import Fenced, LeaseHeld, LogClosed, LogRefused, LogUnavailable
from headwater.events import Event
from headwater.pipelines.base import Pipeline
from headwater.records import Record
from headwater.runner import endings
from headwater.runner.attempt import CLOSE_GRACE, Attempt, Parts, Save, Shares, read_log
from headwater.runner.leases import Hold, LeaseKeeper, Promised, Stop
from headwater.runner.line import Line
from headwater.runner.writer import FIRST_RETRY, LAST_RETRY, nap
from headwater.runs import Lease, Run, RunState
from headwater.settings import Settings
from headwater.streams.base import Page, StreamLog
from headwater.telemetry import Telemetry
from headwater.transcript import Transcript

logger = logging.getLogger(__name__)


class Runner:
    """Executes runs, many at once on one event loop. `leases` must be started beside it."""

    def __init__(
        self,
        log: StreamLog,
        pipelines: Mapping[str, Pipeline],
        save: Save,
        *,
        clock: Clock,
        telemetry: Telemetry,
        settings: Settings,
        known: Callable[[str], Awaitable[Run | None]],
        requeue: Callable[[Run], None],
        history: Callable[[str], Awaitable[Page | None]],
        promised: Promised | None = None,
        answered: Callable[[Run], None] | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.leases = LeaseKeeper(log, telemetry=telemetry, lease_seconds=settings.lease_seconds, promised=promised)
        self._log = log
        self._parts = Parts(log, pipelines, save, clock, telemetry, settings, known, requeue, history, answered, shares)
        self._line = Line(self._parts)
        self._draining = asyncio.Event()
        self._active: set[asyncio.Task[Run | None]] = set()

    async def execute(self, run: Run, holder: str) -> Run | None:
        """Claim the run and bring it to its end. Returns it as it ended.

        None when it was not ours: somebody holds it, it has ended, a newer attempt took it, or this
        worker drains and handed it over. `holder` must be unique per call, e.g. `host:pid:uuid`.
        """
        task = asyncio.ensure_future(self._execute(run, holder))
        self._active.add(task)
        task.add_done_callback(self._active.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Who awaits us gave up, or the loop ends. The run must not: hand it over before going.
            for hold in self.leases.holds:
                if hold.lease.run_id == run.id and hold.lease.holder == holder:
                    hold.stop(Stop.DRAIN)
            await asyncio.wait({task}, timeout=CLOSE_GRACE)
            raise

    async def settle(self, run: Run, holder: str, end: Event) -> Run | None:
        """Claim the run and end it with `end` at once, without its pipeline. What was said is kept.

        None when it was not ours. Raises LogUnavailable when Redis is away.
        """
        return await self._at_once(run, holder, lambda attempt: attempt.finish(end, patient=False))

    async def repair(self, run: Run) -> Run | None:
        """Make the rows of a run again whose log has its terminal event. Returns the run as it ended, or None."""
        meta = await self._log.meta(run.id)
        events = await read_log(self._log, run.id) if meta is not None else []
        if meta is None or not events or not events[-1].terminal:
            return None
        transcript, end = Transcript.of(events), events[-1]
        running = replace(run, state=RunState.RUNNING, attempt=meta.attempt)
        ended = endings.ended(running, end, transcript, end.data.get("usage"))
        pipeline = self._parts.pipelines.get(run.kind)
        messages = pipeline.results(ended, transcript) if pipeline is not None else ()
        await self._parts.save([*map(Record.of, messages), Record.of(ended)])
        return ended

    async def drain(self, timeout: float = CLOSE_GRACE + 1.0) -> None:
        """Hand every run over and wait for that, at most `timeout` seconds. New runs are handed on unclaimed."""
        self._draining.set()
        for hold in self.leases.holds:
            hold.stop(Stop.DRAIN)
        if self._active:
            await asyncio.wait(set(self._active), timeout=timeout)

    # --- from a run to an attempt ---------------------------------------------------------------

    async def _execute(self, run: Run, holder: str) -> Run | None:
        try:
            claimed = await self._begin(run, holder)
            ended = await self._live(*claimed) if claimed is not None else None
        finally:
            self._line.let_go(run)
        if ended is not None:
            await self._line.ended(run)
        return ended

    async def _begin(self, run: Run, holder: str) -> tuple[Run, Lease] | None:
        try:
            return await self._claim(run, holder)
        except Exception:
            # Only a claim counts an attempt: without one the run would be rung for, and fail like this, for ever.
            await self._at_once(run, holder, Attempt.give_up)
            raise
        finally:
            self._line.answered(run)

    async def _at_once(self, run: Run, holder: str, end: Callable[[Attempt], Awaitable[Run | None]]) -> Run | None:
        """Claim the run without waiting for its turn, and for nothing but `end`."""
        fresh = await self._unless_ended(run)
        if fresh is None:
            return None
        try:
            lease = await self._log.claim(fresh, holder)
            async with self._attempt(fresh, lease, patient=False) as attempt:
                ended = await end(attempt)
        except LogRefused:
            return None
        if ended is not None:
            await self._line.ended(run)
        return ended

    async def _live(self, run: Run, lease: Lease) -> Run | None:
        try:
            async with self._attempt(run, lease) as attempt:
                return await attempt.live()
        except (Fenced, LogClosed) as error:
            logger.info("Run %s stops at attempt %d, another one has it: %s", run.id, lease.attempt, error.code)
        except LogUnavailable as error:
            # Only while draining: otherwise every step waits for Redis. The lease runs out by itself.
            logger.warning("Run %s is left to its lease, the log is away: %s", run.id, error)
            self._parts.requeue(run)
        except Exception:
            # A fault of the runner itself. The next attempt need not wait for the lease; attempts are counted.
            await self._log.release(lease)
            raise
        return None

    async def _claim(self, run: Run, holder: str) -> tuple[Run, Lease] | None:
        delay = FIRST_RETRY
        while not self._draining.is_set():
            try:
                fresh = await self._unless_ended(run)
                if fresh is None or (fresh := await self._line.turn_of(fresh)) is None:
                    return None
                lease = await self._claim_in_turn(fresh, holder)
            except (LeaseHeld, LogClosed) as error:
                logger.info("Run %s is not for us: %s", run.id, error)
                if isinstance(error, LogClosed):
                    await self._line.ended(run)
                return None
            except LogUnavailable:
                await nap(self._draining, delay)
                delay = min(delay * 2, LAST_RETRY)
            else:
                self._parts.telemetry.count("headwater_runs_claimed_total", kind=run.kind)
                self._parts.telemetry.step("claim.claimed")
                return fresh, lease
        self._parts.requeue(run)
        return None

    async def _claim_in_turn(self, run: Run, holder: str) -> Lease:
        try:
            return await self._log.claim(run, holder)
        except LogUnavailable:
            # The next try asks for its turn again, and who asked twice would keep the second place for ever.
            self._line.let_go(run)
            raise

    async def _unless_ended(self, run: Run) -> Run | None:
        """The newest copy of the run; None when it has ended and its log is gone.

        A message may come again after days, when nothing in Redis tells any more that the run has
        ended; a claim would then answer a second time.
        """
        if await self._log.meta(run.id) is not None:
            return run
        stored = await self._parts.stored(run.id)
        if stored is None:
            return run
        if stored.state.terminal:
            return None
        return stored if stored.version > run.version else run

    @asynccontextmanager
    async def _attempt(self, run: Run, lease: Lease, *, patient: bool = True) -> AsyncIterator[Attempt]:
        with self.leases.keep(lease, run.owner_id) as hold:
            if self._draining.is_set():
                hold.stop(Stop.DRAIN)
            earlier = await self._earlier(lease, hold, patient=patient)
            attempt = Attempt(self._parts, run, lease, hold, earlier)
            try:
                yield attempt
            finally:
                await attempt.close()

    async def _earlier(self, lease: Lease, hold: Hold, *, patient: bool) -> list[Event]:
        """What earlier attempts wrote. Needed to write a lost log again, and to go on behind it."""
        delay = FIRST_RETRY
        while True:
            try:
                return await read_log(self._log, lease.run_id) if lease.length else []
            except LogUnavailable:
                if not patient or hold.draining.is_set():
                    raise
            await nap(hold.draining, delay)
            delay = min(delay * 2, LAST_RETRY)
