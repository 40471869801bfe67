"""Both logs behind one set of levers, so that one suite can drive them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import redis.asyncio

from headwater.clock import FrozenClock
from headwater.events import Event, content, done
from headwater.ids import new_id
from headwater.runs import Lease, Run
from headwater.streams import keys
from headwater.streams.base import Appended, StreamLog
from headwater.streams.memory import MemoryStreamLog
from headwater.streams.redis import RedisStreamLog
from support.wait import eventually


def new_run(**fields: Any) -> Run:
    return Run(**{"id": new_id(), "kind": "chat", "owner_id": "local", "input": {}, "created_at": 1, **fields})


def texts(first: int, *pieces: str) -> list[Event]:
    """Stamped content events from seq `first` on."""
    return [content(piece).stamped(seq, 1_000 + seq) for seq, piece in enumerate(pieces, first)]


def numbered(first: int, last: int, name: str = "") -> list[Event]:
    """Content events `first` to `last` that say who wrote them and where."""
    return texts(first, *(f"{name}{seq} " for seq in range(first, last + 1)))


def end(seq: int, event: Event | None = None) -> Event:
    return (event or done()).stamped(seq, 1_000 + seq)


class World(ABC):
    """A log, and what can happen to it."""

    log: StreamLog

    @abstractmethod
    def another(self, *, ttl: int = 3600, lease_seconds: float = 10.0) -> StreamLog:
        """The log of another process, or of other settings."""

    @abstractmethod
    async def lease_runs_out(self, run_id: str) -> None: ...

    @abstractmethod
    async def ttl_runs_out(self, run_id: str) -> None: ...

    @abstractmethod
    async def lose_tail(self, run_id: str, keep: int) -> None:
        """The server came back with an older state of the log."""

    @abstractmethod
    async def save(self, run_id: str) -> Callable[[], Coroutine[Any, Any, None]]:
        """What brings the log back as it is now: a server that starts again and has lost what came later."""

    @abstractmethod
    async def lose_sight(self, run_id: str) -> None:
        """An index of what may be due lost this run."""

    @abstractmethod
    async def look_soon(self, run_id: str) -> None:
        """An index of what may be due names this run before its time: it must be asked, not trusted."""

    @abstractmethod
    async def close(self) -> None: ...

    async def events(self, run_id: str) -> list[Event]:
        events: list[Event] = []
        while (page := await self.log.read(run_id, len(events), 10_000)) is not None and page.events:
            events += page.events
        return events

    async def written(self, run: Run, count: int, holder: str = "worker") -> Lease:
        """A claimed run with `count` events."""
        lease = await self.log.claim(run, holder)
        await self.log.append(lease, numbered(1, count))
        return lease


class MemoryWorld(World):
    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.log = self.memory = MemoryStreamLog(ttl=3600, lease_seconds=10, clock=self.clock)

    def another(self, *, ttl: int = 3600, lease_seconds: float = 10.0) -> StreamLog:
        other = MemoryStreamLog(ttl=ttl, lease_seconds=lease_seconds, clock=self.clock)
        # Two views of one world: what two processes are to one server.
        other._logs, other._feeds = self.memory._logs, self.memory._feeds
        return other

    async def lease_runs_out(self, run_id: str) -> None:
        meta = await self.log.meta(run_id)
        assert meta is not None
        self.clock.advance(meta.lease_left / 1000)

    async def ttl_runs_out(self, run_id: str) -> None:
        log = self.memory._logs[run_id]
        self.clock.advance((log.expires_at - self.clock.now_ms()) / 1000)

    async def lose_tail(self, run_id: str, keep: int) -> None:
        del self.memory._logs[run_id].events[keep:]

    async def save(self, run_id: str) -> Callable[[], Coroutine[Any, Any, None]]:
        saved = copy.deepcopy(self.memory._logs.get(run_id))

        async def load() -> None:
            await self.memory.forget(run_id)
            if saved is not None:
                self.memory._logs[run_id] = copy.deepcopy(saved)

        return load

    async def lose_sight(self, run_id: str) -> None:
        """It has no such index."""

    async def look_soon(self, run_id: str) -> None:
        """It has no such index."""

    async def close(self) -> None:
        await self.log.close()


class PackingLog(RedisStreamLog):
    """Packs every log as soon as it has ended, to show that nobody can tell."""

    async def append(self, lease: Lease, events: Sequence[Event]) -> Appended:
        answer = await super().append(lease, events)
        await self._pack_ended(lease.run_id)
        return answer

    async def restore(self, lease: Lease, run: Run, events: Sequence[Event]) -> Appended:
        answer = await super().restore(lease, run, events)
        await self._pack_ended(lease.run_id)
        return answer

    async def _pack_ended(self, run_id: str) -> None:
        meta = await self.meta(run_id)
        if meta is not None and meta.status.terminal:
            await self._pack(meta)


class RedisWorld(World):
    kind: type[RedisStreamLog] = RedisStreamLog

    def __init__(self, url: str) -> None:
        self.url = url
        self._logs: list[StreamLog] = []
        self.log = self.another()
        self.raw: Any = redis.asyncio.Redis.from_url(url, decode_responses=True, protocol=2)

    def another(self, *, ttl: int = 3600, lease_seconds: float = 10.0) -> StreamLog:
        log = self.kind(self.url, ttl=ttl, lease_seconds=lease_seconds)
        self._logs.append(log)
        return log

    async def lease_runs_out(self, run_id: str) -> None:
        async def ran_out() -> bool:
            meta = await self.log.meta(run_id)
            return meta is not None and meta.lease_left == 0

        await eventually(ran_out)

    async def ttl_runs_out(self, run_id: str) -> None:
        async def gone() -> bool:
            return not await self.raw.exists(keys.metadata(run_id))

        await eventually(gone)

    async def lose_tail(self, run_id: str, keep: int) -> None:
        await self.raw.ltrim(keys.chunks(run_id), 0, keep - 1)
        await self.raw.hset(keys.metadata(run_id), "chunk_count", keep)

    async def save(self, run_id: str) -> Callable[[], Coroutine[Any, Any, None]]:
        names = (keys.metadata(run_id), keys.chunks(run_id), keys.run(run_id))
        saved = {name: await self.raw.execute_command("DUMP", name, NEVER_DECODE=True) for name in names}

        async def load() -> None:
            await self.raw.delete(*names)
            for name in [name for name in names if saved[name] is not None]:
                await self.raw.restore(name, 100_000, saved[name])
            if saved[names[0]] is not None:
                await self.raw.hset(names[0], "server", "another")

        return load

    async def lose_sight(self, run_id: str) -> None:
        await self.raw.zrem(keys.DUE, run_id)

    async def look_soon(self, run_id: str) -> None:
        await self.raw.zadd(keys.DUE, {run_id: 0})

    async def close(self) -> None:
        for log in self._logs:
            await log.close()
        await self.raw.aclose()


class PackedWorld(RedisWorld):
    kind = PackingLog


def seqs(events: Sequence[Event]) -> list[int]:
    return [event.seq for event in events]
