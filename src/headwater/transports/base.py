"""What every transport shares: who reads, how many may, and how all are ended together.

A transport takes a subscription and writes bytes on a socket. It knows neither Redis nor
PostgreSQL: it is given a hub, a way to check the owner and a way to read a page.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final, Protocol, Self

from headwater.access import Caller
from headwater.errors import HeadwaterError, TooMany, Unavailable
from headwater.events import Cursor
from headwater.streams.base import Page
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: Seconds a reader may take to accept a write before it is given up.
SEND_TIMEOUT: Final = 30.0
#: Seconds a reader may take to accept its last bytes when the server stops.
DRAIN_TIMEOUT: Final = 1.5


class May(Protocol):
    """Whether the caller may read the run. Raises NotFound, also for a run of somebody else."""

    def __call__(self, caller: Caller, run_id: str) -> Awaitable[None]: ...


class MayEach(Protocol):
    """Why the caller may not read some of these runs, by their ids: NotFound, or Unavailable when nobody can tell."""

    def __call__(self, caller: Caller, run_ids: Sequence[str]) -> Awaitable[Mapping[str, HeadwaterError]]: ...


class Read(Protocol):
    """Events after a seq, from the log or, when that has expired, from the store. None: nothing to read yet."""

    def __call__(self, run_id: str, after: int, limit: int) -> Awaitable[Page | None]: ...


class Stream:
    """One open response. A context manager: at its end nothing is followed any more, and it counts no longer."""

    __slots__ = ("_abort", "_close", "_streams", "ending", "owner_id", "sending_since", "wrote_at")

    def __init__(
        self, close: Callable[[], None], abort: Callable[[], None], owner_id: str = "", streams: Streams | None = None
    ) -> None:
        self.owner_id = owner_id
        #: Why it ends before its runs do: `gone`, `draining` or `slow`.
        self.ending: str | None = None
        #: Loop time at which a write began that has not returned; None between writes.
        self.sending_since: float | None = None
        #: Loop time of the last write.
        self.wrote_at = 0.0
        self._close = close
        self._abort = abort
        self._streams = streams

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """It is over. Harmless the second time."""
        self._close()
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.forget(self)

    def end(self, why: str) -> None:
        """Stop following; what waits for the next batch wakes up. The first reason stands."""
        self.ending = self.ending or why
        self._close()

    def abort(self) -> None:
        """Cut the connection: the reader takes nothing, so a clean end would never reach it."""
        self.end("slow")
        self._abort()


class Streams:
    """The open streams of one process: counted per owner, watched for stuck writes, ended together."""

    def __init__(self, *, limit: int, telemetry: Telemetry, send_timeout: float = SEND_TIMEOUT) -> None:
        self._limit = limit
        self._telemetry = telemetry
        #: Seconds a write may take before its reader is given up.
        self.send_timeout = send_timeout
        self._open: set[Stream] = set()
        self._owners: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self.draining = False

    def __len__(self) -> int:
        return len(self._open)

    @property
    def open_now(self) -> frozenset[Stream]:
        return frozenset(self._open)

    def open(
        self, transport: str, owner_id: str, close: Callable[[], None], abort: Callable[[], None] = lambda: None
    ) -> Stream:
        """Count a stream from now on; leave it in the end. `close` must wake whoever waits for its next batch.

        Raises TooMany at the owner's limit, Unavailable while the server stops.
        """
        if self.draining:
            raise Unavailable("The server is about to stop. Connect again in a moment.")
        if self._owners[owner_id] >= self._limit:
            raise TooMany(f"{self._limit} streams are open already, the most one owner may have. Close one first.")
        stream = Stream(close, abort, owner_id, self)
        self._open.add(stream)
        self._owners[owner_id] += 1
        self._telemetry.count("headwater_stream_opened_total", transport=transport)
        self._watch()
        return stream

    def forget(self, stream: Stream) -> None:
        """Count it no longer. For the stream itself."""
        self._open.discard(stream)
        self._owners[stream.owner_id] -= 1
        if not self._owners[stream.owner_id]:
            del self._owners[stream.owner_id]

    def drain(self) -> None:
        """End all streams cleanly and take no new one. Must be called on the event loop."""
        if self.draining:
            return
        self.draining = True
        for stream in list(self._open):
            stream.end("draining")
        # A reader that takes nothing would hold the server up until the time-out of its write.
        self._rearm(DRAIN_TIMEOUT, self._cut_rest)

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        # One timer for all: a time-out around each of thirty thousand writes a second costs more than the writes.
        if self._timer is None:
            self._rearm(self.send_timeout / 6, self._cut_stuck)

    def _rearm(self, delay: float, then: Callable[[], None]) -> None:
        self.close()
        self._timer = asyncio.get_running_loop().call_later(delay, then)

    def _cut_stuck(self) -> None:
        self._timer = None
        limit = asyncio.get_running_loop().time() - self.send_timeout
        for stream in [one for one in self._open if one.sending_since is not None and one.sending_since < limit]:
            logger.info("a reader took nothing for %.0f s and is given up", self.send_timeout)
            stream.abort()
        if self._open:
            self._watch()

    def _cut_rest(self) -> None:
        self._timer = None
        for stream in list(self._open):
            stream.abort()


def cursor_of(text: str | None) -> Cursor | None:
    """A cursor as a client sent it; None when it sent none. Raises BadCursor."""
    return Cursor.parse(text) if text else None
