"""What the verbs work with: the servers, the ways out, and one lock per chat."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from weakref import WeakValueDictionary

from headwater.absence import Absence
from headwater.clock import Clock
from headwater.events import Event
from headwater.journal import Alone, Journal, Key
from headwater.overlay import Overlay
from headwater.pipelines.base import Pipeline
from headwater.queue import Enqueue
from headwater.records import Record
from headwater.runs import Run
from headwater.settings import Settings
from headwater.store import Store
from headwater.streams.base import StreamLog
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds in which PostgreSQL is not asked again after it did not answer: the next caller does not wait as well.
REST: Final = 1.0
#: Seconds a call to Redis may take. None is needed to accept a message, and the caller waits.
LOG_WAIT: Final = 0.3


class Save(Protocol):
    """Journal, then wait at most `wait` seconds for PostgreSQL. Returns the earlier holder of `key`, if any.

    Raises ChatBusy when a run has begun since `alone` was looked at.
    """

    def __call__(
        self,
        records: Sequence[Record],
        *,
        wait: float = 1.0,
        key: Key | None = None,
        alone: Alone | None = None,
        cancels: Sequence[str] = (),
    ) -> Awaitable[Key | None]: ...


class Settle(Protocol):
    """Claim a run and end it at once. Returns None when somebody else holds it."""

    def __call__(self, run: Run, holder: str, end: Event) -> Awaitable[Run | None]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a process that take requests."""

    store: Store
    journal: Journal
    overlay: Overlay
    absence: Absence
    save: Save
    log: StreamLog
    enqueue: Enqueue
    settle: Settle
    pipelines: Mapping[str, Pipeline]
    clock: Clock
    telemetry: Telemetry
    settings: Settings
    #: Whether somebody found PostgreSQL away just now.
    away: Callable[[], bool]


class Locks:
    """A lock per name that lives while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock


class Patience:
    """Whether it is worth asking PostgreSQL: not right after it failed to answer."""

    def __init__(self, clock: Clock, away: Callable[[], bool]) -> None:
        self._clock = clock
        self._away = away
        self._until = float("-inf")

    @property
    def worthwhile(self) -> bool:
        return self._clock.monotonic() >= self._until and not self._away()

    def lost(self) -> None:
        """It did not answer."""
        self._until = self._clock.monotonic() + REST
