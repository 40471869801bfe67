"""Channel: one followed run, and what the feed says of it passed on to its readers."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from headwater.clock import Clock
from headwater.hub.subscription import Subscription
from headwater.streams.batch import Batch
from headwater.telemetry import Telemetry

#: One pushed batch of so many is timed: the clock and the sum are a twentieth of its way.
TIMED: Final = 8


class Tally:
    """What is told in bulk: a call of the metrics' library for each message would cost as much as its delivery."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        #: Published messages that arrived.
        self.heard = 0
        self._delays: Counter[int] = Counter()

    def delivered(self, born: int) -> None:
        """A reader was sent a pushed batch. Its stamp is of the worker's clock: what the two disagree by is in it."""
        self._delays[self._clock.now_ms() - born] += 1

    def tell(self, telemetry: Telemetry) -> None:
        heard, self.heard = self.heard, 0
        delays, self._delays = self._delays, Counter()
        if heard:
            telemetry.count("headwater_hub_batches_total", heard)
        for delay, times in delays.items():
            telemetry.observe_times("headwater_delivery_seconds", max(0, delay) / 1000, times)


class Channel:
    """One followed run. Times in seconds of the loop."""

    __slots__ = ("_loop", "_only", "_tally", "_watchdog", "check_at", "confirmed", "followers", "run_id")

    def __init__(
        self, run_id: str, loop: asyncio.AbstractEventLoop, tally: Tally, check_at: float, watchdog: float
    ) -> None:
        self.run_id = run_id
        self._loop = loop
        self._tally = tally
        self._watchdog = watchdog
        #: In order of arrival; a dict, because leaving must not cost the number of readers.
        self.followers: dict[Subscription, None] = {}
        #: The follower of a run that has one only, as most have: a look into the dict is much of a message's way.
        self._only: Subscription | None = None
        #: The feed's subscription stands.
        self.confirmed = False
        #: When the watchdog looks after it.
        self.check_at = check_at

    def add(self, subscription: Subscription) -> None:
        self._only = subscription if not self.followers else None
        self.followers[subscription] = None

    def remove(self, subscription: Subscription) -> None:
        del self.followers[subscription]
        self._only = next(iter(self.followers)) if len(self.followers) == 1 else None

    # --- what the feed says ---------------------------------------------------------------------

    def subscribed(self) -> None:
        # Also when it stood before: a confirmation may belong to an earlier subscription that was
        # taken back since, or to a connection made again. What came before it is in the log.
        reason = "resubscribed" if self.confirmed else "join"
        self.confirmed = True
        self.check_at = self._loop.time() + self._watchdog
        self._fall_behind(reason)

    def published(self, batch: Batch) -> None:
        tally = self._tally
        tally.heard += 1
        now = self._loop.time()
        self.check_at = now + self._watchdog
        if not batch.lines:
            self._fall_behind("rewritten")
            return
        batch.timed = tally.heard % TIMED == 1
        if self._only is not None:
            passed_on = self._only.offer(batch, now)
        else:
            passed_on, batch.encodings = False, {}
            for follower in self.followers:
                if follower.offer(batch, now):
                    passed_on = True
        if passed_on and batch.timed:
            tally.delivered(batch.take_born())

    def _fall_behind(self, reason: str) -> None:
        for follower in self.followers:
            follower.fall_behind(reason)
