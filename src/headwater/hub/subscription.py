"""Subscription: one reader's position in a run, and how it goes on from there."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from headwater.errors import Unavailable
from headwater.events import Cursor
from headwater.streams.base import Meta, Page
from headwater.streams.batch import Batch
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds before a failed read is tried again; doubles, with jitter.
FIRST_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 2.0


class Source(Protocol):
    """What a subscription needs of its hub."""

    telemetry: Telemetry

    async def page(self, run_id: str, after: int) -> Page | None: ...

    def leave(self, subscription: Subscription) -> None: ...


class Subscription:
    """One reader of one run. `next` may be cancelled and called again; one caller at a time.

    While somebody waits in it, and the reader is live, a pushed batch that continues the position goes to `push`
    first, if that is set: it returns True once it has passed the batch on, and nobody is woken. It must not block and
    must not close the subscription.
    """

    __slots__ = (
        "_backoff",
        "_beat_due",
        "_behind",
        "_epoch",
        "_hub",
        "_live",
        "_loop",
        "_max_pending",
        "_overflowed",
        "_pending",
        "_pending_bytes",
        "_reason",
        "_retry_at",
        "_returned_at",
        "_seq",
        "_waiter",
        "drained",
        "over",
        "push",
        "run_id",
    )

    def __init__(
        self, hub: Source, run_id: str, after: Cursor | None, loop: asyncio.AbstractEventLoop, max_pending: int
    ) -> None:
        """`max_pending`: bytes of pushed events it may leave unread."""
        self.run_id = run_id
        self.push: Callable[[Batch], bool] | None = None
        #: The end: the terminal event was handed out, or see `drained`.
        self.over = False
        #: `next` gave None because the server is stopping, not because the stream ended: come again elsewhere.
        self.drained = False
        self._hub = hub
        self._loop = loop
        #: The position: the last event handed out. With seq 0 nothing was shown and any epoch will do.
        self._epoch = after.epoch if after is not None else ""
        self._seq = after.seq if after is not None else 0
        #: What was pushed; may repeat what was read and may have holes.
        #: A list: nearly always empty, and an empty deque is a twentieth of an idle reader's memory.
        self._pending: list[Batch] = []
        self._pending_bytes = 0
        #: Pushed batches are dropped until the next read begins.
        self._overflowed = False
        #: The log may hold more than what was handed out or is pending.
        self._behind = False
        self._reason = "join"
        self._max_pending = max_pending
        self._waiter: asyncio.Future[None] | None = None
        #: `push` while somebody waits and what is pushed may be next; also after a wait that was cancelled.
        self._live: Callable[[Batch], bool] | None = None
        self._beat_due = False
        self._returned_at = loop.time()
        self._retry_at = 0.0
        self._backoff = FIRST_BACKOFF

    async def next(self) -> Batch | None:
        """The next batch, or None once it is `over`.

        Waits while nothing happens; never raises because a server is away.
        """
        while True:
            while (waiting := self.ready()) is not None:
                await waiting
            batch = await self.take()
            if batch is not None or self.over:
                return batch

    def ready(self) -> Awaitable[None] | None:
        """What to wait for before asking again; None once `take` may have something, or it is `over`.

        The caller waits, not a coroutine of ours: suspended ones are a good part of an idle reader's memory.
        """
        if self._pending or self.over or self._beat_due or self._is_due():
            self._waiter = self._live = None
            return None
        self._waiter = self._loop.create_future()
        if self._behind:
            return self._until_retry(self._waiter)
        self._live = self.push
        return self._waiter

    async def _until_retry(self, waiter: asyncio.Future[None]) -> None:
        timer = self._loop.call_at(self._retry_at, self._wake)
        try:
            await waiter
        finally:
            timer.cancel()

    async def take(self) -> Batch | None:
        """What there is now, read from the log if need be. None when that was nothing after all: wait again."""
        batch = self._take()
        if batch is None and self._is_due():
            batch = await self._catch_up()
        if batch is None and self._beat_due and not self._pending and not self.over:
            self._beat_due = False
            batch = Batch(self._epoch)
        if batch is not None:
            self._returned_at = self._loop.time()
        return batch

    def close(self) -> None:
        """Leave. A `next` that waits returns None."""
        self.over = True
        self._pending.clear()
        self._pending_bytes = 0
        self._hub.leave(self)
        self._wake()

    # --- what the hub says ----------------------------------------------------------------------

    def offer(self, batch: Batch, now: float) -> bool:
        """Take what was pushed at the loop's time `now`. True when it was passed on at once.

        That is when somebody waits, nothing else is due, and the batch goes on where we stand without ending the run.
        """
        push, epoch = self._live, batch.epoch
        if (
            push is not None
            and batch.first == self._seq + 1
            and (epoch == self._epoch or self._seq == 0)
            and not batch.terminal
            and push(batch)
        ):
            self._epoch = epoch
            self._seq = batch.last
            self._returned_at = now
            return True
        self._keep(batch)
        return False

    def _keep(self, batch: Batch) -> None:
        if self._overflowed:
            return
        self._pending.append(batch)
        self._pending_bytes += batch.size
        if self._pending_bytes > self._max_pending:
            # The log holds it all; a reader that cannot keep up reads it there, at its own pace.
            self._pending.clear()
            self._pending_bytes = 0
            self._overflowed = True
            self.fall_behind("slow")
        else:
            self._wake()

    def fall_behind(self, reason: str) -> None:
        self._behind = True
        self._reason = reason
        self._retry_at = 0.0
        self._wake()

    def compare(self, meta: Meta | None) -> None:
        """The watchdog's look: is the log elsewhere than this reader?"""
        if self._pending or (self._behind and self._retry_at > self._loop.time()):
            return
        if meta is None or meta.status.terminal or meta.epoch != self._epoch or meta.count != self._seq:
            self.fall_behind("watchdog")

    def beat(self, before: float) -> None:
        if self._waiter is not None and self._returned_at <= before:
            self._beat_due = True
            self._wake()

    def drain(self) -> None:
        if not self.over:
            self.drained = True
            self.close()

    # --- inside ---------------------------------------------------------------------------------

    def _take(self) -> Batch | None:
        """What continues at our position among what was pushed."""
        while self._pending:
            batch = self._pending.pop(0)
            self._pending_bytes -= batch.size
            first, last = batch.first, batch.last
            if (batch.epoch != self._epoch and self._seq > 0) or first > self._seq + 1:
                # Dropped: the read that follows is later than its publishing, so it is in there.
                self.fall_behind("hole")
            elif last > self._seq:
                if first <= self._seq:
                    batch = Batch(batch.epoch, batch.events[self._seq + 1 - first :])
                self._advance(batch)
                return batch
        return None

    def _advance(self, batch: Batch) -> None:
        self._epoch = batch.epoch
        self._seq = batch.last
        self._beat_due = False
        if batch.terminal:
            self._finish()

    def _finish(self) -> None:
        self._behind = False
        self.close()

    async def _catch_up(self) -> Batch | None:
        """One read of the log. None when it holds nothing new, or cannot be read now."""
        # Before the read, so that whatever is said meanwhile leads to a further one.
        self._behind = self._overflowed = False
        self._hub.telemetry.count("headwater_hub_rereads_total", reason=self._reason)
        try:
            page = await self._hub.page(self.run_id, self._seq)
        except Unavailable as error:
            logger.info("Run %s cannot be read now: %s", self.run_id, error)
            self._behind = True
            self._retry_at = self._loop.time() + self._backoff * random.uniform(0.5, 1.5)
            self._backoff = min(self._backoff * 2, MAX_BACKOFF)
            return None
        except BaseException:
            self._behind = True
            raise
        self._backoff = FIRST_BACKOFF
        return self._accept(page) if page is not None and not self.over else None

    def _accept(self, page: Page) -> Batch | None:
        """Go on from our position with what was read."""
        ended = page.closed and page.epoch == self._epoch and self._seq >= page.count
        if ended:
            self._finish()
            return None
        if self._seq > 0 and (page.epoch != self._epoch or self._seq > page.count):
            if page.count == 0 and not page.closed:
                # Lost and begun again, but still empty. Its writer may be about to restore it, so let what is
                # shown stand until there is something to show instead.
                return None
            self._epoch, self._seq = page.epoch, 0
            self._behind, self._reason = True, "reset"
            return Batch(page.epoch, reset=True)
        self._epoch = page.epoch
        events = [event for event in page.events if event.seq > self._seq]
        if not events:
            if page.closed:
                self._finish()
            return None
        batch = Batch(page.epoch, events)
        self._advance(batch)
        if self._seq < page.count and not self.over:
            self._behind, self._reason = True, "page"
        return batch

    def _is_due(self) -> bool:
        return self._behind and self._loop.time() >= self._retry_at

    def _wake(self) -> None:
        waiter, self._waiter, self._live = self._waiter, None, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
