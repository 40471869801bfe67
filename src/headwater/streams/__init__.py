"""The hot log of a run."""

from __future__ import annotations

from headwater.streams.base import StreamLog


def connect(url: str, *, ttl: int = 3600, lease_seconds: float = 10.0, compress_over: int = 0) -> StreamLog:
    """The log in the Redis at `redis://`, `rediss://` or `unix://`. `ttl` in seconds after the last event.

    Logs of more than `compress_over` bytes are packed some time after their end; with 0 none is.
    """
    # Imported here, so that the contract does not know its implementations.
    from headwater.streams.redis import RedisStreamLog

    return RedisStreamLog(url, ttl=ttl, lease_seconds=lease_seconds, compress_over=compress_over)
