"""The journal: what one durable record costs, and what acceptance gains over waiting for PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from benchmarks.report import Report, median, quantile
from headwater.clock import SystemClock
from headwater.dev.services import Postgres
from headwater.ids import new_id
from headwater.journal import Journal
from headwater.messages import Message, Role
from headwater.records import Record
from headwater.store import Store
from headwater.store.migrate import upgrade
from headwater.telemetry import Telemetry

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from chaos.proxy import Proxy  # the delaying proxy is the tests' own

#: Characters of one message.
SIZE = 2_000
ROUNDS = 5
WRITERS = 16
SECONDS = 2.0


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


async def storm(save: Callable[[Record], Awaitable[object]], writers: int, seconds: float) -> list[float]:
    """Seconds of each save, from `writers` that save one record after the other."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def writer() -> None:
        while (begun := time.perf_counter()) < end:
            await save(record())
            times.append(time.perf_counter() - begun)

    await asyncio.gather(*(writer() for _ in range(writers)))
    return times


async def run(quick: bool = False) -> Report:
    report = Report(
        "journal",
        "A record of 2 KB made durable (`synchronous=FULL`, group commit), beside the disk's own write + fdatasync; "
        "then the same messages saved straight into PostgreSQL with a delay in the network, four at a time.",
    )
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        folder = Path(name)
        await _durable(report, folder, 1 if quick else ROUNDS)
        await _against_postgres(report, folder, (0, 10) if quick else (0, 10, 1500))
    return report


async def _durable(report: Report, folder: Path, repeats: int) -> None:
    journal = Journal(folder / "journal.db", clock=SystemClock(), telemetry=Telemetry())
    await journal.open()
    ones, many, disks = [], [], []
    try:
        for _ in range(repeats):
            disks.append(raw_disk(folder))
            ones.append(await storm(lambda one: journal.append([one]), 1, 1.0))
            many.append(await storm(lambda one: journal.append([one]), WRITERS, SECONDS))
    finally:
        await journal.close()
    disk = median([quantile(times, 0.5) for times in disks])
    for what, rounds, seconds in (("1 writer", ones, 1.0), (f"{WRITERS} writers", many, SECONDS)):
        report.rows.append(
            {
                "what": f"journal, {what}",
                "records/s": median([len(times) / seconds for times in rounds]),
                "p50 ms": median([quantile(times, 0.5) for times in rounds]) * 1000,
                "p99 ms": median([quantile(times, 0.99) for times in rounds]) * 1000,
                "p50 / disk": median([quantile(times, 0.5) for times in rounds]) / disk,
            }
        )
    report.rows.append({"what": "write + fdatasync", "records/s": 1 / disk, "p50 ms": disk * 1000, "p50 / disk": 1.0})
    p50 = median([quantile(times, 0.5) for times in ones]) * 1000
    rate = median([len(times) / SECONDS for times in many])
    report.goal("commit of a 2 KB record, p50 ms", p50, "< 1", p50 < 1)
    report.goal(f"records/s with {WRITERS} writers", rate, ">= 4000", rate >= 4000)


async def _against_postgres(report: Report, folder: Path, delays: Sequence[int]) -> None:
    server = Postgres(folder / "postgres")
    server.start()
    try:
        server.create_database()
        upgrade(server.url())
        socket = str(Path(server.url().split("host=")[1]) / ".s.PGSQL.5432")
        direct = {}
        for delay in delays:
            async with Proxy(socket).run() as proxy:
                direct[delay] = await _direct(proxy, delay / 1000, 3.0 if delay < 1000 else 10.0)
            report.rows.append({"what": f"PostgreSQL, {delay} ms added, 4 writers", "records/s": direct[delay]})
    finally:
        server.stop()
    journal = next(row for row in report.rows if row["what"] == f"journal, {WRITERS} writers")["records/s"]
    slow, near = journal / max(direct[delays[-1]], 1e-9), journal / direct[0]
    report.notes.append(
        f"Accepting into the journal is {slow:,.0f} times as fast as waiting for a PostgreSQL that is "
        f"{delays[-1]} ms away, and {near:,.1f} times as fast as one that is next door."
    )


async def _direct(proxy: Proxy, delay: float, seconds: float) -> float:
    """Records per second that reach PostgreSQL when each save waits for it, `delay` seconds of round trip away."""
    url = f"postgresql://postgres@127.0.0.1:{proxy.port}/headwater"
    store = Store(url, pool_size=4, wait=60.0)
    try:
        # The connections are made first: a service has them already.
        await asyncio.gather(*(store.apply([record()]) for _ in range(4)))
        proxy.delay = delay / 2
        begun = time.perf_counter()
        times = await storm(lambda one: store.apply([one]), 4, seconds)
        return len(times) / (time.perf_counter() - begun)
    finally:
        proxy.delay = 0
        await store.close()
