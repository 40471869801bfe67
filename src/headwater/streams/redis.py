"""RedisStreamLog: the log in Redis (6.2 or later) or Valkey.

Every change of a run is one Lua script, so that the fence, the events, the lease and the published
message are one atomic step; the scripts stand beside this file, each with its keys on top. The
server's `TIME` is the only clock. Who is due is kept in a sorted set in a slot of its own; it only
says when to look, the run's own hash says whether somebody holds it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Any, Final

import hiredis
import orjson

from headwater.errors import LeaseHeld, LogClosed, LogUnavailable
from headwater.events import Event
from headwater.runs import Lease, Run, RunState
from headwater.streams import keys, packing
from headwater.streams.answers import appended, meta_of, unavailable
from headwater.streams.base import (
    ENDS,
    LIVE_TTL,
    PAGE_BYTES,
    Appended,
    Due,
    Feed,
    Meta,
    Page,
    Renewed,
    StreamLog,
    new_epoch,
)
from headwater.streams.calls import ANSWER_TIMEOUT, CALL_TIMEOUT, CONNECT_TIMEOUT, Calls
from headwater.streams.feed import RedisFeed
from headwater.streams.lately import Lately
from headwater.streams.pipe import Pipe
from headwater.streams.scripts import Command, Scripts

logger = logging.getLogger(__name__)

#: Bytes of an append above which it travels alone, so that nobody waits for it.
LARGE: Final = 65_536
#: Events of an append above which it is none of the ordinary ones.
MANY: Final = 1000
#: Logs packed at one look for who is due, so that the look stays short; the others come a moment later.
PACKS: Final = 50
PACK_PAUSE_MS: Final = 1000


class RedisStreamLog(StreamLog):
    """Logs in one Redis. `url` is `redis://`, `rediss://` or `unix://`; its query may override the timeouts.

    A log of more than `compress_over` bytes is packed `compress_after` seconds after its end, when somebody asks who
    is `due`. With 0 bytes none is.
    """

    def __init__(
        self, url: str, *, ttl: int, lease_seconds: float, compress_over: int = 0, compress_after: float = 300.0
    ) -> None:
        self._url = url
        self._ttl = ttl
        self._live_ttl = max(ttl, LIVE_TTL)
        self._lease_ms = round(lease_seconds * 1000)
        self._compress_over = compress_over
        self._compress_after_ms = round(compress_after * 1000)
        self._scripts = Scripts()
        self._calls = Calls(url, self._scripts)
        self._send = self._calls.send
        self._pipe = Pipe(url, connect=CONNECT_TIMEOUT, answer=ANSWER_TIMEOUT, call=CALL_TIMEOUT)
        #: Runs whose lease a claim or an append extended in this tenth of a lease.
        self._extended = Lately(lease_seconds / 10)

    # --- the writer -----------------------------------------------------------------------------

    async def open(self, run: Run, grace: float) -> None:
        announced = self._scripts.open(*_keys(run.id), new_epoch(), run.attempt, *_identity(run), self._live_ttl)
        # The order matters should the connection break in between: an entry too many is harmless. So is one too early,
        # but not one too late, which a log that expired may have left when its run had ended without its rows.
        _, status = await self._send(self._schedule(run.id, grace, "LT"), announced)
        if status == b"queued":
            await self._send(self._schedule(run.id, grace))

    async def claim(self, run: Run, holder: str) -> Lease:
        claimed = self._scripts.claim(
            *_keys(run.id), holder, run.attempt, new_epoch(), *_identity(run), self._lease_ms, self._live_ttl
        )
        _, reply = await self._send(self._schedule(run.id, self._lease_ms / 1000), claimed)
        if reply[0] == b"closed":
            raise LogClosed(f"Run {run.id} has ended as {reply[1].decode()}.")
        if reply[0] == b"held":
            raise LeaseHeld(f"Run {run.id} is held by {reply[1].decode()} for {reply[2]} ms more.", left=reply[2])
        _, epoch, attempt, length, cancelled = reply
        self._extended.add(run.id)
        return Lease(run.id, attempt, holder, epoch.decode(), length, bool(cancelled))

    async def append(self, lease: Lease, events: Sequence[Event]) -> Appended:
        if lease.run_id in self._extended and events[-1].type not in ENDS and len(events) <= MANY:
            count = await self._say(self._append_command(lease, events))
            if count is not None:
                return Appended(count, cancelled=False)
        extending = self._scripts.append(
            *_keys(lease.run_id),
            keys.channel(lease.run_id),
            *(lease.epoch, lease.attempt, lease.holder),
            events[0].seq,
            *(self._lease_ms, self._live_ttl, self._ttl),
            ENDS.get(events[-1].type, ""),
            *[event.encode() for event in events],
        )
        answer = appended(lease, await self._say(extending))
        self._extended.add(lease.run_id)
        return answer

    def _append_command(self, lease: Lease, events: Sequence[Event]) -> Command:
        """An ordinary append, as nearly all are. Its answer is nil when it turns out to be none."""
        return self._scripts.push(
            keys.metadata(lease.run_id),
            keys.chunks(lease.run_id),
            *(lease.epoch, lease.attempt, lease.holder),
            events[0].seq,
            *[event.encode() for event in events],
        )

    async def _say(self, command: Command) -> Any:
        """Send an append: together with those of others, unless it is so large that they would wait for it."""
        packed = hiredis.pack_command(command)
        if len(packed) <= LARGE:
            reply = await self._pipe.send(packed)
            if not isinstance(reply, Exception):
                return reply
            if not any(word in str(reply) for word in ("NOSCRIPT", "WRONGTYPE")):
                unavailable(reply)
        # Also by this way, which puts those two right. An append names its place, so nothing overtakes it.
        (reply,) = await self._send(command)
        return reply

    async def restore(self, lease: Lease, run: Run, events: Sequence[Event]) -> Appended:
        restored = self._scripts.restore(
            *_keys(lease.run_id),
            keys.channel(lease.run_id),
            *(lease.epoch, lease.attempt, lease.holder),
            *(self._lease_ms, self._live_ttl, self._ttl),
            ENDS.get(events[-1].type, "") if events else "",
            *_identity(run),
            *[event.encode() for event in events],
        )
        _, reply = await self._send(self._schedule(run.id, self._lease_ms / 1000), restored)
        return appended(lease, reply)

    async def renew(self, leases: Sequence[Lease]) -> list[Renewed]:
        replies = await self._send(
            *(
                self._scripts.renew(
                    *_keys(lease.run_id), lease.epoch, lease.attempt, lease.holder, self._lease_ms, self._live_ttl
                )
                for lease in leases
            )
        )
        return [Renewed(reply.decode()) for reply in replies]

    async def release(self, lease: Lease) -> None:
        released = self._scripts.release(keys.metadata(lease.run_id), lease.epoch, lease.attempt, lease.holder)
        await self._send(released, self._schedule(lease.run_id, 0))

    async def park(self, run: Run, behind: Sequence[str], grace: float) -> None:
        await self.open(run, grace)
        noted: list[Command] = []
        for key in map(keys.behind, behind):
            noted += [("SADD", key, run.id), ("EXPIRE", key, self._live_ttl)]
        await self._send(*noted)

    async def parked(self, run_id: str) -> list[Run]:
        (ids,) = await self._send(("SMEMBERS", keys.behind(run_id)))
        raws = await self._send(*(("GET", keys.run(raw.decode())) for raw in sorted(ids))) if ids else []
        return [Run.from_json(orjson.loads(raw)) for raw in raws if raw]

    async def cancel(self, run_id: str) -> Meta | None:
        asked = self._scripts.cancel(keys.metadata(run_id), keys.chunks(run_id), *keys.META_FIELDS)
        ((now, values, length),) = await self._send(asked)
        return _meta(run_id, now, values, length)

    async def forget(self, run_id: str) -> None:
        await self._send(("DEL", *_keys(run_id), keys.behind(run_id)), ("ZREM", keys.DUE, run_id))

    # --- the reader -----------------------------------------------------------------------------

    async def metas(self, run_ids: Sequence[str]) -> list[Meta | None]:
        if not run_ids:
            return []
        asked = [command for run_id in run_ids for command in _meta_commands(run_id)]
        (seconds, micros), *replies = await self._send(("TIME",), *asked)
        now = int(seconds) * 1000 + int(micros) // 1000
        return [
            _meta(run_id, now, values, length)
            for run_id, values, length in zip(run_ids, replies[::2], replies[1::2], strict=True)
        ]

    async def read(self, run_id: str, after: int, limit: int) -> Page | None:
        asked = self._scripts.read(keys.metadata(run_id), keys.chunks(run_id), after, limit, PAGE_BYTES)
        (reply,) = await self._send(asked)
        epoch, status, written, count, raws, first = reply
        if epoch is None:
            return None
        closed = RunState(status.decode()).terminal
        if closed and count != int(written):
            # Its events expired or were evicted and nobody is left to write them again: as good as no log.
            return None
        if first:
            raws = packing.page(raws[0], first, after, limit, PAGE_BYTES)
        return Page(epoch.decode(), [Event.decode(raw) for raw in raws], count, closed)

    async def due(self, limit: int, skip: int = 0) -> list[Due]:
        found: list[Due] = []
        while len(found) < limit:
            # What is not due is moved or removed, so only what was found already is passed over.
            (reply,) = await self._send(self._scripts.due(keys.DUE, skip + len(found), limit - len(found)))
            now, ids = reply
            if not ids:
                break
            found += await self._sift(now, [raw.decode() for raw in ids])
        return found

    async def _sift(self, now: int, run_ids: list[str]) -> list[Due]:
        """Which of these are due; puts the others where they belong."""
        asked: list[Command] = []
        for run_id in run_ids:
            asked += [*_meta_commands(run_id), ("GET", keys.run(run_id))]
        replies = await self._send(*asked)
        found: list[Due] = []
        ended: list[Meta] = []
        corrections: list[Command] = []
        for run_id, values, length, raw in zip(run_ids, replies[::3], replies[1::3], replies[2::3], strict=True):
            try:
                meta = meta_of(run_id, now, values, length)
                run = Run.from_json(orjson.loads(raw)) if raw else None
            except (ValueError, KeyError, TypeError):
                logger.exception("What Redis holds of run %s cannot be read, and counts as lost", run_id)
                meta = run = None
            if meta is not None and meta.status.terminal:
                ended.append(meta)
            elif meta is not None and meta.lease_left > 0:
                corrections.append(("ZADD", keys.DUE, "XX", now + meta.lease_left, run_id))
            else:
                found.append(Due(run_id, run, meta))
        corrections += await self._tidy(ended, now)
        if corrections:
            await self._send(*corrections)
        return found

    async def _tidy(self, ended: Sequence[Meta], now: int) -> list[Command]:
        """Pack what has ended long ago; what takes out of sight those that need no further look."""
        later: dict[str, int] = {}
        packs: list[Meta] = []
        if self._compress_over:
            for meta in ended:
                wait = meta.updated_at + self._compress_after_ms - now
                if wait > 0 or len(packs) == PACKS:
                    later[meta.run_id] = now + max(wait, PACK_PAUSE_MS)
                else:
                    packs.append(meta)
        try:
            if later:
                await self._send(*(("ZADD", keys.DUE, "XX", at, run_id) for run_id, at in later.items()))
            for meta in packs:
                await self._pack(meta)
        except LogUnavailable as error:
            # A full server takes no write. The logs stay as they are until they expire.
            logger.info("Logs of ended runs are not packed: %s", error)
            later.clear()
        finished = [meta.run_id for meta in ended if meta.run_id not in later]
        return [("ZREM", keys.DUE, *finished)] if finished else []

    async def _pack(self, meta: Meta) -> None:
        (raws,) = await self._send(("LRANGE", keys.chunks(meta.run_id), 0, -1))
        size = sum(map(len, raws))
        if size <= self._compress_over or len(raws) != meta.count:
            return
        packed = await asyncio.to_thread(packing.pack, raws)
        if sum(map(len, packed.frames)) < size:
            where = (keys.metadata(meta.run_id), keys.chunks(meta.run_id))
            firsts = ",".join(map(str, packed.firsts))
            await self._send(self._scripts.pack(*where, meta.epoch, meta.count, firsts, *packed.frames))

    async def remind(self, run_ids: Sequence[str], seconds: float) -> None:
        if run_ids:
            await self._send(*(self._schedule(run_id, seconds, "NX") for run_id in run_ids))

    async def beat(self, worker: str, seconds: float) -> None:
        await self._send(self._scripts.schedule(keys.WORKERS, worker, math.ceil(seconds * 1000), self._live_ttl, ""))

    async def workers(self) -> list[str]:
        (now, micros), scored = await self._send(("TIME",), ("ZRANGE", keys.WORKERS, 0, -1, "WITHSCORES"))
        now_ms = int(now) * 1000 + int(micros) // 1000
        until = {scored[i].decode(): float(scored[i + 1]) for i in range(0, len(scored), 2)}
        alive = sorted(name for name, at in until.items() if at >= now_ms)
        if len(alive) < len(until):
            # By score, not by name: one of them may have come back a moment ago.
            await self._send(("ZREMRANGEBYSCORE", keys.WORKERS, "-inf", f"({now_ms}"))
        return alive

    async def depth(self, *queues: str) -> int:
        return sum(await self._send(*(("LLEN", queue) for queue in queues))) if queues else 0

    def feed(self) -> Feed:
        return RedisFeed(self._url)

    async def ping(self) -> None:
        await self._send(("PING",))

    async def close(self) -> None:
        await self._pipe.close()
        await self._calls.close()

    # --- the wire -------------------------------------------------------------------------------

    def _schedule(self, run_id: str, seconds: float, mode: str = "") -> Command:
        return self._scripts.schedule(keys.DUE, run_id, math.ceil(seconds * 1000), self._live_ttl, mode)


def _keys(run_id: str) -> tuple[str, str, str]:
    return keys.metadata(run_id), keys.chunks(run_id), keys.run(run_id)


def _meta_commands(run_id: str) -> tuple[Command, Command]:
    return ("HMGET", keys.metadata(run_id), *keys.META_FIELDS), ("LLEN", keys.chunks(run_id))


def _meta(run_id: str, now: int, values: Sequence[bytes | None], length: int) -> Meta | None:
    """`meta_of`; None also where something else has written what cannot be read, which is nobody else's trouble."""
    try:
        return meta_of(run_id, now, values, length)
    except ValueError as error:
        logger.warning("The metadata of run %s cannot be read, and count as lost: %s", run_id, error)
        return None


def _identity(run: Run) -> tuple[str, str, str, bytes]:
    return run.owner_id, run.kind, run.chat_id or "", orjson.dumps(run.to_json())
