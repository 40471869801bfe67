"""What a Redis server says of itself, for `headwater doctor` and for the check before a start."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import redis.asyncio
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from headwater.errors import LogUnavailable, reason
from headwater.streams import keys

#: Seconds to wait for a server that does not answer.
PATIENCE: Final = 3.0


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """One look at a Redis server."""

    #: Valkey's own version where it is Valkey, else Redis's.
    version: str
    #: `maxmemory-policy`; anything but `noeviction` may drop a queued run.
    policy: str
    #: Bytes.
    used_memory: int
    #: Whether it keeps an append-only file.
    append_only: bool
    #: Seconds for one round trip.
    round_trip: float
    #: Its clock, Unix milliseconds.
    now_ms: int
    #: What its user may not do with a key that headwater uses; empty when nothing was found.
    refused: str = ""


async def redis_facts(url: str) -> RedisFacts:
    """Ask the server. Raises LogUnavailable with the address and the reason."""
    async with look(url) as client:
        await client.ping()
        begun = time.perf_counter()
        seconds, micros = await client.time()
        round_trip = time.perf_counter() - begun
        info = await client.info()
        refused = await _refused(client)
    return RedisFacts(
        version=str(info.get("valkey_version") or info.get("redis_version", "unknown")),
        policy=str(info.get("maxmemory_policy", "unknown")),
        used_memory=int(info.get("used_memory", 0)),
        append_only=bool(int(info.get("aof_enabled", 0))),
        round_trip=round_trip,
        now_ms=int(seconds) * 1000 + int(micros) // 1000,
        refused=refused,
    )


async def _refused(client: redis.asyncio.Redis) -> str:
    # One of each kind of keys. A script, because all that changes a run is one; it only reads.
    for key in (keys.DUE, keys.WORKERS, keys.places("doctor", "taken"), keys.metadata("doctor")):
        try:
            await client.eval("return redis.call('ZCARD', KEYS[1])", 1, key)
        except ResponseError as error:
            return f"{key}: {reason(error)}"
    return ""


@asynccontextmanager
async def look(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A connection for a look from outside. Whatever goes wrong with it is raised as LogUnavailable."""
    try:
        async with redis.asyncio.Redis.from_url(
            url, socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE, decode_responses=True
        ) as client:
            yield client
    except (RedisError, OSError, ValueError) as error:
        raise away(url, error) from None


def away(url: str, error: Exception) -> LogUnavailable:
    """What to raise for an error of redis-py or of the network: the address, the reason and what to do."""
    # Both come with an answer: a password is missing or wrong, a right is, or there is no such database.
    refused = isinstance(error, ResponseError | AuthenticationError)
    does = "refuses" if refused else "does not answer"
    return LogUnavailable(f"Redis at {shown(url)} {does}: {reason(error)}. Check REDIS_URL.")


def shown(url: str) -> str:
    """A URL without what is secret in it: `host:port/database`."""
    parts = urlsplit(url)
    return (
        f"{parts.hostname or parts.path}{f':{parts.port}' if parts.port else ''}{parts.path if parts.hostname else ''}"
    )
