"""RedisFeed: one raw connection that follows many runs.

redis-py's pub/sub reconnects in silence, and what was published meanwhile is gone without a trace.
Here a break is said, every confirmation is passed on, and a server that is frozen rather than gone
is noticed by its silence. Without redis-py between socket and hub a message costs a fraction.

The connection speaks RESP2: its subscribed mode is the same from Redis 6.2 to Valkey 9. It selects
no database, because channels belong to all of them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import hiredis
from redis.asyncio.connection import parse_url

from headwater.errors import reason
from headwater.streams import keys, wire
from headwater.streams.base import Feed, Follower
from headwater.streams.batch import Batch
from headwater.streams.wire import Connection, Refused

logger = logging.getLogger(__name__)

#: Seconds to connect and sign in.
CONNECT_TIMEOUT: Final = 2.0
#: Seconds of silence before a PING, and before the connection counts as dead.
PING_AFTER: Final = 3.0
DEAD_AFTER: Final = 10.0
#: Seconds before a new try; doubles, with jitter.
FIRST_BACKOFF: Final = 0.05
MAX_BACKOFF: Final = 2.0
#: Channels in one SUBSCRIBE.
CHUNK: Final = 500


class RedisFeed(Feed):
    """Follows runs over one connection to the Redis at `url`."""

    def __init__(self, url: str, *, ping_after: float = PING_AFTER, dead_after: float = DEAD_AFTER) -> None:
        self._where = parse_url(url)
        self._ping_after = ping_after
        self._dead_after = dead_after
        self._lost: Callable[[], None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        #: By channel. What arrives goes straight to its follower: a further look-up by the run would be felt.
        self._followers: dict[bytes, Follower] = {}
        #: Runs whose subscription is to be sent or taken back in this turn of the loop, in order.
        self._changed: dict[str, None] = {}

    async def start(self, lost: Callable[[], None]) -> None:
        if self._task is None:
            self._lost = lost
            self._task = asyncio.create_task(self._keep_connected(), name="feed")

    async def stop(self) -> None:
        # First of all: closing the connection ourselves is no loss to report.
        self._lost = None
        self._followers.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def follow(self, run_id: str, follower: Follower) -> None:
        self._followers[keys.channel(run_id).encode()] = follower
        self._change(run_id)

    def unfollow(self, run_id: str) -> None:
        self._followers.pop(keys.channel(run_id).encode(), None)
        self._change(run_id)

    # --- commands -------------------------------------------------------------------------------

    def _change(self, run_id: str) -> None:
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._flush)
        self._changed[run_id] = None

    def _flush(self) -> None:
        """Send what changed in this turn. A run that is followed again is subscribed again, so that it is confirmed."""
        changed = [keys.channel(run_id).encode() for run_id in self._changed]
        self._changed.clear()
        if self._connection is not None:
            _send_chunked(self._connection, b"SUBSCRIBE", [name for name in changed if name in self._followers])
            _send_chunked(self._connection, b"UNSUBSCRIBE", [name for name in changed if name not in self._followers])

    # --- the connection -------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            try:
                connection = await self._connect()
            except (OSError, TimeoutError, Refused) as error:
                logger.warning("The feed cannot connect: %s: %s", type(error).__name__, reason(error))
            except Exception:
                # A certificate that cannot be read, say. Whoever mends it should not have to restart us.
                logger.exception("The feed cannot connect")
            else:
                backoff = FIRST_BACKOFF
                await self._serve(connection)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
            backoff = min(backoff * 2, MAX_BACKOFF)

    async def _connect(self) -> Connection:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            return await wire.connect(self._where, b"headwater-feed", self._receive)

    async def _serve(self, connection: Connection) -> None:
        """Follow all over this connection until it breaks or falls silent."""
        self._connection = connection
        try:
            _send_chunked(connection, b"SUBSCRIBE", list(self._followers))
            while not connection.broken.done():
                await asyncio.wait([connection.broken], timeout=self._ping_after)
                silence = asyncio.get_running_loop().time() - connection.heard_at
                if silence >= self._dead_after:
                    logger.warning("The feed's server has been silent for %.1f s; connecting again", silence)
                    break
                if silence >= self._ping_after:
                    connection.send(b"PING")
        finally:
            self._connection = None
            connection.abort()
            if self._lost is not None:
                self._lost()

    # --- what arrives ---------------------------------------------------------------------------

    def _receive(self, reply: Any) -> None:
        if type(reply) is not list:
            if isinstance(reply, hiredis.ReplyError):
                logger.error("Redis refuses a command of the feed: %s. Does the user have the right &stream:*?", reply)
            return
        if len(reply) != 3:  # a pong
            return
        kind, channel, payload = reply
        follower = self._followers.get(channel)
        if follower is None:
            return
        try:
            if kind == b"message":
                try:
                    batch = Batch.published(payload)
                except ValueError:
                    logger.exception("A published message cannot be read; its readers go to the log instead")
                    batch = Batch("")
                follower.published(batch)
            elif kind == b"subscribe":
                follower.subscribed()
        except Exception:
            # One message that its receiver chokes on must not take the connection of all others along.
            logger.exception("A message on %s could not be passed on", channel.decode(errors="replace"))


def _send_chunked(connection: Connection, verb: bytes, names: Sequence[bytes]) -> None:
    for at in range(0, len(names), CHUNK):
        connection.send(verb, *names[at : at + CHUNK])
