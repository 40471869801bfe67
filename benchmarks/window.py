"""One measurement of one contestant: readers open, events flow evenly, and a window of that is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.contestants import Channels, Contestant
from benchmarks.load.streams import Publisher, Readers
from benchmarks.machine import Usage, Watch

#: Share of a core above which what surrounds the server may be the limit.
LOAD_FULL = 0.8
#: Shares of the machine above which a window says more about the neighbours.
STEAL, FOREIGN = 0.05, 0.25


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a contestant. `rate`: events per second and run; `tick`: seconds between writes at least."""

    runs: int
    readers: int
    rate: float
    seconds: float
    warmup: float = 1.0
    #: At 30,000 events/s a write holds 15 events, and the last waits for all the others, with any server; with 1 ms it
    #: were 30. With 0.2 ms the publisher takes 8 to 24 % of its core rather than 5 to 14 %, which the readers' client
    #: and Redis need, and with a write per event 40 %.
    tick: float = 0.0005


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen. Shares are of one core for `…_core`, of the whole machine for `steal` and `foreign`."""

    contestant: str
    runs: int
    readers: int
    #: Readers that were refused or whose stream ended; what they should have got counts as not delivered.
    lost: int
    #: Deliveries per second that were planned, and that were due by what was really published.
    asked: float
    offered: float
    delivered: float
    #: CPU microseconds per delivered event: the server alone, and Redis.
    cpu_us: float
    redis_us: float
    p50_ms: float
    p99_ms: float
    server_core: float
    redis_core: float
    publisher_core: float
    client_core: float
    steal: float
    foreign: float

    @property
    def disturbed(self) -> bool:
        return self.steal > STEAL or self.foreign > FOREIGN

    @property
    def load_core(self) -> float:
        """What surrounds the server, on a core of its own: Redis, publisher and client."""
        return self.redis_core + self.publisher_core + self.client_core

    @property
    def load_full(self) -> bool:
        return self.load_core > LOAD_FULL

    def row(self) -> dict[str, Any]:
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()}

    def line(self) -> str:
        """One line for who watches."""
        marks = " DISTURBED" if self.disturbed else ""
        marks += f" {self.lost} READERS LOST" if self.lost else ""
        marks += " LOAD CORE FULL" if self.load_full else ""
        return (
            f"  {self.contestant:20} {self.runs:5} runs {self.readers:5} readers  {self.delivered:8.3%} of "
            f"{self.offered:7,.0f}/s  {self.cpu_us:6.1f} us/event (+{self.redis_us:.1f} Redis)  "
            f"p50 {self.p50_ms:8.3f}  p99 {self.p99_ms:8.2f} ms  "
            f"server {self.server_core:4.0%}  Redis {self.redis_core:4.0%}  publisher {self.publisher_core:4.0%}  "
            f"client {self.client_core:4.0%}  "
            f"steal {self.steal:4.0%}  foreign {self.foreign:4.0%}{marks}"
        )


class Stage:
    """Where contestants perform: the core of publisher and readers, and Redis's processes."""

    def __init__(self, core: int | None, redis: Sequence[int]) -> None:
        self.core = core
        self.redis = redis

    async def measure(self, contestant: Contestant, load: Load) -> Window:
        """One window. Raises RuntimeError when the server serves nobody or does not take the events."""
        channels = await contestant.channels(load.runs)
        async with (
            Publisher(contestant.spec(channels, load.rate, load.tick), self.core) as publisher,
            self.readers(contestant, channels, load) as readers,
        ):
            await readers.said("open")
            publisher.go()
            return await self._window(contestant, load, readers, publisher)

    def readers(self, contestant: Contestant, channels: Channels, load: Load) -> Readers:
        return Readers(
            contestant.server.port,
            channels.requests,
            load.readers,
            warmup=load.warmup,
            seconds=load.seconds,
            per_second=contestant.per_second,
            core=self.core,
        )

    async def _window(self, contestant: Contestant, load: Load, readers: Readers, publisher: Publisher) -> Window:
        await readers.said("measure")
        watch = Watch(server=contestant.pids, redis=self.redis, publisher=[publisher.process.pid])
        await readers.said("measured")
        usage = watch.usage()
        seen = await readers.result()
        sent = await publisher.stop(seen["from_ns"], seen["to_ns"])
        if seen["open"] == 0:
            raise RuntimeError(f"{contestant.name} serves nobody: {seen}. Its log: {contestant.server.log_file}")
        if sent["answered"] < sent["sent"] * 0.99:
            raise RuntimeError(f"{contestant.name} accepted {sent['answered']} of {sent['sent']} published events")
        return window(contestant.name, load, seen, sent["published"], usage)


def window(name: str, load: Load, seen: dict[str, Any], published: int, usage: Usage) -> Window:
    """The figures of one window, from what its processes said."""
    due = published * load.readers / load.runs
    events = max(1, seen["events"])
    return Window(
        contestant=name,
        runs=load.runs,
        readers=load.readers,
        lost=seen["refused"] + seen["ended"],
        asked=load.rate * load.readers,
        offered=due / load.seconds,
        delivered=seen["delivered"] / max(1.0, due),
        cpu_us=usage.cpu["server"] / events * 1e6,
        redis_us=usage.cpu["redis"] / events * 1e6,
        p50_ms=seen["p50_us"] / 1000,
        p99_ms=seen["p99_us"] / 1000,
        server_core=usage.cpu["server"] / load.seconds,
        redis_core=usage.cpu["redis"] / load.seconds,
        publisher_core=usage.cpu["publisher"] / load.seconds,
        client_core=seen["client_cpu_s"] / load.seconds,
        steal=usage.steal,
        foreign=usage.foreign,
    )
