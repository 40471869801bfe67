"""Redis for code without an event loop, and the hash of a run for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from headwater.streams import keys
from headwater.streams.answers import unavailable
from headwater.streams.calls import timeouts
from headwater.streams.scripts import Script


def client(url: str, *, decode_responses: bool = False) -> Redis:
    """Synchronous connections to a Redis."""
    retry = Retry(NoBackoff(), 1, (RedisConnectionError,))
    return Redis.from_url(url, protocol=2, decode_responses=decode_responses, **timeouts(url), retry=retry)


class SyncMeta:
    """The hash of a run for synchronous code, such as a Celery result backend."""

    def __init__(self, url: str) -> None:
        self._redis = client(url, decode_responses=True)
        self._cancel = self._redis.register_script(Script("cancel", 2).text)

    def read(self, run_id: str) -> Mapping[str, str]:
        """All fields of `stream:{<run>}:metadata`; empty when the run is unknown. Raises LogUnavailable."""
        try:
            fields: Any = self._redis.hgetall(keys.metadata(run_id))
        except (RedisError, OSError) as error:
            unavailable(error)
        return dict(fields)

    def cancel(self, run_id: str) -> None:
        """Set the flag of a run that has not ended. Raises LogUnavailable."""
        try:
            self._cancel(keys=[keys.metadata(run_id), keys.chunks(run_id)], args=["status"])
        except (RedisError, OSError) as error:
            unavailable(error)

    def close(self) -> None:
        self._redis.close()
