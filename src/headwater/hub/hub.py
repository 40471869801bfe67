"""Hub: the followed runs of a process, and what the feed says about them."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from headwater.clock import Clock, SystemClock
from headwater.errors import LogUnavailable, Unavailable
from headwater.events import Cursor
from headwater.hub.channel import Channel, Tally
from headwater.hub.subscription import Subscription
from headwater.service import Service
from headwater.streams.base import Feed, Page, StreamLog
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Events in one read of a log.
PAGE: Final = 512
#: Reads of the log at once, and seconds to wait for one's turn. A thousand readers that fall behind together would take
#: every connection to Redis, run into each other's time-outs, and keep messages from being accepted.
READS: Final = 16
TURN: Final = 3.0
#: Bytes a reader of one run among many may leave unread at least.
LEAST_PENDING: Final = 4096
#: Metas asked for in one round trip, so that the loop is free again in between.
METAS: Final = 256
#: Seconds after which a channel that the feed has not confirmed is looked after; the feed may be away for long.
UNCONFIRMED: Final = 1.0


class History(Protocol):
    """Events synthesised from what is stored, for runs whose log has expired."""

    async def page(self, run_id: str) -> Page | None:
        """All events under an epoch of its own, closed. None when the run is unknown or has not ended."""


class Hub(Service):
    """Followed runs and their readers. Times in seconds, `max_pending` in bytes of pushed events per reader."""

    def __init__(
        self,
        log: StreamLog,
        *,
        history: History | None,
        telemetry: Telemetry,
        heartbeat: float = 15.0,
        watchdog: float = 5.0,
        max_pending: int = 262_144,
        clock: Clock | None = None,
    ) -> None:
        super().__init__("hub")
        self.log = log
        self.history = history
        self.telemetry = telemetry
        self.max_pending = max_pending
        self._heartbeat = heartbeat
        self._watchdog = watchdog
        self._tally = Tally(clock or SystemClock())
        self._loop: asyncio.AbstractEventLoop
        self._feed: Feed | None = None
        self._channels: dict[str, Channel] = {}
        self._readers = 0
        self._turns = asyncio.Semaphore(READS)

    def subscribe(self, run_id: str, after: Cursor | None, among: int = 1) -> Subscription:
        """Follow a run from after the cursor, or from its first event. Registers at once; close it in the end.

        `among`: how many runs the same reader follows. They share what it may leave unread.
        """
        if self._feed is None:
            raise RuntimeError("The hub is not started.")
        bound = self.max_pending if among == 1 else max(self.max_pending // among, LEAST_PENDING)
        subscription = Subscription(self, run_id, after, self._loop, bound)
        if self.draining.is_set():
            subscription.drain()
            return subscription
        channel = self._channels.get(run_id)
        if channel is None:
            check_at = self._loop.time() + min(UNCONFIRMED, self._watchdog)
            channel = Channel(run_id, self._loop, self._tally, check_at, self._watchdog)
            self._channels[run_id] = channel
            self._feed.follow(run_id, channel)
        channel.add(subscription)
        self._readers += 1
        self.telemetry.gauge("headwater_readers", self._readers)
        if channel.confirmed:
            subscription.fall_behind("join")
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Forget a reader. Harmless the second time."""
        channel = self._channels.get(subscription.run_id)
        if channel is None or subscription not in channel.followers:
            return
        channel.remove(subscription)
        self._readers -= 1
        self.telemetry.gauge("headwater_readers", self._readers)
        if not channel.followers:
            del self._channels[channel.run_id]
            if self._feed is not None:
                self._feed.unfollow(channel.run_id)

    def delivered(self, born: int) -> None:
        """A reader was sent a pushed batch whose first event was made at `born`, Unix milliseconds."""
        self._tally.delivered(born)

    async def page(self, run_id: str, after: int) -> Page | None:
        """The next events of the log, or all of the history when there is no log. Raises Unavailable."""
        try:
            async with asyncio.timeout(TURN):
                await self._turns.acquire()
        except TimeoutError:
            raise LogUnavailable("Too many readers read the log at once.") from None
        try:
            page = await self.log.read(run_id, after, PAGE)
        finally:
            self._turns.release()
        if page is None and self.history is not None:
            page = await self.history.page(run_id)
        return page

    def _lost(self) -> None:
        """The feed's connection broke. Every subscription will be confirmed anew."""
        self.telemetry.count("headwater_hub_reconnects_total")
        check_at = self._loop.time() + min(UNCONFIRMED, self._watchdog)
        for channel in self._channels.values():
            channel.confirmed = False
            channel.check_at = min(channel.check_at, check_at)

    # --- the service ----------------------------------------------------------------------------

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._feed = self.log.feed()
        await self._feed.start(self._lost)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            tasks.create_task(self._watch())

    async def drain(self) -> None:
        await super().drain()
        for channel in list(self._channels.values()):
            for follower in list(channel.followers):
                follower.drain()

    async def close(self) -> None:
        await self.drain()
        feed, self._feed = self._feed, None
        if feed is not None:
            await feed.stop()
        self._tally.tell(self.telemetry)

    async def _beat(self) -> None:
        """Wake readers that have been quiet, early enough that none is quiet for longer than `heartbeat`."""
        tick = self._heartbeat / 10
        while True:
            await asyncio.sleep(tick)
            before = self._loop.time() - self._heartbeat + tick
            for channel in self._channels.values():
                for follower in channel.followers:
                    follower.beat(before)

    async def _watch(self) -> None:
        """Look after channels that have been silent: the message that would tell may have been lost."""
        while True:
            await asyncio.sleep(min(UNCONFIRMED, self._watchdog) / 2)
            self._tally.tell(self.telemetry)
            now = self._loop.time()
            silent = [channel for channel in self._channels.values() if channel.check_at <= now]
            for at in range(0, len(silent), METAS):
                some = silent[at : at + METAS]
                try:
                    metas = await self.log.metas([channel.run_id for channel in some])
                except Unavailable as error:
                    logger.info("The watchdog cannot look: %s", error)
                    break
                for channel, meta in zip(some, metas, strict=True):
                    channel.check_at = self._loop.time() + self._watchdog
                    for follower in channel.followers:
                        follower.compare(meta)
