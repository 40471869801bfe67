"""Watching from outside: what is published, and what the metadata of runs says. For `headwater monitor`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from headwater.events import Event
from headwater.streams import keys
from headwater.streams.probe import PATIENCE, away, look

#: Seconds between tries to reach a server that went away.
_RETRY: Final = 1.0
#: Keys asked for in one step of a scan.
_STEP: Final = 500


@dataclass(frozen=True, slots=True)
class Published:
    """One message of a channel. `epoch` is None when it is not one of ours; then `raw` is all there is."""

    channel: str
    raw: bytes
    epoch: str | None = None
    first_seq: int = 0
    events: tuple[Event, ...] = ()


def parse_published(channel: str, raw: bytes) -> Published:
    """Read `<epoch> <first_seq>` and the events behind it; anything else is kept as it is."""
    head, _, body = raw.partition(b"\n")
    epoch, _, seq = head.partition(b" ")
    try:
        events = tuple(Event.decode(line) for line in body.split(b"\n") if line)
        return Published(channel, raw, epoch.decode("ascii"), int(seq), events)
    except ValueError:
        return Published(channel, raw)


async def published(url: str, pattern: str) -> AsyncIterator[Published | None]:
    """What is published on channels that match, for ever. None each time the subscription stands anew.

    Raises LogUnavailable when the server cannot be reached at first; later it is tried again.
    """
    stood = False
    while True:
        # No limit to the silence, which some versions of redis-py set by default: a channel may well be quiet.
        client = redis.asyncio.Redis.from_url(url, socket_connect_timeout=PATIENCE, socket_timeout=None)
        try:
            async with client, client.pubsub() as pubsub:
                async with asyncio.timeout(PATIENCE):
                    await pubsub.psubscribe(pattern)
                async for message in pubsub.listen():
                    if message["type"] == "psubscribe":
                        stood = True
                        yield None
                    elif message["type"] == "pmessage":
                        yield parse_published(message["channel"].decode(errors="replace"), message["data"])
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            if not stood:
                raise away(url, error) from None
        except RedisError as error:
            raise away(url, error) from None
        await asyncio.sleep(_RETRY)


async def metadata(url: str, run_id: str) -> dict[str, str]:
    """The fields of `stream:{<run>}:metadata`; empty when there are none. Raises LogUnavailable."""
    async with look(url) as client:
        # Any: redis-py does not tell its types by `decode_responses`.
        fields: Any = await client.hgetall(keys.metadata(run_id))
        return dict(fields)


async def recent(url: str, limit: int) -> list[tuple[str, dict[str, str]]]:
    """Runs that Redis still knows with their metadata, the newest change first. Raises LogUnavailable."""
    async with look(url) as client:
        # A scan may name a key twice.
        found = sorted({key async for key in client.scan_iter(match=keys.metadata("*"), count=_STEP)})
        rows: list[tuple[str, dict[str, str]]] = []
        for begin in range(0, len(found), _STEP):
            part = found[begin : begin + _STEP]
            pipe = client.pipeline(transaction=False)
            for key in part:
                pipe.hgetall(key)
            fields = await pipe.execute()
            rows += [(_run_id(key), data) for key, data in zip(part, fields, strict=True) if data]
    rows.sort(key=lambda row: int(row[1].get("updated_at") or 0), reverse=True)
    return rows[:limit]


def _run_id(key: str) -> str:
    before, _, after = keys.metadata("*").partition("*")
    return key.removeprefix(before).removesuffix(after)
