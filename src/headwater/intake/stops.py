"""Stops: a run is cancelled.

A run that somebody holds is cancelled by its holder, who alone can close the call to the model and
knows what was said; the flag in the log reaches it at its next append or renewal. A run that nobody
holds is ended here.

Whoever was told `cancelling` was made a promise, so it is in the journal before the reply and stays
there until the run has ended: Redis may be away, or come back without the flag, and this process may
die. Every server process on this journal keeps it, which does no harm: a flag is set twice, a claim
lets one in.

When nobody can tell whose the run is, because Redis and PostgreSQL are both away or neither has yet
what another host accepted, what is kept is a wish. It does nothing until the owner is known, and
nothing at all when that is somebody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from headwater.access import Caller, may
from headwater.apart import Apart
from headwater.errors import JournalUnavailable, LogUnavailable, NotKnownYet, StoreUnavailable, Unavailable
from headwater.events import Event, EventType
from headwater.ids import new_id
from headwater.intake import checks
from headwater.intake.parts import Parts
from headwater.journal import Wish
from headwater.runs import Run, RunState
from headwater.service import Service
from headwater.streams.base import Meta

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: The cancel was asked for and the worker has not confirmed it yet.
CANCELLING: Final = "cancelling"
#: Seconds a caller waits for Redis, and for the end of a run that nobody holds; then it is a promise.
PATIENCE: Final = 0.6
#: Seconds between two looks at what was promised.
EVERY: Final = 1.0
#: Promises of one read.
BATCH: Final = 500
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


class Stops(Service):
    """Cancels runs. Started, it keeps what was promised; what was noted while it was not started waits."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts = parts
        #: Ends under way whose caller went away with a promise.
        self._ending: set[asyncio.Task[Any]] = set()
        #: Since when the log does not know a run that somebody may hold, by this process's clock.
        self._unknown: dict[str, float] = {}
        self._away = False
        self._apart = Apart("cancelled as promised")

    async def cancel(self, caller: Caller, run_id: str) -> Stopped:
        """Ask for a cancel; of a run that has ended, tell how.

        `cancelling` also when nobody can tell now whose the run is, or whether there is one: then the
        wish is kept until somebody can. Raises NotFound; JournalUnavailable when a promise or a wish cannot be kept.
        """
        checks.checked_id(run_id, "run")
        try:
            status, flagged = await self._ask(caller, run_id)
        except (StoreUnavailable, NotKnownYet) as error:
            logger.warning("the cancel of run %s waits for somebody who knows its owner: %s", run_id, error)
            await self._parts.journal.note_wish(run_id, caller.owner_id)
            return Stopped(run_id, CANCELLING)
        if status is None:
            await self._note(run_id, flagged=flagged)
        return Stopped(run_id, CANCELLING if status is None else status.value)

    def bring(self, run_ids: Sequence[str]) -> None:
        """Bring cancels on their way that are noted in the journal already. Returns at once."""
        for run_id in run_ids:
            self._begin(self._keep(run_id), run_id)

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

    # --- a caller asks ---------------------------------------------------------------------------

    async def _ask(self, caller: Caller, run_id: str) -> tuple[RunState | None, bool]:
        """How the run ended, None when it has not; and whether its log has the flag."""
        flagged = False
        try:
            async with asyncio.timeout(PATIENCE):
                meta, run = await self._flag(caller, run_id)
            flagged = meta is not None
            return await self._end(run_id, meta, run), flagged
        except LogUnavailable as error:
            logger.warning("the cancel of run %s waits for Redis: %s", run_id, error)
        except TimeoutError:
            logger.warning("the cancel of run %s waits for Redis: no answer within %g s", run_id, PATIENCE)
        return await self._by_row(caller, run_id), flagged

    async def _flag(self, caller: Caller, run_id: str) -> tuple[Meta | None, Run | None]:
        """Set the flag, unless the run is not the caller's. Without a log, the run's row comes along."""
        meta = await self._parts.log.meta(run_id)
        run = await self._owned(caller, run_id) if meta is None else None
        if meta is not None:
            # Before the flag is set: asking must have no effect on what is somebody else's.
            may(caller, meta.owner_id)
        flagged = await self._parts.log.cancel(run_id)
        self._parts.telemetry.step("cancel.flagged")
        return flagged, run

    async def _owned(self, caller: Caller, run_id: str) -> Run:
        run = await self._parts.overlay.run(run_id)
        if run is None:
            raise self._parts.absence.of(run_id, "run")
        may(caller, run.owner_id)
        return run

    async def _end(self, run_id: str, meta: Meta | None, run: Run | None) -> RunState | None:
        """End the run if nobody holds it. The state it ended in; None when that is for its holder, or takes longer."""
        if meta is not None and (meta.status.terminal or meta.lease_left > 0):
            return meta.status if meta.status.terminal else None
        if meta is None and run is not None and run.state is not RunState.QUEUED:
            # The log is lost: its worker may hold it still, with all that was said, and writes it again.
            return run.state if run.state.terminal else None
        # Not cut off by the caller's patience: a claim whose end is not written holds the run up for a lease.
        ending = self._begin(self._settle(run_id, run), run_id)
        await asyncio.wait({ending}, timeout=PATIENCE)
        if not ending.done() or ending.exception() is not None:
            return None
        ended = ending.result()
        return ended.state if ended is not None else await self._state(run_id)

    async def _by_row(self, caller: Caller, run_id: str) -> RunState | None:
        run = await self._owned(caller, run_id)
        return run.state if run.state.terminal else None

    async def _note(self, run_id: str, *, flagged: bool) -> None:
        try:
            await self._parts.journal.note_cancel(run_id)
        except JournalUnavailable as error:
            if not flagged:
                raise
            logger.warning("the cancel of run %s stands in Redis only: %s", run_id, error)
        self._parts.telemetry.step("cancel.noted")

    # --- a run that nobody holds -----------------------------------------------------------------

    async def _settle(self, run_id: str, run: Run | None) -> Run | None:
        run = run or await self._parts.overlay.run(run_id)
        if run is None or run.state.terminal:
            return run
        # A holder of its own for each call: to the log the same holder is the same worker, asking again.
        return await self._parts.settle(run, f"intake:{new_id()}", Event(EventType.CANCELLED, {}))

    def _begin(self, end: Coroutine[Any, Any, T], run_id: str) -> asyncio.Task[T]:
        ending = asyncio.create_task(end, name=f"cancel {run_id}")
        self._ending.add(ending)
        ending.add_done_callback(self._settled)
        return ending

    def _settled(self, ending: asyncio.Task[Any]) -> None:
        self._ending.discard(ending)
        error = None if ending.cancelled() else ending.exception()
        if isinstance(error, Unavailable):
            # The flag stands or the promise does: whoever claims the run ends it before its first word.
            logger.warning("%s is not through yet: %s", ending.get_name(), error)
        elif error is not None:
            logger.error("%s failed", ending.get_name(), exc_info=error)

    async def _state(self, run_id: str) -> RunState | None:
        """Claimed or ended by somebody else in between."""
        meta = await self._parts.log.meta(run_id)
        return meta.status if meta is not None and meta.status.terminal else None

    # --- what was promised -----------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.look()
            except Unavailable as error:
                if not self._away:
                    logger.warning("promised cancels wait: %s", error)
                self._away = True
            else:
                self._away = False

    async def close(self) -> None:
        if self._ending:
            await asyncio.wait(self._ending)

    async def look(self) -> int:
        """Bring every promised cancel on its way once; how many runs have ended. Raises Unavailable."""
        await self._judge()
        kept, after, seen = 0, "", set[str]()
        # All of them, as below: a run whose worker is frozen must not stand in the way of others.
        while promised := await self._parts.journal.cancels(BATCH, after):
            after = promised[-1]
            seen.update(promised)
            ended = [run_id for run_id in promised if await self._apart(run_id, self._keep(run_id))]
            if ended:
                await self._parts.journal.drop_cancels(ended)
            kept += len(ended)
        self._unknown = {run_id: since for run_id, since in self._unknown.items() if run_id in seen}
        self._apart.forget(but=seen)
        return kept

    async def _judge(self) -> None:
        """Make promises of the wishes of owners. The others are dropped, those nobody can tell about yet stay."""
        away = False
        after = ("", "")
        # All of them, not the first so many: those that wait for PostgreSQL must not stand in the way of others.
        while wishes := await self._parts.journal.wishes(BATCH, after):
            after = wishes[-1]
            granted: list[Wish] = []
            refused: list[Wish] = []
            metas = await self._parts.log.metas([run_id for run_id, _ in wishes])
            for wish, meta in zip(wishes, metas, strict=True):
                owner = meta.owner_id if meta is not None else None
                if meta is None and not away:
                    try:
                        run = await self._parts.overlay.run(wish[0])
                    except StoreUnavailable:
                        away = True
                    else:
                        if run is not None:
                            owner = run.owner_id
                        elif not self._parts.absence.may_come(wish[0]):
                            owner = ""
                if owner is not None:
                    (granted if owner == wish[1] else refused).append(wish)
            if granted or refused:
                await self._parts.journal.settle_wishes(granted, refused)

    async def _keep(self, run_id: str) -> bool:
        """Whether the run has ended, so that the promise is kept."""
        meta = await self._parts.log.cancel(run_id)
        if meta is not None and (meta.status.terminal or meta.lease_left > 0):
            return meta.status.terminal
        try:
            run = await self._parts.overlay.run(run_id)
        except StoreUnavailable as error:
            logger.debug("run %s is left to the next worker to cancel: %s", run_id, error)
            return False
        if run is None:
            # Deleted with its chat, unless another host is about to bring it.
            return not self._parts.absence.may_come(run_id)
        if run.state.terminal:
            # It ended before its log was lost.
            return True
        if meta is None and run.state is not RunState.QUEUED and not self._given_up(run_id):
            return False
        ended = await self._settle(run_id, run)
        return ended is not None or await self._state(run_id) is not None

    def _given_up(self, run_id: str) -> bool:
        """Whether nobody has written the lost log of a run again for as long as a lease."""
        now = self._parts.clock.monotonic()
        return now - self._unknown.setdefault(run_id, now) > self._parts.settings.lease_seconds
