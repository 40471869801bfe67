"""Places: an owner has so many of something at once, and whoever comes later waits for a turn.

A place that is not given back, because its process died, is free again after a while; what is lost
with Redis is taken anew. So a place is never the truth about a run, only about whose turn it is.

Places that Redis refuses are had by everybody: turns are a courtesy, and an answer is worth more.

Synchronous, for the thread that talks to the broker; safe to use from several threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import orjson
from redis.exceptions import NoPermissionError, RedisError

from headwater.errors import reason
from headwater.runs import Run
from headwater.streams import keys
from headwater.streams.answers import unavailable
from headwater.streams.base import LIVE_TTL
from headwater.streams.scripts import Script
from headwater.streams.sync import client

logger = logging.getLogger(__name__)

#: What Redis says where trying again does not help, also from within a script.
_REFUSALS: Final = ("WRONGTYPE", "NOPERM", "ACL failure", "unknown command")


def refused_for_good(error: BaseException) -> bool:
    """Whether Redis refuses for good, by its rights or by what is stored, rather than being away or full.

    `error` may be of whoever talks to Redis, with Redis's own as its cause.
    """
    cause = error.__cause__ or error
    return isinstance(cause, NoPermissionError) or any(word in str(cause) for word in _REFUSALS)


class Places:
    """The places of all owners in one Redis. Every call raises LogUnavailable."""

    def __init__(self, url: str) -> None:
        self._redis = client(url)
        self._take = self._redis.register_script(Script("take", 2).text)
        self._give = self._redis.register_script(Script("give", 2).text)
        self._refused = False

    def take(self, run: Run, what: str, order: float, *, places: int, seconds: float) -> int | None:
        """Take one of the owner's `places` for `what`, for so many seconds; asking again extends it.

        Returns how many of them others have; None when all are taken, and the run waits in the order
        of `order`, lowest first.
        """
        arguments = [run.id, order, places, round(seconds * 1000), LIVE_TTL]
        taken = cast("int", self._call(self._take, run.owner_id, what, arguments, refused=0))
        return None if taken < 0 else taken

    def give(self, run: Run, what: str, *, places: int) -> list[Run]:
        """Give the run's place back, or its turn up, and get the runs whose turn it is."""
        while ids := self._call(self._give, run.owner_id, what, [run.id, places], refused=()):
            found = [Run.from_json(orjson.loads(raw)) for raw in self._runs(ids) if raw]
            if found:
                return found
            # They are gone, with their chats perhaps: the place is still free.
        return []

    def keep(self, runs: Sequence[Run], what: Callable[[Run], str], *, seconds: float) -> None:
        """Go on having these places, also those that Redis has forgotten."""
        try:
            now, micros = self._redis.time()
            until = int(now) * 1000 + int(micros) // 1000 + round(seconds * 1000)
            pipeline = self._redis.pipeline(transaction=False)
            for run in runs:
                key = f"{keys.places(run.owner_id, what(run))}:taken"
                pipeline.zadd(key, {run.id: until})
                pipeline.expire(key, LIVE_TTL)
            pipeline.execute()
        except (RedisError, OSError) as error:
            unavailable(error)

    def close(self) -> None:
        self._redis.close()

    def _call(self, script: Any, owner_id: str, what: str, arguments: Sequence[Any], *, refused: Any) -> Any:
        name = keys.places(owner_id, what)
        try:
            answer = script(keys=[f"{name}:taken", f"{name}:waiting"], args=arguments)
        except (RedisError, OSError) as error:
            if not refused_for_good(error):
                unavailable(error)
            if not self._refused:
                logger.warning(
                    "Redis refuses to keep turns in %s:taken and %s:waiting: %s. Until that is mended, runs begin "
                    "without waiting for a turn. Its user needs EVALSHA, SCRIPT and the keys %s*; a key that "
                    "something else has written may be deleted.",
                    *(name, name, reason(error), keys.OWNERS),
                )
            self._refused = True
            return refused
        self._refused = False
        return answer

    def _runs(self, ids: Sequence[bytes]) -> list[Any]:
        try:
            # Not in the script: in a cluster each run is in a slot of its own.
            return [self._redis.get(keys.run(raw.decode())) for raw in ids]
        except (RedisError, OSError) as error:
            unavailable(error)
