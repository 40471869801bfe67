"""MemoryStreamLog: the same log inside one process, for programs and tests that need no Redis.

Everything happens on one event loop, so every method is atomic by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from headwater.clock import Clock, SystemClock
from headwater.errors import Fenced, LeaseHeld, LogClosed, LogLost
from headwater.events import Event
from headwater.runs import Lease, Run, RunState
from headwater.streams.base import (
    ENDS,
    LIVE_TTL,
    PAGE_BYTES,
    Appended,
    Due,
    Feed,
    Follower,
    Meta,
    Page,
    Renewed,
    StreamLog,
    new_epoch,
)
from headwater.streams.batch import Batch

#: Milliseconds between two sweeps for what expired.
PURGE_MS: Final = 10_000


@dataclass(slots=True)
class _Log:
    run: Run
    epoch: str
    attempt: int
    created_at: int
    updated_at: int
    expires_at: int
    due_at: int
    status: RunState = RunState.QUEUED
    holder: str = ""
    lease_until: int = 0
    cancelled: bool = False
    events: list[Event] = field(default_factory=list)
    behind: set[str] = field(default_factory=set)


class MemoryStreamLog(StreamLog):
    """Logs in this process's memory. Share the object: every instance is a world of its own."""

    def __init__(self, *, ttl: int = 3600, lease_seconds: float = 10.0, clock: Clock | None = None) -> None:
        self._ttl_ms = ttl * 1000
        self._live_ms = max(ttl, LIVE_TTL) * 1000
        self._lease_ms = round(lease_seconds * 1000)
        self._clock = clock or SystemClock()
        self._logs: dict[str, _Log] = {}
        self._feeds: set[MemoryFeed] = set()
        self._purged_at = 0
        self._workers: dict[str, int] = {}

    # --- the writer -----------------------------------------------------------------------------

    async def open(self, run: Run, grace: float) -> None:
        now = self._clock.now_ms()
        self._purge(now)
        log = self._find(run.id)
        due_at = now + round(grace * 1000)
        if log is None:
            self._logs[run.id] = _Log(run, new_epoch(), run.attempt, now, now, now + self._live_ms, due_at)
        elif log.status is RunState.QUEUED:
            log.due_at = due_at

    async def claim(self, run: Run, holder: str) -> Lease:
        now = self._clock.now_ms()
        log = self._find(run.id)
        if log is None:
            log = _Log(run, new_epoch(), run.attempt, now, now, now, now)
            self._logs[run.id] = log
        if log.status.terminal:
            raise LogClosed(f"Run {run.id} has ended as {log.status}.")
        left = log.lease_until - now
        if left > 0 and log.holder != holder:
            raise LeaseHeld(f"Run {run.id} is held by {log.holder} for {left} ms more.", left=left)
        log.run, log.holder, log.status = run, holder, RunState.RUNNING
        # The holder itself while its lease runs: its reply was lost, and it is the same attempt.
        if left <= 0 or log.attempt <= run.attempt:
            log.attempt = max(log.attempt, run.attempt) + 1
        log.updated_at = now
        self._extend(log, now)
        return Lease(run.id, log.attempt, holder, log.epoch, len(log.events), log.cancelled)

    async def append(self, lease: Lease, events: Sequence[Event]) -> Appended:
        log = self._held(lease)
        first, last = events[0].seq, events[-1].seq
        there = len(log.events) - first + 1
        same = min(there, len(events))
        if same > 0 and log.events[first + same - 2].encode() != events[same - 1].encode():
            raise _fenced(lease)
        if there >= len(events):
            if log.status is RunState.RUNNING:
                self._extend(log, self._clock.now_ms())
            return Appended(len(log.events), log.cancelled)
        if log.status.terminal:
            raise LogClosed(f"Run {lease.run_id} has ended.")
        if there < 0:
            raise _lost(lease)
        self._write(log, events[there:])
        return Appended(last, log.cancelled)

    async def restore(self, lease: Lease, run: Run, events: Sequence[Event]) -> Appended:
        now = self._clock.now_ms()
        log = self._find(lease.run_id)
        if log is None:
            log = _Log(run, "", 0, now, now, now, now)
            self._logs[lease.run_id] = log
        ours = (log.epoch, log.holder) == (lease.epoch, lease.holder)
        in_other_hands = log.attempt == lease.attempt and not ours and (log.holder != "" or log.epoch == lease.epoch)
        if log.attempt > lease.attempt or in_other_hands:
            raise _fenced(lease)
        if log.status.terminal:
            if ours and len(log.events) >= len(events):
                return Appended(len(log.events), log.cancelled)
            raise LogClosed(f"Run {lease.run_id} has ended.")
        if not ours or log.attempt != lease.attempt:
            log.events.clear()
        log.run, log.epoch, log.attempt, log.holder = run, lease.epoch, lease.attempt, lease.holder
        log.status = RunState.RUNNING
        log.events += events[len(log.events) :]
        log.updated_at = now
        self._extend(log, now)
        if events and events[-1].terminal:
            self._end(log, events[-1])
        self._publish(log, ())
        return Appended(len(log.events), log.cancelled)

    async def renew(self, leases: Sequence[Lease]) -> list[Renewed]:
        return [self._renew(lease) for lease in leases]

    def _renew(self, lease: Lease) -> Renewed:
        try:
            log = self._held(lease)
        except LogLost:
            return Renewed.LOST
        except Fenced:
            return Renewed.FENCED
        if log.status is not RunState.RUNNING:
            return Renewed.FENCED
        self._extend(log, self._clock.now_ms())
        return Renewed.CANCELLED if log.cancelled else Renewed.HELD

    async def release(self, lease: Lease) -> None:
        try:
            log = self._held(lease)
        except (Fenced, LogLost):
            return
        if log.status is RunState.RUNNING:
            now = self._clock.now_ms()
            log.status, log.holder, log.lease_until = RunState.QUEUED, "", 0
            log.updated_at = log.due_at = now

    async def park(self, run: Run, behind: Sequence[str], grace: float) -> None:
        await self.open(run, grace)
        for log in map(self._find, behind):
            if log is not None:
                log.behind.add(run.id)

    async def parked(self, run_id: str) -> list[Run]:
        log = self._find(run_id)
        found = map(self._find, sorted(log.behind)) if log is not None else ()
        return [one.run for one in found if one is not None]

    async def cancel(self, run_id: str) -> Meta | None:
        log = self._find(run_id)
        if log is not None and not log.status.terminal:
            log.cancelled = True
            log.updated_at = self._clock.now_ms()
        return await self.meta(run_id)

    async def forget(self, run_id: str) -> None:
        self._logs.pop(run_id, None)

    # --- the reader -----------------------------------------------------------------------------

    async def metas(self, run_ids: Sequence[str]) -> list[Meta | None]:
        return [self._meta(self._find(run_id)) for run_id in run_ids]

    async def read(self, run_id: str, after: int, limit: int) -> Page | None:
        log = self._find(run_id)
        if log is None:
            return None
        events: list[Event] = []
        size = 0
        for event in islice(log.events, after, after + limit):
            events.append(event)
            size += len(event.encode())
            if size >= PAGE_BYTES:
                break
        return Page(log.epoch, events, len(log.events), log.status.terminal)

    async def due(self, limit: int, skip: int = 0) -> list[Due]:
        now = self._clock.now_ms()
        waiting = [log for log in self._logs.values() if not log.status.terminal and log.due_at <= now]
        waiting.sort(key=lambda log: log.due_at)
        return [Due(log.run.id, log.run, self._meta(log)) for log in waiting[skip : skip + limit]]

    async def remind(self, run_ids: Sequence[str], seconds: float) -> None:
        """It looks at the logs themselves and can lose sight of none."""

    async def beat(self, worker: str, seconds: float) -> None:
        self._workers[worker] = self._clock.now_ms() + round(seconds * 1000)

    async def workers(self) -> list[str]:
        now = self._clock.now_ms()
        self._workers = {name: until for name, until in self._workers.items() if until >= now}
        return sorted(self._workers)

    async def depth(self, *queues: str) -> int:
        return 0

    def feed(self) -> MemoryFeed:
        return MemoryFeed(self._feeds)

    async def ping(self) -> None:
        """It is here."""

    async def close(self) -> None:
        self._logs.clear()

    # --- inside ---------------------------------------------------------------------------------

    def _find(self, run_id: str) -> _Log | None:
        log = self._logs.get(run_id)
        if log is not None and log.expires_at <= self._clock.now_ms():
            del self._logs[run_id]
            return None
        return log

    def _purge(self, now: int) -> None:
        if now - self._purged_at >= PURGE_MS:
            self._purged_at = now
            for run_id in [run_id for run_id, log in self._logs.items() if log.expires_at <= now]:
                del self._logs[run_id]

    def _held(self, lease: Lease) -> _Log:
        """The log, if this lease is the one that may write it. Raises Fenced, LogLost."""
        log = self._find(lease.run_id)
        if log is None or log.attempt < lease.attempt:
            raise _lost(lease)
        if log.attempt > lease.attempt:
            raise _fenced(lease)
        if log.epoch != lease.epoch and log.holder == "":
            # Forgotten and announced again, but claimed by nobody: the one who still holds it may restore it.
            raise _lost(lease)
        if (log.epoch, log.holder) != (lease.epoch, lease.holder):
            raise _fenced(lease)
        return log

    def _extend(self, log: _Log, now: int) -> None:
        log.lease_until = log.due_at = now + self._lease_ms
        log.expires_at = now + self._live_ms

    def _write(self, log: _Log, events: Sequence[Event]) -> None:
        now = log.updated_at = self._clock.now_ms()
        log.events += events
        self._extend(log, now)
        if events[-1].terminal:
            self._end(log, events[-1])
        self._publish(log, tuple(events))

    def _end(self, log: _Log, event: Event) -> None:
        log.status = ENDS[event.type]
        log.lease_until = 0
        log.expires_at = self._clock.now_ms() + self._ttl_ms

    def _publish(self, log: _Log, events: Sequence[Event]) -> None:
        for feed in self._feeds:
            feed.publish(log.run.id, log.epoch, events)

    def _meta(self, log: _Log | None) -> Meta | None:
        if log is None:
            return None
        return Meta(
            run_id=log.run.id,
            epoch=log.epoch,
            status=log.status,
            attempt=log.attempt,
            owner_id=log.run.owner_id,
            kind=log.run.kind,
            chat_id=log.run.chat_id,
            count=len(log.events),
            cancelled=log.cancelled,
            created_at=log.created_at,
            updated_at=log.updated_at,
            lease_left=max(0, log.lease_until - self._clock.now_ms()),
        )


class MemoryFeed(Feed):
    """Delivers in the next turn of the loop, as a connection would: never inside the append."""

    def __init__(self, feeds: set[MemoryFeed]) -> None:
        self._feeds = feeds
        self._followers: dict[str, Follower] = {}

    async def start(self, lost: Callable[[], None]) -> None:
        self._feeds.add(self)

    def follow(self, run_id: str, follower: Follower) -> None:
        self._followers[run_id] = follower
        asyncio.get_running_loop().call_soon(self._confirm, run_id)

    def unfollow(self, run_id: str) -> None:
        self._followers.pop(run_id, None)

    def publish(self, run_id: str, epoch: str, events: Sequence[Event]) -> None:
        if run_id in self._followers:
            asyncio.get_running_loop().call_soon(self._deliver, run_id, epoch, events)

    def _confirm(self, run_id: str) -> None:
        if (follower := self._followers.get(run_id)) is not None:
            follower.subscribed()

    def _deliver(self, run_id: str, epoch: str, events: Sequence[Event]) -> None:
        if (follower := self._followers.get(run_id)) is not None:
            follower.published(Batch(epoch, events))

    async def stop(self) -> None:
        self._feeds.discard(self)
        self._followers.clear()


def _fenced(lease: Lease) -> Fenced:
    return Fenced(f"Run {lease.run_id}: attempt {lease.attempt} no longer holds it.")


def _lost(lease: Lease) -> LogLost:
    return LogLost(f"Run {lease.run_id}: there is no log, or a shorter one than was written. Restore it.")
