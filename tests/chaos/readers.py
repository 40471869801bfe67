"""Readers: they follow, leave, return and hop between servers. What they see is recorded.

A reader is one `Reader` of the history over all its connections. It keeps a cursor and nothing else,
and ends only when the stream told it so: a terminal event and then the end, or 204.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import orjson

from chaos.history import TERMINAL, History, Reader, Seen
from headwater.clock import Clock, SystemClock

#: What a connection may meet while things break: it is made again, elsewhere.
BROKEN: Final = (aiohttp.ClientError, TimeoutError, OSError)
#: Statuses that say "not now"; the second is looked into afterwards: was there really no room?
LATER: Final = frozenset({503, 507})


#: A request that was refused for want of room: from when to when, in Unix milliseconds, and what was said.
Refusal = tuple[int, int, str]


class Left(Exception):
    """The reader goes away for a while."""


@dataclass(slots=True)
class World:
    """What all clients share."""

    endpoints: Sequence[str]
    http: aiohttp.ClientSession
    history: History
    #: Seconds of silence after which a reader takes a connection for dead.
    patience: float
    #: Seconds after which some readers come for the first time: the log has expired by then.
    late: float
    clock: Clock = field(default_factory=SystemClock)
    #: No more questions.
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    #: Give up.
    over: asyncio.Event = field(default_factory=asyncio.Event)
    #: When text arrived that was just written, by time.monotonic().
    pulse: list[float] = field(default_factory=list)
    #: Seconds from a question's first request to its 202.
    accepted_after: list[float] = field(default_factory=list)
    #: Of the request that was answered so: when it began, by time.monotonic(), and seconds it took.
    requests: list[tuple[float, float]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def spawn(self, work: Awaitable[None]) -> None:
        self.tasks.add(asyncio.ensure_future(work))

    async def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)

    def complain(self, what: str, status: int, body: str) -> None:
        self.history.complaints.append(f"{status} from {what}: {body[:300]}")

    def no_room(self, began: int, what: str, body: str) -> None:
        """A request that began at `began`, in Unix milliseconds, was answered with 507."""
        self.refused.append((began, self.clock.now_ms(), f"507 from {what}: {body[:300]}"))


@dataclass(slots=True)
class Following:
    """A reader and where it stands."""

    reader: Reader
    world: World
    cursor: str = ""
    #: Events after which it goes away; None: it stays.
    leave_after: int | None = None
    #: Seconds it takes over an event.
    slow: float = 0.0
    #: The last event was the end.
    ended: bool = False

    def take(self, cursor: str, event: Mapping[str, Any]) -> None:
        """Record an event as it came off the wire. Raises Left when it is time to go."""
        data = {name: value for name, value in event.items() if name not in {"seq", "type", "run_id"}}
        epoch, _, seq = cursor.rpartition("-")
        if int(seq) != event["seq"]:
            self.world.history.complaints.append(f"{self.reader.name} got {event} under the id {cursor}")
        now = self.world.clock.now_ms()
        self.reader.events.append(Seen(epoch, event["seq"], event["type"], data, now))
        self.cursor = cursor
        self.ended = event["type"] in TERMINAL
        if event["type"] == "content" and now - data["at"] < 1000:
            self.world.pulse.append(time.monotonic())
        if self.leave_after is not None:
            self.leave_after -= 1
            if self.leave_after <= 0:
                raise Left


# --- transports --------------------------------------------------------------------------------


async def sse(following: Following, base: str, chance: random.Random) -> None:
    """One connection by server-sent events."""
    world, reader = following.world, following.reader
    address = f"{base}/api/stream/{reader.run_id}"
    headers, query = {}, {}
    if following.cursor:
        if chance.random() < 0.5:
            headers["Last-Event-ID"] = following.cursor
        else:
            query["after"] = following.cursor
    timeout = aiohttp.ClientTimeout(sock_connect=2, sock_read=world.patience)
    async with world.http.get(address, headers=headers, params=query, timeout=timeout) as response:
        if response.status == 204:
            reader.finished = True
        elif response.status == 200:
            async for cursor, event in _frames(response):
                following.take(cursor, event)
                if following.slow:
                    await asyncio.sleep(following.slow)
            # The body came to its regular end: without a terminal event, the server stops and says so.
            reader.finished = following.ended
        else:
            await refused(world, "GET /api/stream", response)


async def poll(following: Following, base: str, chance: random.Random) -> None:
    """One request by long polling."""
    world, reader = following.world, following.reader
    wait = chance.choice((0.0, 1.0, 5.0))
    query = {"wait": str(wait), "limit": str(chance.choice((1, 7, 1000)))}
    if following.cursor:
        query["after"] = following.cursor
    timeout = aiohttp.ClientTimeout(total=wait + world.patience, sock_connect=2)
    address = f"{base}/api/runs/{reader.run_id}/events"
    async with world.http.get(address, params=query, timeout=timeout) as response:
        if response.status != 200:
            await refused(world, "GET /api/runs/…/events", response)
            return
        page = orjson.loads(await response.read())
    if page["cursor"] is None:
        return
    epoch = page["cursor"].rpartition("-")[0]
    if page["reset"]:
        following.take(f"{epoch}-0", {"seq": 0, "type": "reset", "at": 0, "reason": "history_lost"})
    for event in page["items"]:
        following.take(f"{epoch}-{event['seq']}", event)
    following.cursor = page["cursor"]
    reader.finished = page["done"]


Transport = Callable[[Following, str, random.Random], Awaitable[None]]

#: How a reader of one run can read. A new transport is one more entry.
TRANSPORTS: Final[Mapping[str, Transport]] = {"sse": sse, "poll": poll}


async def follow(following: Following, chance: random.Random, delay: float) -> None:
    """Read a run to its end, over as many connections as it takes."""
    world, reader = following.world, following.reader
    coming_and_going = chance.random() < 0.4
    following.slow = chance.choice((0.0, 0.0, 0.0, 0.02, 0.1))
    await world.pause(delay)
    while not reader.finished and not world.over.is_set():
        reader.connections += 1
        following.leave_after = chance.randrange(1, 12) if coming_and_going else None
        try:
            await TRANSPORTS[reader.transport](following, chance.choice(world.endpoints), chance)
        except Left:
            await world.pause(chance.uniform(0, 2))
        except BROKEN:
            await world.pause(chance.uniform(0.05, 0.5))
        else:
            await world.pause(0.02 if reader.transport == "poll" else chance.uniform(0.05, 0.3))


class Fleet:
    """All runs of one person over one connection, as a page with several chats follows them."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._following: dict[str, Following] = {}
        self._changed = asyncio.Event()
        #: Nobody adds another run.
        self.complete = asyncio.Event()

    def add(self, run_id: str) -> None:
        reader = Reader(f"{self._name}-fleet-{run_id[-6:]}", "sse-many", run_id)
        self._world.history.readers.append(reader)
        self._following[run_id] = Following(reader, self._world)
        self._changed.set()

    async def read(self, chance: random.Random) -> None:
        """Until every run that was added has ended and none can be added."""
        world = self._world
        while not world.over.is_set():
            self._changed.clear()
            open_ = {run_id: one for run_id, one in self._following.items() if not one.reader.finished}
            if not open_ and self.complete.is_set():
                return
            if not open_:
                await world.pause(0.2)
                continue
            await self._until_changed(open_, chance.choice(world.endpoints))
            await world.pause(chance.uniform(0, 0.3))

    async def _until_changed(self, open_: Mapping[str, Following], base: str) -> None:
        for one in open_.values():
            one.reader.connections += 1
        reading = asyncio.ensure_future(self._connection(open_, base))
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({reading, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()
            changed.cancel()
            with suppress(asyncio.CancelledError, *BROKEN):
                await reading

    async def _connection(self, open_: Mapping[str, Following], base: str) -> None:
        world = self._world
        wanted = ",".join(f"{run_id}:{one.cursor}" if one.cursor else run_id for run_id, one in open_.items())
        timeout = aiohttp.ClientTimeout(sock_connect=2, sock_read=world.patience + 5)
        async with world.http.get(f"{base}/api/stream", params={"runs": wanted}, timeout=timeout) as response:
            if response.status == 204:
                for one in open_.values():
                    one.reader.finished = True
                return
            if response.status != 200:
                await refused(world, "GET /api/stream?runs=", response)
                return
            async for cursor, event in _frames(response):
                if cursor:
                    open_[event["run_id"]].take(cursor, event)
                elif event["retryable"]:
                    # This run is not followed here; the others are. Ask for all of them again in a moment.
                    asyncio.get_running_loop().call_later(1.0, self._changed.set)
                else:
                    world.complain("GET /api/stream?runs=", 200, str(event))
        for one in open_.values():
            one.reader.finished = one.ended


async def _frames(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """`(id, data)` of every whole frame that says something; raises when the connection breaks."""
    rest = b""
    async for data in response.content.iter_any():
        *whole, rest = (rest + data).split(b"\n\n")
        for frame in whole:
            said = _frame(frame)
            if said is not None:
                yield said


def _frame(frame: bytes) -> tuple[str, dict[str, Any]] | None:
    fields: dict[str, str] = {}
    for line in frame.decode().split("\n"):
        name, _, value = line.partition(":")
        fields[name] = value.removeprefix(" ")
    return (fields.get("id", ""), orjson.loads(fields["data"])) if "data" in fields else None


async def refused(world: World, what: str, response: aiohttp.ClientResponse) -> None:
    """Note an answer that is neither what was asked for nor "not now", and wait a moment."""
    if response.status not in LATER:
        world.complain(what, response.status, await response.text())
    await world.pause(0.2)
