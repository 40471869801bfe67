"""A log whose push is as bad as a network can make it, and a loop whose time passes by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from headwater.errors import LogUnavailable
from headwater.streams.base import Feed, FeedSink, Meta, Page
from headwater.streams.batch import Batch
from headwater.streams.memory import MemoryFeed, MemoryStreamLog


class RoughFeed(Feed):
    """Between a feed and its sink: holds, loses, repeats and reorders messages, and breaks."""

    def __init__(self, inner: MemoryFeed) -> None:
        self._inner = inner
        self._followed: dict[str, None] = {}
        self.sink: FeedSink | None = None
        #: Messages under way, oldest first: `("subscribed", run)` or `("published", run, batch)`.
        self.mail: list[tuple[Any, ...]] = []
        #: Messages stay in `mail` until `deliver`.
        self.holding = False
        self.connected = True

    async def start(self, sink: FeedSink) -> None:
        self.sink = sink
        await self._inner.start(self)

    def follow(self, run_id: str) -> None:
        self._followed[run_id] = None
        if self.connected:
            self._inner.follow(run_id)

    def unfollow(self, run_id: str) -> None:
        self._followed.pop(run_id, None)
        self._inner.unfollow(run_id)

    @property
    def followed(self) -> list[str]:
        return list(self._followed)

    async def stop(self) -> None:
        await self._inner.stop()

    # --- as the inner feed's sink ---------------------------------------------------------------

    def subscribed(self, run_id: str) -> None:
        self._take_in(("subscribed", run_id))

    def published(self, run_id: str, batch: Batch) -> None:
        self._take_in(("published", run_id, batch))

    def lost(self) -> None:
        raise AssertionError("a feed in memory does not break")

    def _take_in(self, message: tuple[Any, ...]) -> None:
        if self.connected:
            self.mail.append(message)
            if not self.holding:
                self.deliver(len(self.mail))

    # --- levers ---------------------------------------------------------------------------------

    def deliver(self, count: int = 1) -> None:
        for _ in range(min(count, len(self.mail))):
            self.hand_over(self.mail.pop(0))

    def hand_over(self, message: tuple[Any, ...]) -> None:
        assert self.sink is not None
        kind, *arguments = message
        getattr(self.sink, kind)(*arguments)

    def sever(self) -> None:
        """The connection breaks: what was under way is gone, and so is what is published until `mend`."""
        if self.connected:
            self.connected = False
            self.mail.clear()
            for run_id in self._followed:
                self._inner.unfollow(run_id)
            assert self.sink is not None
            self.sink.lost()

    def mend(self) -> None:
        """Connected again, and every subscription confirmed anew."""
        if not self.connected:
            self.connected = True
            for run_id in self._followed:
                self._inner.follow(run_id)


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
