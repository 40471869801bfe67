"""A log whose push is as bad as a network can make it, and a loop whose time passes by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from headwater.errors import LogUnavailable
from headwater.streams.base import Feed, Follower, Meta, Page
from headwater.streams.batch import Batch
from headwater.streams.memory import MemoryFeed, MemoryStreamLog


class RoughFeed(Feed):
    """Between a feed and its followers: holds, loses, repeats and reorders messages, and breaks."""

    def __init__(self, inner: MemoryFeed) -> None:
        self._inner = inner
        self._followers: dict[str, Follower] = {}
        self._lost: Callable[[], None] | None = None
        #: Messages under way, oldest first: `("subscribed", run)` or `("published", run, batch)`.
        self.mail: list[tuple[Any, ...]] = []
        #: Messages stay in `mail` until `deliver`.
        self.holding = False
        self.connected = True

    async def start(self, lost: Callable[[], None]) -> None:
        self._lost = lost
        await self._inner.start(_never)

    def follow(self, run_id: str, follower: Follower) -> None:
        self._followers[run_id] = follower
        if self.connected:
            self._inner.follow(run_id, _Mailer(self, run_id))

    def unfollow(self, run_id: str) -> None:
        self._followers.pop(run_id, None)
        self._inner.unfollow(run_id)

    @property
    def followed(self) -> list[str]:
        return list(self._followers)

    async def stop(self) -> None:
        await self._inner.stop()

    def take_in(self, message: tuple[Any, ...]) -> None:
        if self.connected:
            self.mail.append(message)
            if not self.holding:
                self.deliver(len(self.mail))

    # --- levers ---------------------------------------------------------------------------------

    def deliver(self, count: int = 1) -> None:
        for _ in range(min(count, len(self.mail))):
            self.hand_over(self.mail.pop(0))

    def hand_over(self, message: tuple[Any, ...]) -> None:
        kind, run_id, *arguments = message
        # Whoever follows the run now, as over a real connection.
        if (follower := self._followers.get(run_id)) is not None:
            getattr(follower, kind)(*arguments)

    def sever(self) -> None:
        """The connection breaks: what was under way is gone, and so is what is published until `mend`."""
        if self.connected:
            self.connected = False
            self.mail.clear()
            for run_id in self._followers:
                self._inner.unfollow(run_id)
            assert self._lost is not None
            self._lost()

    def mend(self) -> None:
        """Connected again, and every subscription confirmed anew."""
        if not self.connected:
            self.connected = True
            for run_id in self._followers:
                self._inner.follow(run_id, _Mailer(self, run_id))


class _Mailer:
    """What a run's follower is to hear goes by mail."""

    def __init__(self, feed: RoughFeed, run_id: str) -> None:
        self._feed = feed
        self._run_id = run_id

    def subscribed(self) -> None:
        self._feed.take_in(("subscribed", self._run_id))

    def published(self, batch: Batch) -> None:
        self._feed.take_in(("published", self._run_id, batch))


def _never() -> None:
    raise AssertionError("a feed in memory does not break")


class RoughLog(MemoryStreamLog):
    """A log in memory that can be away, with a rough feed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.push = RoughFeed(super().feed())
        self.away = False
        #: Positions that were read from.
        self.reads: list[int] = []
        #: Reads wait for it, after they took their page: what comes meanwhile is not in it.
        self.gate = asyncio.Event()
        self.gate.set()

    def feed(self) -> RoughFeed:  # type: ignore[override]  # only the hub's one connection is rough
        return self.push

    async def read(self, run_id: str, after: int, limit: int) -> Page | None:
        self._there()
        self.reads.append(after)
        page = await super().read(run_id, after, limit)
        if page is not None:
            page = Page(page.epoch, list(page.events), page.count, page.closed)
        await self.gate.wait()
        return page

    async def metas(self, run_ids: Sequence[str]) -> list[Meta | None]:
        self._there()
        return await super().metas(run_ids)

    def _there(self) -> None:
        if self.away:
            raise LogUnavailable("The log is away for a test.")


class VirtualLoop(asyncio.SelectorEventLoop):
    """When all wait for a time, it is that time: hours pass at once, and always in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]
