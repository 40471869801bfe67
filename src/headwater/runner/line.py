"""Line: a run that waits, for other runs of its chat or for its owner's turn.

It is parked: no worker holds it and no message of the broker names it. The end of a run it waits for
rings for it; should that get lost, the sweeper rings. Whoever is rung for looks again, so a bell too
many does no harm.
"""

from __future__ import annotations

import logging

from headwater.errors import LogUnavailable, StoreUnavailable, Unavailable
from headwater.runner.attempt import Parts, read_log
from headwater.runs import Run
from headwater.transcript import Transcript

logger = logging.getLogger(__name__)


class Line:
    """Lets runs begin in their turn."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def turn_of(self, run: Run) -> Run | None:
        """The run with its input whole, once nothing is before it; else None, and it is parked.

        Raises LogUnavailable.
        """
        whole = await self._behind_others(run) if run.waits_for else run
        if whole is None or self._parts.shares is None or await self._parts.shares.admit(whole):
            return whole
        # Not a further grace, as for one that is rung for: a thousand that wait would be rung for again and again. The
        # sweeper's bells for a run become rarer with its age.
        await self._parts.log.remind([run.id], self._parts.settings.queue_grace)
        logger.info("Run %s waits for another run of its owner", run.id)
        return None

    async def _behind_others(self, run: Run) -> Run | None:
        behind = await self._unended(run)
        if behind:
            await self._parts.log.park(run, behind, self._parts.settings.queue_grace)
            # One of them may have ended between the look and the note, and have rung for nobody.
            if await self._unended(run):
                logger.info("Run %s waits for %s", run.id, ", ".join(behind))
                return None
        pipeline = self._parts.pipelines.get(run.kind)
        if pipeline is None:
            return run
        try:
            return pipeline.complete(run, {run_id: await self._said(run_id) for run_id in run.waits_for})
        except StoreUnavailable as error:
            logger.warning("Run %s waits for what was said before it: %s", run.id, error)
            await self._parts.log.open(run, self._parts.settings.queue_grace)
            return None

    def answered(self, run: Run) -> None:
        """The run's message was taken out of the queue, whatever came of it."""
        if self._parts.answered is not None:
            self._parts.answered(run)

    def let_go(self, run: Run) -> None:
        """This process is no longer at the run."""
        if self._parts.shares is not None:
            self._parts.shares.let_go(run)

    async def ended(self, run: Run) -> None:
        """A run has ended: ring for those that wait for it."""
        try:
            for following in await self._parts.log.parked(run.id):
                self._parts.requeue(following)
            if self._parts.shares is not None:
                await self._parts.shares.ended(run)
        except LogUnavailable as error:
            logger.warning("Runs that wait for %s are left to the sweeper: %s", run.id, error)

    async def _unended(self, run: Run) -> list[str]:
        metas = await self._parts.log.metas(run.waits_for)
        return [
            run_id
            for run_id, meta in zip(run.waits_for, metas, strict=True)
            if not (await self._over(run_id) if meta is None else meta.status.terminal)
        ]

    async def _over(self, run_id: str) -> bool:
        """Whether a run without a log has ended, or is gone with its chat."""
        try:
            stored = await self._parts.known(run_id)
        except Unavailable as error:
            logger.warning("Whether run %s has ended cannot be told now: %s", run_id, error)
            return False
        return stored is None or stored.state.terminal

    async def _said(self, run_id: str) -> str:
        """What a run that has ended said, from its log or, without one, its rows. Raises StoreUnavailable."""
        events = await read_log(self._parts.log, run_id)
        if not events:
            page = await self._parts.history(run_id)
            events = list(page.events) if page is not None else []
        return Transcript.of(events).content
