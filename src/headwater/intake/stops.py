"""Stops: a run is cancelled.

A run that somebody holds is cancelled by its holder, who alone can close the call to the model and
knows what was said; the flag in the log is durable and reaches it at its next append or renewal.
A run that nobody holds is ended here.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from headwater.access import Caller, may
from headwater.errors import NotFound, StoreUnavailable
from headwater.events import Event, EventType
from headwater.ids import new_id
from headwater.intake import checks
from headwater.intake.parts import Parts
from headwater.runs import Run

logger = logging.getLogger(__name__)

#: The cancel was asked for and the worker has not confirmed it yet.
CANCELLING: Final = "cancelling"
#: Seconds between looks while waiting for a confirmation.
_LOOK: Final = 0.05


@dataclass(frozen=True, slots=True)
class Stopped:
    """How a cancel stands."""

    task_id: str
    #: `cancelling` until the worker confirms, else the state in which the run ended.
    status: str

    @property
    def ended(self) -> bool:
        return self.status != CANCELLING


class Stops:
    """Cancels runs."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def cancel(self, caller: Caller, run_id: str) -> Stopped:
        """Ask for a cancel; of a run that has ended, tell how. Raises NotFound, LogUnavailable."""
        checks.checked_id(run_id, "run")
        meta = await self._parts.log.meta(run_id)
        run: Run | None = None
        if meta is None:
            run = await self._parts.overlay.run(run_id)
            if run is None:
                raise NotFound("There is no such run.")
        # Before the flag is set: asking must have no effect on what is somebody else's.
        may(caller, meta.owner_id if meta is not None else run.owner_id if run is not None else "")
        meta = await self._parts.log.cancel(run_id)
        if meta is not None and meta.status.terminal:
            return Stopped(run_id, meta.status.value)
        if run is not None and run.state.terminal:
            return Stopped(run_id, run.state.value)
        if meta is not None and meta.lease_left > 0:
            return Stopped(run_id, CANCELLING)
        return await self._end(run_id, run)

    async def confirmed(self, run_id: str, within: float) -> bool:
        """Wait until the log says that the run has ended; False after `within` seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within
        while loop.time() < until:
            meta = await self._parts.log.meta(run_id)
            if meta is None or meta.status.terminal:
                return True
            # Looked up and not subscribed to: the hub is above, and a deletion is rare.
            await asyncio.sleep(_LOOK)
        return False

    async def _end(self, run_id: str, run: Run | None) -> Stopped:
        """End a run that nobody holds."""
        try:
            run = run or await self._parts.overlay.run(run_id)
        except StoreUnavailable as error:
            # The flag stands: whoever claims the run ends it before its first word.
            logger.warning("run %s is left to the next worker to cancel: %s", run_id, error)
            return Stopped(run_id, CANCELLING)
        if run is None:
            return Stopped(run_id, CANCELLING)
        # A holder of its own for each call: to the log the same holder is the same worker, asking again.
        ended = await self._parts.settle(run, f"intake:{new_id()}", Event(EventType.CANCELLED, {}))
        if ended is not None:
            return Stopped(run_id, ended.state.value)
        # Claimed or ended by somebody else in between.
        meta = await self._parts.log.meta(run_id)
        over = meta is not None and meta.status.terminal
        return Stopped(run_id, meta.status.value if meta is not None and over else CANCELLING)
