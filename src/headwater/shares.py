"""Shares: owners take turns, so that one's thousand jobs do not delay another's question.

    in the queue   an owner has at most BELLS messages in the broker per queue and priority; the rest
                   wait in Redis, and each that a worker takes out lets the next in. So a queue is
                   never longer than the owners are many, and whoever comes stands behind a few
                   messages of each, whatever they have in all.
    at work        with HEADWATER_OWNER_RUNS at most so many runs of an owner are under way per queue;
                   the end of one lets the next begin.

Both only put off: a run that waits is due in the log like any other that nobody holds, so the
sweeper rings for it when its turn was lost, with a process or with Redis.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from headwater.errors import LogUnavailable
from headwater.queue import order_of, queue_of
from headwater.runs import Run
from headwater.service import Service
from headwater.streams.places import Places

logger = logging.getLogger(__name__)


class Shares(Service):
    """Who may begin. Started, it keeps the places of the runs that this process is at.

    `limit`: runs of an owner that may be under way per queue; None for any number. `ring` hands a
    run to the queue.
    """

    def __init__(self, places: Places, *, limit: int | None, lease_seconds: float, ring: Callable[[Run], None]) -> None:
        super().__init__()
        self._places = places
        self._limit = limit
        self._lease = lease_seconds
        self._ring = ring
        #: Runs that have a place by this process; one twice while its message has come twice.
        self._at_work: list[Run] = []
        self._keeping = asyncio.Lock()

    async def admit(self, run: Run) -> bool:
        """Whether the run may begin now; if not, the end of another of its owner's rings for it.

        Raises LogUnavailable.
        """
        if self._limit is None:
            return True
        taken = await asyncio.to_thread(
            self._places.take, run, _work(run), order_of(run), places=self._limit, seconds=self._lease
        )
        if taken is None:
            return False
        self._at_work.append(run)
        return True

    def let_go(self, run: Run) -> None:
        """This process is no longer at it; its place stays for whoever goes on, for the length of a lease."""
        mine = next((one for one in self._at_work if one.id == run.id), None)
        if mine is not None:
            self._at_work.remove(mine)

    async def ended(self, run: Run) -> None:
        """Its place is free: ring for those whose turn it is. Raises LogUnavailable."""
        if self._limit is not None:
            async with self._keeping:
                # A place given back while it is being kept would be taken again, by nobody who could give it back.
                pass
            for following in await asyncio.to_thread(self._places.give, run, _work(run), places=self._limit):
                self._ring(following)

    async def run(self) -> None:
        while self._limit is not None:
            await asyncio.sleep(self._lease / 4)
            await self.keep()

    async def keep(self) -> None:
        """Renew the places of this process once."""
        async with self._keeping:
            runs = list(self._at_work)
            if not runs:
                return
            try:
                await asyncio.to_thread(self._places.keep, runs, _work, seconds=self._lease)
            except LogUnavailable as error:
                logger.warning("Places of %d runs cannot be kept now: %s", len(runs), error)


def _work(run: Run) -> str:
    return f"runs:{queue_of(run)}"
