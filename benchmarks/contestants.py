"""Who serves the readers: headwater, the usual server, and Nchan, each behind the same few words."""

from __future__ import annotations

import asyncio
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from redis.asyncio import Redis as Client

from benchmarks.load.streams import Spec
from benchmarks.machine import family
from benchmarks.parts import Parts, Program, answers
from headwater.clock import SystemClock
from headwater.dev.services import Redis, free_port
from headwater.events import Event, EventType
from headwater.ids import new_id
from headwater.runs import Lease, Run
from headwater.streams import keys
from headwater.streams.redis import RedisStreamLog
from headwater.streams.scripts import Scripts

#: Characters of text in an event, which makes about 100 bytes of JSON.
TEXT: Final = 30
#: Keep-alive connections over which Nchan is published to.
POSTERS: Final = 8
#: Seconds of a lease: longer than any measurement, so that nobody takes a run over.
LEASE: Final = 3600


@dataclass(frozen=True, slots=True)
class Channels:
    """Fresh channels: what a reader of each asks for, how to publish to them, and their names in Redis."""

    requests: Sequence[str]
    targets: Sequence[str]
    names: Sequence[str]


class Contestant(ABC):
    """A server of streams. `pids` are all its processes."""

    name: ClassVar[str]
    #: What every accepted event is answered with, and over how many connections events are sent.
    answer: ClassVar[str]
    connections: ClassVar[int] = 1
    #: Readers that may connect per second, so that connecting is no storm.
    per_second: ClassVar[int] = 1000

    def __init__(self, server: Program, publish_port: int) -> None:
        self.server = server
        self.publish_port = publish_port

    @property
    def pids(self) -> list[int]:
        return self.server.pids

    @abstractmethod
    async def channels(self, count: int) -> Channels:
        """Channels that nobody has read or written yet."""

    def spec(self, channels: Channels, rate: float, tick: float) -> Spec:
        """For `load.Publisher`."""
        return Spec(self.publish_port, rate, tick, self.connections, self.answer, TEXT, channels.targets)


class Headwater(Contestant):
    """One `headwater server`. Events go through push.lua, as nearly all of a worker's do: one step."""

    name = "headwater"
    answer = ":"
    # Each is checked for its owner and reads its log before it is live.
    per_second = 500

    def __init__(self, parts: Parts, redis: Redis, core: int | None) -> None:
        server = parts.headwater(
            "server",
            core=core,
            REDIS_URL=redis.url(),
            DATABASE_URL=parts.postgres().url(),
            HEADWATER_MAX_STREAMS="100000",
            HEADWATER_LEASE_SECONDS=str(LEASE),
        )
        super().__init__(server, redis.port)
        self._url = redis.url()

    async def channels(self, count: int) -> Channels:
        log = RedisStreamLog(self._url, ttl=LEASE, lease_seconds=LEASE)
        try:
            async with Client.from_url(self._url) as client:
                # Earlier runs are over; what they left would only make the server's memory and files larger.
                await client.flushall()
                for script in Scripts().all():
                    await client.script_load(script.text)
            leases: list[Lease] = []
            for _ in range(0, count, 100):
                runs = [_run() for _ in range(min(100, count - len(leases)))]
                leases += await asyncio.gather(*(log.claim(run, "benchmark") for run in runs))
            targets = [_as_resp(log._append_command(lease, [_HOLE])) for lease in leases]
        finally:
            await log.close()
        requests = [f"/api/stream/{lease.run_id}" for lease in leases]
        return Channels(requests, targets, [keys.channel(lease.run_id) for lease in leases])


class Naive(Contestant):
    """`benchmarks/naive.py`. Events are plain PUBLISH: the log of such a design is left out in its favour."""

    name = "naive"
    answer = ":"
    per_second = 300
    path: ClassVar[str] = "stream"

    def __init__(self, parts: Parts, redis: Redis, core: int | None) -> None:
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.naive", str(port), redis.url()]
        ready = f"http://127.0.0.1:{port}/"
        server = parts.program(f"{self.name}-{port}", port, command, ready=lambda: answers(ready), core=core)
        super().__init__(server, redis.port)
        self._numbers = itertools.count()

    async def channels(self, count: int) -> Channels:
        names = [f"{self.path}-{next(self._numbers)}" for _ in range(count)]
        return Channels(
            [f"/{self.path}/{name}" for name in names],
            [_as_resp(("PUBLISH", f"stream:{name}", "@event@")) for name in names],
            [f"stream:{name}" for name in names],
        )


class Polling(Naive):
    """The same with `get_message(timeout)`, as most tutorials show it."""

    name = "naive, get_message"
    path = "poll"


class Nchan(Contestant):
    """nginx with Nchan. Its publishing by HTTP is part of its cost: the one process does both."""

    name = "Nchan"
    answer = "HTTP/1.1 20"
    connections = POSTERS

    def __init__(self, server: Program) -> None:
        super().__init__(server, server.port)
        self._numbers = itertools.count()

    async def channels(self, count: int) -> Channels:
        names = [f"run-{next(self._numbers)}" for _ in range(count)]
        post = "POST /pub?id={} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: @event#@\r\n\r\n@event@"
        return Channels([f"/sub?id={name}" for name in names], [post.format(name) for name in names], ())


def redis_pids(redis: Redis) -> list[int]:
    return family(redis.pid)


#: Stands for any event: its seq and its bytes are filled in by the publisher.
_SEQ: Final = 987_654_321
_HOLE: Final = Event(EventType.CONTENT, {}, _SEQ, raw=b"@event@")


def _run() -> Run:
    return Run(id=new_id(), kind="chat", owner_id="local", input={}, created_at=SystemClock().now_ms())


def _as_resp(command: Sequence[Any]) -> str:
    """A command as Redis reads it, with the publisher's holes."""
    parts = [f"*{len(command)}\r\n"]
    for part in command:
        text = part.decode() if isinstance(part, bytes) else str(part)
        if text == "@event@":
            parts.append("$@event#@\r\n@event@\r\n")
        elif text == str(_SEQ):
            parts.append("$@seq#@\r\n@seq@\r\n")
        else:
            parts.append(f"${len(text.encode())}\r\n{text}\r\n")
    return "".join(parts)
