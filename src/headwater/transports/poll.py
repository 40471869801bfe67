"""Events by polling, for clients that cannot keep a stream: one page, or a wait until there is one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from headwater.access import Caller
from headwater.events import Cursor, Event
from headwater.hub import Hub
from headwater.transports.base import May, Read, Streams

#: Seconds a request may wait for the next event.
MAX_WAIT: Final = 30.0
#: Events of one answer.
MAX_LIMIT: Final = 1000


@dataclass(frozen=True, slots=True)
class Polled:
    """One answer."""

    events: Sequence[Event]
    #: Send it as `after` next time. None while there is no log yet.
    cursor: Cursor | None
    #: The log the caller's cursor belongs to is gone: forget what was shown, these events begin anew.
    reset: bool
    #: The run has ended and nothing follows these events.
    done: bool


class Poll:
    """Events of one run after a cursor."""

    def __init__(self, hub: Hub, streams: Streams, *, may: May, read: Read) -> None:
        self._hub = hub
        self._streams = streams
        self._may = may
        self._read = read

    async def events(self, caller: Caller, run_id: str, after: Cursor | None, wait: float, limit: int) -> Polled:
        """At most `limit` events; when there are none yet, the first to come within `wait` seconds.

        Raises NotFound, TooMany, LogUnavailable.
        """
        await self._may(caller, run_id)
        answer = await self._page(run_id, after, limit)
        if answer.events or answer.reset or answer.done or wait <= 0:
            return answer
        return await self._wait(caller, run_id, answer.cursor, wait, limit)

    async def _page(self, run_id: str, after: Cursor | None, limit: int) -> Polled:
        page = await self._read(run_id, after.seq if after else 0, limit)
        if page is None:
            return Polled((), after, reset=False, done=False)
        # As the hub sees it: where nothing was shown, any log will do.
        reset = after is not None and after.seq > 0 and (after.epoch != page.epoch or after.seq > page.count)
        if reset:
            page = await self._read(run_id, 0, limit)
            if page is None or (page.count == 0 and not page.closed):
                # Lost, perhaps begun again, but still empty: its writer may be about to restore it.
                return Polled((), after, reset=False, done=False)
        last = page.events[-1].seq if page.events else (after.seq if after and not reset else 0)
        return Polled(page.events, Cursor(page.epoch, last), reset=reset, done=page.closed and last >= page.count)

    async def _wait(self, caller: Caller, run_id: str, after: Cursor | None, wait: float, limit: int) -> Polled:
        # The hub reads the log after its subscription stands, so nothing that came since the page is missed.
        subscription = self._hub.subscribe(run_id, after)
        try:
            with self._streams.open("poll", caller.owner_id, subscription.close):
                async with asyncio.timeout(wait):
                    while (batch := await subscription.next()) is not None:
                        if batch.events or batch.reset:
                            events = batch.events[:limit]
                            last = events[-1] if events else None
                            cursor = Cursor(batch.epoch, last.seq if last else 0)
                            return Polled(events, cursor, batch.reset, last is not None and last.terminal)
        except TimeoutError:
            return Polled((), after, reset=False, done=False)
        finally:
            subscription.close()
        # The subscription ended: the run had, at this cursor, or the server stops.
        return Polled((), after, reset=False, done=not self._streams.draining)
