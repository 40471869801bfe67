"""Calls: commands to Redis in one round trip, and what is put right in between.

A server may have forgotten the scripts: they are loaded. Something else may have written under a name that belongs to
a run: that is thrown away, and the run's log is lost as it is with a Redis that comes back empty, which heals. Both are
told by a command's own answer, so that one run's trouble is nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError

from headwater.streams import keys
from headwater.streams.answers import unavailable
from headwater.streams.scripts import Command, Scripts

logger = logging.getLogger(__name__)

#: Seconds to connect, to wait for one answer, and for a call with all its tries.
CONNECT_TIMEOUT: Final = 1.5
ANSWER_TIMEOUT: Final = 2.0
CALL_TIMEOUT: Final = 3.0
#: Tries after a connection that turned out to be broken. A time-out is not tried again: the server is not there.
RETRIES: Final = 2
CONNECTIONS: Final = 32


class Calls:
    """Connections to the Redis at `url`."""

    def __init__(self, url: str, scripts: Scripts) -> None:
        self._scripts = scripts
        pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=CALL_TIMEOUT,
            # RESP2: the same answers from 6.2 to Valkey 9, and no maintenance pushes in between.
            protocol=2,
            **timeouts(url),
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.3), RETRIES, (RedisConnectionError,)),
        )
        # Any: redis-py leaves `execute_command`, which all here goes through, without types.
        self._redis: Any = Redis.from_pool(pool)

    async def send(self, *commands: Command) -> list[Any]:
        """All commands in one round trip, their answers in order. Raises LogUnavailable for whatever goes wrong."""
        task = asyncio.current_task()
        before = task.cancelling() if task is not None else 0
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                replies = await self._trip(commands)
                for amiss, mend in ((_forgotten, self._load), (_foreign, self._throw_away)):
                    which = [i for i, reply in enumerate(replies) if amiss(reply)]
                    if which:
                        some = [commands[i] for i in which]
                        await mend(some)
                        for i, reply in zip(which, await self._trip(some), strict=True):
                            replies[i] = reply
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            # uvloop raises RuntimeError on a connection that closed a moment ago, and redis-py passes it on.
            unavailable(error)
        finally:
            if task is not None and task.cancelling() > before:
                # redis-py loses a cancel that comes at the wrong moment, and whoever waits for this task to end would
                # wait for ever.
                raise asyncio.CancelledError
        for reply in replies:
            if isinstance(reply, Exception):
                unavailable(reply)
        return replies

    async def close(self) -> None:
        await self._redis.aclose()

    async def _trip(self, commands: Sequence[Command]) -> list[Any]:
        if len(commands) == 1:
            try:
                return [await self._redis.execute_command(*commands[0])]
            except ResponseError as error:
                return [error]
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute(raise_on_error=False))

    async def _load(self, _: Sequence[Command]) -> None:
        # A restart or SCRIPT FLUSH took the scripts, and none of these commands has run.
        await self._trip([("SCRIPT LOAD", script.text) for script in self._scripts.all()])

    async def _throw_away(self, commands: Sequence[Command]) -> None:
        runs = {run_id for command in commands if (run_id := keys.run_of(command)) is not None}
        # By a script, so that nothing is deleted that another process has put right meanwhile.
        for run_id in runs:
            named = (keys.metadata(run_id), keys.chunks(run_id), keys.run(run_id), keys.behind(run_id))
            (deleted,) = await self._trip([("EVAL", self._scripts.mend.text, len(named), *named)])
            if isinstance(deleted, list) and deleted:
                names = b", ".join(deleted).decode()
                logger.error("Something else has written keys of run %s, and they are deleted: %s", run_id, names)


def _forgotten(reply: Any) -> bool:
    return isinstance(reply, NoScriptError)


def _foreign(reply: Any) -> bool:
    # From within a script of an older Redis it is in the middle of the message.
    return isinstance(reply, ResponseError) and "WRONGTYPE" in str(reply)


def timeouts(url: str) -> dict[str, Any]:
    timeouts = {"socket_timeout": ANSWER_TIMEOUT, "socket_connect_timeout": CONNECT_TIMEOUT}
    # A unix socket has no keep-alive, and redis-py refuses to be told of one.
    return timeouts if url.startswith("unix:") else {**timeouts, "socket_keepalive": True}
