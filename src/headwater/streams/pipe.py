"""Pipe: commands of many callers share round trips over one connection.

One trip is under way at a time, and what is said meanwhile makes up the next one: alone a command
goes out at once, and the more there are, the more share a trip. An append costs a twentieth of what
it costs by itself. A repeated command must count once, as it is repeated when a connection breaks.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import hiredis
from redis.asyncio.connection import parse_url

from headwater.streams import wire

#: Bytes of one trip, unless a single command has more.
TRIP_BYTES: Final = 262_144
#: Tries after a connection that broke, and seconds before the first of them; doubles.
RETRIES: Final = 2
BACKOFF: Final = 0.05
#: What CLIENT LIST shows.
NAME: Final = b"headwater-appends"
#: Answers of a server that is not, or no longer, the one to write to. A new connection may lead to another. Redis 6.2
#: says in the middle of a sentence what a script ran into.
_ELSEWHERE: Final = re.compile("(?:^|-)(?:READONLY|LOADING|MASTERDOWN) ")


@dataclass(slots=True)
class _Call:
    packed: bytes
    #: Loop time by which it must be on its way.
    until: float
    reply: asyncio.Future[Any]


class Pipe:
    """A connection to the Redis at `url`, made when it is needed. Belongs to the event loop of its first call.

    Seconds: `connect` to connect and sign in, `answer` for the replies of one trip, `call` for a trip with all its
    tries, and the same to wait for one's trip.
    """

    def __init__(self, url: str, *, connect: float, answer: float, call: float) -> None:
        self._where: dict[str, Any] = dict(parse_url(url))
        self._connect_timeout: float = self._where.get("socket_connect_timeout", connect)
        self._answer_timeout: float = self._where.get("socket_timeout", answer)
        self._call_timeout = call
        self._calls: deque[_Call] = deque()
        self._task: asyncio.Task[None] | None = None
        self._connection: wire.Connection | None = None
        #: Replies of the trip under way, how many there will be, and who waits for them.
        self._replies: list[Any] = []
        self._due = 0
        self._answered: asyncio.Future[None] | None = None

    async def send(self, packed: bytes) -> Any:
        """The reply to one encoded command. What goes wrong is returned as well, as the exception it is.

        Whoever gives up waiting disturbs nobody; the command may have been carried out nevertheless.
        """
        loop = asyncio.get_running_loop()
        call = _Call(packed, loop.time() + self._call_timeout, loop.create_future())
        self._calls.append(call)
        if self._task is None:
            # Begins in the next turn of the loop, so what others say in this one goes along.
            self._task = loop.create_task(self._carry(), name="pipe")
        return await call.reply

    async def close(self) -> None:
        """Give the connection back. Whoever still waits is told that it is gone."""
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            # Also here: a task that is cancelled before its first step takes none.
            self._end([])
        self._drop()

    async def _carry(self) -> None:
        """Trip after trip, until nobody waits."""
        batch: list[_Call] = []
        try:
            while self._calls:
                batch = self._take()
                if not batch:
                    continue
                try:
                    async with asyncio.timeout(self._call_timeout):
                        replies = await self._trip(b"".join([call.packed for call in batch]), len(batch))
                except (OSError, wire.Refused) as error:
                    # Nobody else need find out for himself that the server is away.
                    _tell([*batch, *self._calls], error)
                    self._calls.clear()
                else:
                    self._deliver(batch, replies)
        finally:
            self._end(batch)

    def _end(self, batch: list[_Call]) -> None:
        self._task = None
        _tell([*batch, *self._calls], ConnectionAbortedError("the connection was given back"))
        self._calls.clear()

    def _take(self) -> list[_Call]:
        """What goes along on the next trip."""
        batch: list[_Call] = []
        size, now = 0, asyncio.get_running_loop().time()
        while self._calls and (not batch or size + len(self._calls[0].packed) <= TRIP_BYTES):
            call = self._calls.popleft()
            if call.reply.done():
                continue
            if call.until < now:
                _tell([call], TimeoutError("the commands before it took too long"))
                continue
            size += len(call.packed)
            batch.append(call)
        return batch

    def _deliver(self, batch: list[_Call], replies: list[Any]) -> None:
        for call, reply in zip(batch, replies, strict=True):
            if isinstance(reply, hiredis.ReplyError) and _ELSEWHERE.search(str(reply)):
                self._drop()
            if not call.reply.done():
                call.reply.set_result(reply)

    async def _trip(self, packed: bytes, count: int) -> list[Any]:
        for number in range(RETRIES):
            try:
                return await self._exchange(packed, count)
            except TimeoutError:
                # Silence is not tried again: the server is not there.
                raise
            except OSError:
                await asyncio.sleep(BACKOFF * 2**number * random.uniform(0.5, 1.0))
        return await self._exchange(packed, count)

    async def _exchange(self, packed: bytes, count: int) -> list[Any]:
        """Send and wait for all replies. A connection that did not give them all is not used again."""
        whole = False
        try:
            connection = await self._connected()
            self._replies, self._due = [], count
            self._answered = asyncio.get_running_loop().create_future()
            connection.write(packed)
            either = (self._answered, connection.broken)
            await asyncio.wait(either, timeout=self._answer_timeout, return_when=asyncio.FIRST_COMPLETED)
            whole = len(self._replies) == count
        finally:
            if not whole:
                self._drop()
        if whole:
            return self._replies
        if connection.broken.done():
            raise ConnectionResetError("the connection broke")
        raise TimeoutError(f"no answer for {self._answer_timeout:g} s")

    async def _connected(self) -> wire.Connection:
        connection = self._connection
        if connection is None or connection.broken.done():
            database = int(self._where.get("db", 0))
            async with asyncio.timeout(self._connect_timeout):
                connection = await wire.connect(self._where, NAME, self._receive, database=database)
            self._connection = connection
        return connection

    def _receive(self, reply: Any) -> None:
        self._replies.append(reply)
        if len(self._replies) == self._due and self._answered is not None:
            self._answered.set_result(None)

    def _drop(self) -> None:
        connection, self._connection, self._answered = self._connection, None, None
        if connection is not None:
            connection.abort()


def _tell(calls: list[_Call], error: Exception) -> None:
    for call in calls:
        if not call.reply.done():
            call.reply.set_result(error)
