"""StreamLog: the hot log of a run, and Feed: the push that says it grew.

The log is the truth, the feed is a hint. A reader that misses a message of the feed, sees one
twice or out of order re-reads the log and loses nothing.

Who may write is decided in the log itself, in one atomic step with the write: `claim` hands out a
lease under a new, higher attempt, and an append of a lower attempt is refused. Time is the
server's own (Redis `TIME`), never the hosts'.

An append names the seq of its first event. The log takes it only at exactly that place, so an
append repeated after a lost reply is recognised and counts once, and an append to a log that
lost its tail is refused with LogLost instead of leaving a hole.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from headwater.events import Event, EventType
from headwater.runs import Lease, Run, RunState
from headwater.streams.batch import Batch

#: The state in which a terminal event leaves its run.
ENDS: Final[Mapping[EventType, RunState]] = {
    EventType.DONE: RunState.DONE,
    EventType.ERROR: RunState.FAILED,
    EventType.CANCELLED: RunState.CANCELLED,
}
#: Seconds the log of a run that has not ended stays at least, however short the TTL of an ended one is.
LIVE_TTL: Final = 86_400
#: Bytes of events after which a page ends, so that what a reader holds is bounded however large events are. A thousand
#: readers that take nothing each hold about one.
PAGE_BYTES: Final = 32_768


def new_epoch() -> str:
    """A name for a new incarnation of a log: 12 characters that a cursor can carry."""
    return secrets.token_hex(6)


@dataclass(frozen=True, slots=True)
class Meta:
    """What the log knows of its run, without reading an event."""

    run_id: str
    epoch: str
    status: RunState
    attempt: int
    owner_id: str
    kind: str
    chat_id: str | None
    #: Events in the log.
    count: int
    #: A cancel was asked for.
    cancelled: bool
    #: Unix milliseconds of the log's own clock.
    created_at: int
    updated_at: int
    #: Milliseconds until the lease runs out; 0 or less when nobody holds the run.
    lease_left: int


@dataclass(frozen=True, slots=True)
class Page:
    """Events of one read, in order and without a hole."""

    epoch: str
    events: Sequence[Event]
    #: Events in the log at the time of the read; the page reached the end when its last seq equals it.
    count: int
    #: The log has its terminal event.
    closed: bool


@dataclass(frozen=True, slots=True)
class Appended:
    """The log's answer to an append."""

    #: Events in the log now.
    count: int
    #: A cancel was asked for: stop the pipeline.
    cancelled: bool


class Renewed(StrEnum):
    """The log's answer to a renewal."""

    #: The lease runs on.
    HELD = "held"
    #: The lease runs on, and a cancel was asked for.
    CANCELLED = "cancelled"
    #: A newer attempt owns the run, or it has ended.
    FENCED = "fenced"
    #: Redis has forgotten the run: write it again with `restore`.
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Due:
    """A run that nobody holds although somebody should: never claimed in time, or its lease ran out."""

    run_id: str
    #: As given to `open` or `claim`; None when the log has forgotten it.
    run: Run | None
    meta: Meta | None


class StreamLog(ABC):
    """Logs of many runs. Every method raises LogUnavailable when the server does not answer in time."""

    @abstractmethod
    async def open(self, run: Run, grace: float) -> None:
        """Announce a queued run. Unless somebody claims it, it is `due` after `grace` seconds.

        Harmless when the run is known already, whatever its state; a run that is still queued
        gets another `grace`, so that whoever rings again is not told of it at once.
        """

    @abstractmethod
    async def claim(self, run: Run, holder: str) -> Lease:
        """Take the run under the next attempt: higher than the log's and than `run.attempt`.

        Makes the log, with a new epoch, when there is none. The same holder asking again, because the
        reply was lost, gets the same attempt while its lease runs. Raises LogClosed when the run has
        ended, LeaseHeld while somebody else holds it (`error.extra["left"]`: milliseconds of the lease).
        """

    @abstractmethod
    async def append(self, lease: Lease, events: Sequence[Event]) -> Appended:
        """Write stamped events of consecutive seqs and publish them, in one atomic step that extends the lease.

        It may leave the lease as it is when it was extended less than a tenth of its length ago.
        A terminal event closes the log and gives up the lease; it can only be the last one.
        Repeating an append writes what is missing of it: nothing when it was written already.
        Raises Fenced, LogClosed, LogLost.
        """

    @abstractmethod
    async def restore(self, lease: Lease, run: Run, events: Sequence[Event]) -> Appended:
        """Write a log that was lost again, from its first event, under the lease's epoch and attempt.

        Keeps the longer of the two when some of it is still there. A terminal event at the end
        closes the log. Raises Fenced when a higher attempt, or somebody else under the same one,
        has the run by now, LogClosed when it has ended.
        """

    @abstractmethod
    async def renew(self, leases: Sequence[Lease]) -> list[Renewed]:
        """Extend many leases in one round trip; one answer per lease, in order."""

    @abstractmethod
    async def release(self, lease: Lease) -> None:
        """Hand the run over: it is queued again and may be claimed at once. Harmless when fenced."""

    @abstractmethod
    async def park(self, run: Run, behind: Sequence[str], grace: float) -> None:
        """Note that a queued run waits for others; it is `due` after `grace` seconds, like one that is announced."""

    @abstractmethod
    async def parked(self, run_id: str) -> list[Run]:
        """The runs that were parked behind this one; some may have begun or ended since."""

    @abstractmethod
    async def cancel(self, run_id: str) -> Meta | None:
        """Ask for a cancel: a durable flag that the holder sees at its next append or renewal.

        Returns what the log knew, None when it knows nothing of the run.
        """

    @abstractmethod
    async def metas(self, run_ids: Sequence[str]) -> list[Meta | None]:
        """Many metas in one round trip; None for a run without a log."""

    async def meta(self, run_id: str) -> Meta | None:
        return (await self.metas([run_id]))[0]

    @abstractmethod
    async def read(self, run_id: str, after: int, limit: int) -> Page | None:
        """At most `limit` events with a seq above `after`, at one moment. None when there is no log.

        A page ends early after PAGE_BYTES, but never before its first event: go on until it reached `count`.
        """

    @abstractmethod
    async def due(self, limit: int, skip: int = 0) -> list[Due]:
        """Runs nobody holds although somebody should, longest first, past the first `skip`. Asking changes nothing.

        Answer with `open` (a further grace), `claim`, or `forget` for one whose `run` is None.
        """

    @abstractmethod
    async def remind(self, run_ids: Sequence[str], seconds: float) -> None:
        """Have `due` look at these runs after so many seconds, should it have lost sight of them.

        Changes nothing for a run that it has in sight.
        """

    @abstractmethod
    async def forget(self, run_id: str) -> None:
        """Remove the log and all about the run, at once."""

    @abstractmethod
    async def beat(self, worker: str, seconds: float) -> None:
        """A worker says that it lives; it counts as gone `seconds` after its last beat."""

    @abstractmethod
    async def workers(self) -> list[str]:
        """The workers that live, by name."""

    @abstractmethod
    async def depth(self, *queues: str) -> int:
        """Orders that wait in the broker's queues, as far as the broker lives in the same server."""

    @abstractmethod
    def feed(self) -> Feed:
        """A new connection for following logs. The hub of a process has one."""

    @abstractmethod
    async def ping(self) -> None:
        """Answer, or raise LogUnavailable."""

    @abstractmethod
    async def close(self) -> None:
        """Give back the connections."""


class Follower(Protocol):
    """Who hears of one run. Called on the event loop, must not block."""

    def subscribed(self) -> None:
        """The subscription stands. What was published before may have been missed, also at a repeated call."""

    def published(self, batch: Batch) -> None:
        """Events were appended. May repeat, be missing or come late. No events: the log was written again, read it."""


class Feed(ABC):
    """One upstream connection that follows many runs."""

    @abstractmethod
    async def start(self, lost: Callable[[], None]) -> None:
        """Begin to connect. Returns at once also when the server is away; keeps trying.

        `lost` is called when the connection broke; it is made again, and every subscription is confirmed anew.
        """

    @abstractmethod
    def follow(self, run_id: str, follower: Follower) -> None:
        """Subscribe; `follower.subscribed` confirms. Never blocks."""

    @abstractmethod
    def unfollow(self, run_id: str) -> None:
        """Unsubscribe. Never blocks."""

    @abstractmethod
    async def stop(self) -> None:
        """Close the connection."""
