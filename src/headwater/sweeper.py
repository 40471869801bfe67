"""Sweeper: rings again for runs that nobody holds although somebody should, and mends rows that missed the end.

Four things it looks for:

    due in the log        nobody claimed it in time, or its worker's lease ran out → enqueue again, or end it when
                          it was cancelled
    unknown to the log    a row waits, but Redis has forgotten the run → announce it; due after a grace
    ended in the log      a row waits, but the log is closed → make the rows from the log
    out of sight          a row waits, the log knows it, nobody holds it → see that it will be due

It decides nothing else about a run: the worker that claims it counts the attempts and ends it when they
are spent. So several sweepers at once do no harm; a bell rung twice lets one worker in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from headwater.apart import Apart
from headwater.clock import Clock
from headwater.errors import Unavailable
from headwater.runs import Run
from headwater.service import Service
from headwater.streams.base import Due, Meta, StreamLog
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds between two looks at the log. With a lease of 10 s a dead worker is noticed within 12 s.
SWEEP_EVERY: Final = 2.0
#: Seconds between two looks at the rows.
ROWS_EVERY: Final = 10.0
#: Runs of one look.
BATCH: Final = 500

#: BATCH rows at most, past so many of the oldest.
Unfinished = Callable[[int], Awaitable[Sequence[Run]]]


class Sweeper(Service):
    """Sweeps every two seconds while it runs; `sweep` does it once.

    `unfinished` gives rows that are queued or running for longer than `grace` seconds, `enqueue`
    hands a run to the queue, `repair` makes the rows of a run whose log is closed, `cancel` ends one
    that nobody holds.
    """

    def __init__(
        self,
        log: StreamLog,
        *,
        unfinished: Unfinished,
        enqueue: Callable[[Run], None],
        repair: Callable[[Run], Awaitable[object]],
        cancel: Callable[[Run], Awaitable[object]],
        clock: Clock,
        telemetry: Telemetry,
        grace: float,
        every: float = SWEEP_EVERY,
        rows_every: float = ROWS_EVERY,
    ) -> None:
        super().__init__()
        self._log = log
        self._unfinished = unfinished
        self._enqueue = enqueue
        self._repair = repair
        self._cancel = cancel
        self._clock = clock
        self._telemetry = telemetry
        self._grace = grace
        self._every = every
        self._rows_every = rows_every
        #: When this process rang last for a run and attempt, so that a busy queue is not rung every time.
        self._rung: dict[tuple[str, int], float] = {}
        #: Rows that waited behind a closed log when they were looked at last, and those found so since all rows were.
        self._behind: set[str] = set()
        self._behind_now: set[str] = set()
        self._rows_at: float | None = None
        #: How many the next look passes over. Those in front may stay there, waiting for a worker that is not coming
        #: back or for a long answer: with more than one look takes, the others would never be seen.
        self._past_due = self._past_rows = 0
        self._away: set[str] = set()
        self._apart = Apart("swept")

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            now = self._clock.monotonic()
            rows = self._rows_at is None or self._past_rows > 0 or now - self._rows_at >= self._rows_every
            await self.sweep(rows=rows)

    async def sweep(self, *, rows: bool = True) -> int:
        """Look once; `rows` says whether also at the store. Returns how many runs were acted on.

        A part that is away is left out and looked at the next time.
        """
        acted = await self._guarded("log", self._sweep_log)
        if rows:
            self._rows_at = self._clock.monotonic()
            acted += await self._guarded("rows", self._sweep_rows)
        return acted

    async def _guarded(self, what: str, look: Callable[[], Awaitable[int]]) -> int:
        try:
            acted = await look()
        except Unavailable as error:
            if what not in self._away:
                logger.warning("The sweeper leaves out the %s until it is back: %s", what, error)
            self._away.add(what)
            return 0
        self._away.discard(what)
        return acted

    # --- what the log knows ---------------------------------------------------------------------

    async def _sweep_log(self) -> int:
        now = self._clock.monotonic()
        self._rung = {key: at for key, at in self._rung.items() if now - at < self._grace}
        acted = 0
        dues = await self._log.due(BATCH, self._past_due)
        self._past_due = _past(self._past_due, dues)
        for due in dues:
            acted += await self._apart(due.run_id, self._ring(due, now)) or 0
        return acted

    async def _ring(self, due: Due, now: float) -> int:
        if due.run is None:
            # Nothing to enqueue: if the run still waits, its row brings it back.
            await self._log.forget(due.run_id)
            self._acted("forgotten")
            return 1
        if due.meta is not None and due.meta.cancelled:
            # Not by a worker: Celery's tools may have told them all to throw its messages away.
            await self._cancel(due.run)
            self._acted("cancelled")
            return 1
        key = (due.run_id, due.meta.attempt if due.meta is not None else 0)
        if key in self._rung:
            return 0
        if due.run.waits_for and not await self._its_turn(due.run):
            await self._log.open(due.run, self._grace)
            return 0
        self._rung[key] = now
        # A further grace, so that another process's sweeper does not ring as well. A run that no worker has had
        # yet most likely stands in a long queue still: it is rung for at 15, 30, 60 … seconds of age, because
        # every bell lies in Redis until a worker comes to it.
        age = (self._clock.now_ms() - due.run.created_at) / 1000 if not key[1] else 0.0
        await self._log.open(due.run, max(self._grace, age))
        self._enqueue(due.run)
        self._acted("enqueued")
        logger.info("Run %s is held by nobody and enqueued again, attempt %d so far", *key)
        return 1

    async def _its_turn(self, run: Run) -> bool:
        """Whether the log knows of nothing that the run still waits for: else its bell would only be for nothing."""
        return not any(meta and not meta.status.terminal for meta in await self._log.metas(run.waits_for))

    # --- what the rows say ----------------------------------------------------------------------

    async def _sweep_rows(self) -> int:
        runs = await self._unfinished(self._past_rows)
        metas = await self._log.metas([run.id for run in runs]) if runs else []
        if self._past_rows == 0:
            self._behind, self._behind_now = self._behind_now, set()
            self._apart.forget()
        self._past_rows = _past(self._past_rows, runs)
        acted = 0
        for run, meta in zip(runs, metas, strict=True):
            acted += await self._apart(run.id, self._compare(run, meta)) or 0
        # The log's index of what may be due can lose an entry, to a flush between two commands or to a full server.
        await self._log.remind([meta.run_id for meta in metas if meta is not None and _unheld(meta)], self._grace)
        return acted

    async def _compare(self, run: Run, meta: Meta | None) -> int:
        if meta is None:
            # Not enqueued at once: a worker may hold it still and write its log again in a moment.
            await self._log.open(run, self._grace)
            self._acted("announced")
            logger.info("Run %s waits, but Redis does not know it; it is announced again", run.id)
            return 1
        if not meta.status.terminal:
            return 0
        if run.id not in self._behind:
            # Between a run's end and its row lies the syncer; only a row that stays behind is mended.
            self._behind_now.add(run.id)
            return 0
        return await self._mend(run)

    async def _mend(self, run: Run) -> int:
        repaired = await self._repair(run)
        if repaired is None:
            return 0
        self._acted("repaired")
        logger.warning("The rows of run %s were behind its log and are made again", run.id)
        return 1

    def _acted(self, action: str) -> None:
        self._telemetry.count("headwater_swept_total", action=action)


def _past(skipped: int, found: Sequence[object]) -> int:
    """How many the look after one that found these passes over; none when it came to the end."""
    return skipped + BATCH if len(found) >= BATCH else 0


def _unheld(meta: Meta) -> bool:
    return not meta.status.terminal and meta.lease_left <= 0
