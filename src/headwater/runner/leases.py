"""Leases: every run of a process says "I live" in one round trip a second, and hears what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from enum import IntEnum
from typing import Any, Final

from headwater.errors import JournalUnavailable, LogUnavailable
from headwater.runs import Lease
from headwater.service import Service
from headwater.streams.base import Renewed, StreamLog
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Which of these runs, by id and owner, are to be cancelled as far as this host knows.
Promised = Callable[[Mapping[str, str]], Awaitable[Collection[str]]]

#: Seconds between renewals: a tenth of the usual lease, so that nine may fail.
RENEW_EVERY: Final = 1.0
#: Renewals in a lease that is shorter: one that ended between two of them would be lost while its worker is well.
RENEWALS: Final = 4


class Stop(IntEnum):
    """Why an attempt stops before its pipeline is through. The higher one wins."""

    #: The worker goes down; another one goes on.
    DRAIN = 1
    #: It took too long.
    DEADLINE = 2
    #: Somebody asked for it.
    CANCEL = 3
    #: The run is not ours any more: write nothing.
    FENCED = 4


class Hold:
    """One run held by this process: whether to stop, and whether its log must be written again."""

    def __init__(self, lease: Lease, owner_id: str) -> None:
        self.lease = lease
        self.owner_id = owner_id
        #: Why to stop; None while the attempt may go on.
        self.reason: Stop | None = None
        self.stopped = asyncio.Event()
        #: The worker goes down, whatever else the reason is: wait for nothing that is away.
        self.draining = asyncio.Event()
        #: The log has forgotten the run. The writer clears it once it wrote the log again.
        self.lost = False
        #: There is something to write.
        self.wake = asyncio.Event()

    def stop(self, reason: Stop) -> None:
        if self.reason is None or reason > self.reason:
            self.reason = reason
        if reason is Stop.DRAIN:
            self.draining.set()
        self.stopped.set()

    def heard(self, answer: Renewed) -> None:
        """The log's answer to a renewal."""
        match answer:
            case Renewed.CANCELLED:
                self.stop(Stop.CANCEL)
            case Renewed.FENCED:
                self.stop(Stop.FENCED)
            case Renewed.LOST:
                self.lost = True
                self.wake.set()
            case Renewed.HELD:
                pass


class LeaseKeeper(Service):
    """Renews all leases of a process. While Redis is away it keeps trying: the fence decides when it is back.

    It listens to `promised` besides: a cancel reaches the call to the model also while Redis, which
    would tell of it, is away, and no more is paid for.
    """

    def __init__(
        self, log: StreamLog, *, telemetry: Telemetry, lease_seconds: float, promised: Promised | None = None
    ) -> None:
        super().__init__()
        self._log = log
        self._telemetry = telemetry
        self._promised = promised
        self._every = min(RENEW_EVERY, lease_seconds / RENEWALS)
        self._holds: set[Hold] = set()
        self._away = False
        self._deaf = False

    @contextlib.contextmanager
    def keep(self, lease: Lease, owner_id: str) -> Iterator[Hold]:
        """Renew the lease inside the `with`."""
        hold = Hold(lease, owner_id)
        self._holds.add(hold)
        self._telemetry.gauge("headwater_runs_active", len(self._holds))
        try:
            yield hold
        finally:
            self._holds.discard(hold)
            self._telemetry.gauge("headwater_runs_active", len(self._holds))

    @property
    def holds(self) -> frozenset[Hold]:
        """The runs held now."""
        return frozenset(self._holds)

    async def run(self) -> None:
        # Side by side: a renewal waits for seconds on a Redis that is frozen.
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self.renew))
            group.create_task(self._repeat(self.listen))

    async def _repeat(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await asyncio.sleep(self._every)
            await work()

    async def renew(self) -> None:
        """Renew all leases once."""
        holds = list(self._holds)
        if not holds:
            return
        try:
            answers = await self._log.renew([hold.lease for hold in holds])
        except LogUnavailable as error:
            if not self._away:
                logger.warning("Leases of %d runs cannot be renewed now: %s", len(holds), error)
            self._away = True
            return
        self._away = False
        for hold, answer in zip(holds, answers, strict=True):
            hold.heard(answer)

    async def listen(self) -> None:
        """Stop the runs whose cancel was promised on this host."""
        holds = list(self._holds)
        if not holds or self._promised is None:
            return
        try:
            cancelled = await self._promised({hold.lease.run_id: hold.owner_id for hold in holds})
        except JournalUnavailable as error:
            if not self._deaf:
                logger.warning("Cancels cannot be read from the journal now: %s", error)
            self._deaf = True
            return
        self._deaf = False
        for hold in holds:
            if hold.lease.run_id in cancelled:
                hold.stop(Stop.CANCEL)
