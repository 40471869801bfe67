"""The journal: what one durable record costs, and what acceptance gains over waiting for PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import psycopg

from benchmarks.chart import Bars, draw
from benchmarks.load.delay import Delay, delayed
from benchmarks.parts import Parts
from benchmarks.report import Report, median, quantile
from headwater.clock import SystemClock
from headwater.ids import new_id
from headwater.journal import Journal
from headwater.messages import Message, Role
from headwater.records import Record
from headwater.telemetry import Telemetry

#: Characters of one message.
SIZE: Final = 2_000
#: What the disk itself is called.
DISK: Final = "write + fdatasync"
ROUNDS: Final = 5
WRITERS: Final = (1, 4, 16)
SECONDS: Final = 1.0
#: Milliseconds added to a round trip to PostgreSQL. The last is what the usual way was reported to wait, and is
#: measured once: it hardly varies.
DELAYS: Final = (0, 10, 1500)
#: What the usual way was reported to reach with the last delay, and the journal beside it, in records/s.
USUAL: Final = 2.67
REACH: Final = 4_000

Save = Callable[[int], Awaitable[object]]


def record() -> Record:
    """A finished answer of about 2 KB."""
    text = "x" * SIZE
    return Record.of(Message(new_id(), new_id(), "local", Role.ASSISTANT, text, 1_767_225_600_000, version=6))


def raw_disk(folder: Path) -> list[float]:
    """Seconds of one write and fdatasync of as many bytes: the floor of this disk."""
    data, times = b"x" * SIZE, []
    with (folder / "raw").open("wb") as file:
        for _ in range(300):
            begun = time.perf_counter()
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return times


class Results:
    """Records/s and seconds of each save, by what was measured, one entry per round."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = defaultdict(list)
        self.p50s: dict[str, list[float]] = defaultdict(list)
        self.p99s: dict[str, list[float]] = defaultdict(list)

    def add(self, what: str, times: Sequence[float], seconds: float) -> None:
        self.rates[what].append(len(times) / seconds)
        self.p50s[what].append(quantile(times, 0.5))
        self.p99s[what].append(quantile(times, 0.99))

    async def storm(self, what: str, save: Save, writers: int, seconds: float) -> None:
        """So many writers, each saving one record after the other; each finishes the one it began."""
        times: list[float] = []
        start = time.perf_counter()

        async def writer(number: int) -> None:
            while (begun := time.perf_counter()) < start + seconds:
                await save(number)
                times.append(time.perf_counter() - begun)

        await asyncio.gather(*(writer(number) for number in range(writers)))
        self.add(what, times, time.perf_counter() - start)


async def run(quick: bool = False) -> Report:
    report = Report(
        "journal",
        "A record of 2 KB made durable: by the journal (`synchronous=FULL`, group commit), by the disk's own write + "
        "fdatasync, and by one INSERT straight into PostgreSQL, its own transaction, with a delay added to the "
        "network's round trip. A writer waits for each of its records.",
    )
    results = Results()
    with Parts() as parts:
        database = parts.postgres()
        socket = str(Path(database.url().split("host=")[1]) / ".s.PGSQL.5432")
        journal = Journal(parts.folder / "journal.db", clock=SystemClock(), telemetry=Telemetry())
        await journal.open()
        try:
            async with delayed(socket) as delay, _connections(delay.port) as save:
                for number in range(1 if quick else ROUNDS):
                    await _round(results, parts.folder, journal)
                    await _direct(results, save, delay, DELAYS[:2] if quick or number else DELAYS)
        finally:
            await journal.close()
    _conclude(report, results, quick)
    return report


async def _round(results: Results, folder: Path, journal: Journal) -> None:
    disk = raw_disk(folder)
    results.add(DISK, disk, sum(disk))
    for writers in WRITERS:
        await results.storm(_journal(writers), lambda _: journal.add([record()]), writers, SECONDS)


async def _direct(results: Results, save: Save, delay: Delay, delays: Sequence[int]) -> None:
    for added in delays:
        delay.seconds = added / 2000
        for writers in WRITERS[1:]:
            await results.storm(_postgres(added, writers), save, writers, SECONDS if added < 1000 else 3 * added / 1000)
    delay.seconds = 0.0


@asynccontextmanager
async def _connections(port: int) -> AsyncIterator[Save]:
    """Saves one message over the writer's own connection, which is there already, as a service's is."""
    url = f"postgresql://postgres@127.0.0.1:{port}/headwater"
    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(await psycopg.AsyncConnection.connect(url, autocommit=True))
            for _ in range(WRITERS[-1])
        ]
        await connections[0].execute("CREATE TABLE saved (id text PRIMARY KEY, content text NOT NULL)")

        async def save(writer: int) -> None:
            await connections[writer].execute(
                "INSERT INTO saved VALUES (%s, %s) ON CONFLICT DO NOTHING", (new_id(), "x" * SIZE), prepare=True
            )

        for writer in range(len(connections)):
            await save(writer)
        yield save


def _journal(writers: int) -> str:
    return f"journal, {writers} writer{'s' * (writers > 1)}"


def _postgres(added: int, writers: int) -> str:
    return f"PostgreSQL, {added} ms added, {writers} writers"


def _conclude(report: Report, results: Results, quick: bool) -> None:
    rates = {what: median(values) for what, values in results.rates.items()}
    for what, rate in rates.items():
        p50, p99 = median(results.p50s[what]) * 1000, median(results.p99s[what]) * 1000
        disk = p50 / median(results.p50s[DISK]) / 1000
        report.rows.append({"what": what, "records/s": rate, "p50 ms": p50, "p99 ms": p99, "p50 / disk": disk})
    bars = [(what, rate, f"{rate:,.0f} /s") for what, rate in rates.items() if what != DISK]
    report.pictures["journal.svg"] = draw([Bars("Records made durable", "2 KB each", bars)])
    for added in DELAYS[: 2 if quick else 3]:
        for writers in WRITERS[1:]:
            ratio = _ratio(results, _journal(writers), _postgres(added, writers))
            row = {"added ms": added, "writers": writers, "journal / PostgreSQL, records/s": ratio}
            report.tables.setdefault("Accepted records, median of the rounds' ratios", []).append(row)
    p50 = median(results.p50s[_journal(1)]) * 1000
    report.goal("commit of a 2 KB record, p50 ms", p50, "< 1", p50 < 1)
    rate = rates[_journal(16)]
    report.goal("journal, records/s with 16 writers", rate, f">= {REACH:,}", rate >= REACH)
    if not quick:
        ratio = _ratio(results, _journal(4), _postgres(DELAYS[-1], 4))
        reach = REACH / USUAL
        report.goal(f"journal / PostgreSQL {DELAYS[-1]} ms away, 4 writers", ratio, f">= {reach:,.0f}", ratio >= reach)


def _ratio(results: Results, one: str, other: str) -> float:
    return median([mine / theirs for mine, theirs in zip(results.rates[one], results.rates[other], strict=False)])
