"""Push against polling: the same events through the log and the hub, and through a table that every reader asks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from benchmarks.chart import Bars, draw
from benchmarks.machine import Watch, family
from benchmarks.parts import Parts
from benchmarks.report import Report, median, quantile
from headwater import events, streams
from headwater.dev.services import Postgres, Redis
from headwater.hub import Hub
from headwater.ids import new_id
from headwater.runs import Lease, Run
from headwater.service import running
from headwater.telemetry import Telemetry

RUNS: Final = 10
#: Readers of each run; together a hundred.
READERS: Final = 10
#: Events a second of one run.
RATE: Final = 10
#: Seconds between two looks of a reader that polls.
EVERY: Final = 0.5
#: Connections the pollers share, as a server's pool does.
CONNECTIONS: Final = 20
ROUNDS: Final = 3
WINDOW: Final = 6.0
#: What the usual way claims for push.
REACH: Final = 30


@dataclass(slots=True)
class Way:
    """How events get from their writer to their readers."""

    #: Writes one event, which holds its time, to the run of that number.
    write: Callable[[int, str], Awaitable[object]]
    #: Seconds each event took to each reader.
    lags: list[float] = field(default_factory=list)
    #: What was sent to PostgreSQL.
    queries: int = 0

    def got(self, stamp: str) -> None:
        self.lags.append((time.monotonic_ns() - int(stamp)) / 1e9)


async def run(quick: bool = False) -> Report:
    report = Report(
        "polling",
        f"{RUNS} runs of {RATE} events/s with {READERS} readers each. Push: events are appended to the log in Redis "
        "and reach the readers through the hub. Polling: events are rows in PostgreSQL, and every reader asks for new "
        f"ones each {EVERY * 1000:g} ms, over {CONNECTIONS} shared connections. Latency: from just before the event is "
        "written until its reader has it. Redis and PostgreSQL: CPU in % of one core.",
    )
    rounds: list[dict[str, Any]] = []
    with Parts() as parts:
        redis, database = parts.redis(), parts.postgres()
        for _ in range(1 if quick else ROUNDS):
            one = {}
            # Each way only for its window: pollers ask also when nothing comes.
            for name, opened in (("push", _pushed(redis.url())), ("polling", _polled(database.url()))):
                async with opened as way:
                    one[name] = await _window(way, redis, database, 2.0 if quick else WINDOW)
                report.rows.append({"way": name, **one[name]})
            rounds.append({name: figures["p50 ms"] for name, figures in one.items()})
    ratio = median([one["polling"] / one["push"] for one in rounds])
    lags = {way: median([one[way] for one in rounds]) for way in ("push", "polling")}
    note = f"{RUNS * READERS} readers; polling asks every {EVERY * 1000:g} ms"
    report.pictures["polling.svg"] = draw(
        [Bars("Event to reader, median", note, [(way, lag, f"{lag:,.1f} ms") for way, lag in lags.items()])]
    )
    report.goal("median latency, polling / push, median of the rounds", ratio, f">= {REACH}", ratio >= REACH)
    return report


async def _window(way: Way, redis: Redis, database: Postgres, seconds: float) -> dict[str, Any]:
    way.lags.clear()
    way.queries = 0
    watch = Watch(redis=[redis.pid], postgres=family(database.pid))
    begun, count = time.monotonic(), round(seconds * RATE)
    await asyncio.gather(*(_writer(way, number, count) for number in range(RUNS)))
    # The last events are still to be asked for.
    await asyncio.sleep(2 * EVERY)
    usage, took = watch.usage(), time.monotonic() - begun
    return {
        "delivered %": 100 * len(way.lags) / (count * RUNS * READERS),
        "p50 ms": quantile(way.lags, 0.5) * 1000,
        "p99 ms": quantile(way.lags, 0.99) * 1000,
        "Redis %": 100 * usage.cpu["redis"] / took,
        "PostgreSQL %": 100 * usage.cpu["postgres"] / took,
        "queries/s": way.queries / took,
        "steal %": 100 * usage.steal,
        "foreign %": 100 * usage.foreign,
    }


async def _writer(way: Way, number: int, count: int) -> None:
    due = time.monotonic() + number / RUNS / RATE
    for _ in range(count):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due += 1 / RATE
        await way.write(number, str(time.monotonic_ns()))


@asynccontextmanager
async def _readers(readers: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Readers that run until the block ends."""
    tasks = [asyncio.create_task(reader) for reader in readers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    if failures := [end for end in ends if isinstance(end, Exception)]:
        raise failures[0]


# --- through the log ----------------------------------------------------------------------------


@asynccontextmanager
async def _pushed(url: str) -> AsyncIterator[Way]:
    log = streams.connect(url, ttl=3600, lease_seconds=60.0)
    hub = Hub(log, history=None, telemetry=Telemetry())
    leases: list[Lease] = []
    written = [0] * RUNS

    async def write(number: int, stamp: str) -> None:
        written[number] += 1
        await log.append(leases[number], [events.content(stamp).stamped(written[number], 0)])

    async def follow(run_id: str) -> None:
        subscription = hub.subscribe(run_id, None)
        try:
            while (batch := await subscription.next()) is not None:
                for event in batch.events:
                    way.got(event.data["text"])
        finally:
            subscription.close()

    way = Way(write)
    try:
        for _ in range(RUNS):
            run = Run(new_id(), "chat", "local", {}, time.time_ns() // 1_000_000)
            leases.append(await log.claim(run, "benchmark"))
        async with running(hub), _readers(follow(lease.run_id) for lease in leases for _ in range(READERS)):
            yield way
    finally:
        await log.close()


# --- through a table ----------------------------------------------------------------------------


@asynccontextmanager
async def _polled(url: str) -> AsyncIterator[Way]:
    pool: asyncio.Queue[psycopg.AsyncConnection[Any]] = asyncio.Queue()

    async def query(statement: str, *values: object) -> Any:
        way.queries += 1
        connection = await pool.get()
        try:
            return await connection.execute(statement, values, prepare=True)
        finally:
            pool.put_nowait(connection)

    async def write(number: int, stamp: str) -> None:
        await query("INSERT INTO stream_chunks (run, content) VALUES (%s, %s)", number, stamp)

    async def follow(number: int, seen: int) -> None:
        await asyncio.sleep(random.uniform(0, EVERY))
        while True:
            asked = time.monotonic()
            found = await query(
                "SELECT id, content FROM stream_chunks WHERE run = %s AND id > %s ORDER BY id", number, seen
            )
            for row, stamp in await found.fetchall():
                seen = row
                way.got(stamp)
            await asyncio.sleep(max(0.0, asked + EVERY - time.monotonic()))

    way = Way(write)
    async with AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
            pool.put_nowait(await stack.enter_async_context(connection))
        await query("CREATE TABLE IF NOT EXISTS stream_chunks (id bigserial PRIMARY KEY, run int, content text)")
        await query("CREATE INDEX IF NOT EXISTS by_run ON stream_chunks (run, id)")
        (last,) = await (await query("SELECT coalesce(max(id), 0) FROM stream_chunks")).fetchone()
        async with _readers(follow(number, last) for number in range(RUNS) for _ in range(READERS)):
            yield way
