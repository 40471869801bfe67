"""The worker: how many answers one process holds, and what a token costs, against the official client under Celery."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from celery import Celery

from benchmarks.chart import Bars, draw
from benchmarks.load import Provider, provider, tap
from benchmarks.machine import Watch, cpu_of, memory_of, raise_descriptors
from benchmarks.parts import Parts, Program
from benchmarks.report import Report, Row, median, quantile
from headwater.dev.services import Redis
from headwater.ids import new_id
from headwater.queue import RUN_TASK, make_celery, queue_of
from headwater.runs import Run
from headwater.settings import Settings

#: Tokens a second of one answer, and how many of them carry one stamp.
RATE: Final = 50
EVERY: Final = 10
ANSWERS: Final = 1_000
#: A token that is in the log later than so many seconds counts as not delivered.
LATE: Final = 1.0
#: Seconds measured, and seconds before it that answers settle.
WINDOW: Final = 4.0
SETTLE: Final = 1.0
#: A prefork child with the official client takes about so much.
CHILD: Final = 64 * 2**20

PSUBSCRIBE: Final = b"*2\r\n$10\r\nPSUBSCRIBE\r\n$8\r\nstream:*\r\n"


@dataclass(slots=True)
class Contestant:
    """A worker, how it gets work, and what it holds."""

    name: str
    program: Program
    send: Callable[[int], None]
    #: The ramp, rising.
    steps: Sequence[int]
    #: Whether each answer takes a process.
    forks: bool = False
    #: Whether it is measured at every step, also above what it carries.
    whole: bool = False
    #: Bytes of the worker with nothing to do.
    idle: float = 0.0
    #: The largest step it carried.
    best: int = 0

    def per_answer(self, answers: int, memory: float) -> float:
        """Bytes of memory an answer takes."""
        pids = self.program.pids
        if self.forks:
            return memory_of(pids[1:]) / max(1, len(pids) - 1)
        return (memory - self.idle) / answers


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured with so many answers."""

    contestant: str
    answers: int
    delivered: float
    p50: float
    p99: float
    worker: float
    redis: float
    memory: float
    per_answer: float
    steal: float
    foreign: float

    @property
    def carried(self) -> bool:
        return self.p99 <= LATE

    def row(self) -> Row:
        return {
            "worker": self.contestant,
            "answers": self.answers,
            "delivered %": 100 * self.delivered,
            "lag p50 ms": _ms(self.p50),
            "lag p99 ms": _ms(self.p99),
            "CPU µs/token": self.worker,
            "of Redis": self.redis,
            "memory MiB": self.memory / 2**20,
            "per answer KiB": self.per_answer / 2**10,
            "steal %": 100 * self.steal,
            "foreign %": 100 * self.foreign,
        }


async def run(quick: bool = False) -> Report:
    report = Report(
        "worker",
        f"Answers of {RATE} tokens/s from a scripted API, written to the log in Redis. Delivered: tokens in the log "
        f"within {LATE:g} s. Lag: from the moment a token is due until it is published. headwater in one process; "
        "Celery's prefork and thread pools with the official `openai` client and RPUSH + PUBLISH + HSET per token. "
        "CPU per token is the worker's, its children's included.",
    )
    raise_descriptors()
    async with _contestants(quick) as (contestants, redis, source):
        ours, *others = contestants
        ramp = [await _ramp(one, redis, source, report) for one in contestants]
        if quick:
            rounds = [{window.contestant: window for window in ramp}]
        else:
            rounds = [{one.name: await _window(one, one.best, redis, source) for one in contestants} for _ in range(3)]
            report.tables["Rounds"] = [window.row() for one in rounds for window in one.values()]
    _conclude(report, ours, others, rounds)
    return report


def _conclude(
    report: Report, ours: Contestant, others: Sequence[Contestant], rounds: Sequence[dict[str, Window]]
) -> None:
    ratios = {one.name: median([each[one.name].worker / each[ours.name].worker for each in rounds]) for one in others}
    report.notes.append(
        "CPU per token, median of the rounds' ratios, each worker at the most answers it carried: "
        + "; ".join(
            f"{one.name} with {one.best} takes {ratios[one.name]:,.1f} times what headwater takes with {ours.best}"
            for one in others
        )
        + "."
    )
    report.goal("answers carried by one headwater process", ours.best, f">= {ANSWERS}", ours.best >= ANSWERS)
    report.pictures["worker.svg"] = _picture([ours, *others], rounds)
    least = min(ratios.values())
    report.goal("CPU per token, the better of the others / headwater", least, ">= 10", least >= 10)


def _picture(contestants: Sequence[Contestant], rounds: Sequence[dict[str, Window]]) -> str:
    names = [f"{one.name}, {one.best}" for one in contestants]
    cpu = [median([each[one.name].worker for each in rounds]) for one in contestants]
    memory = [median([each[one.name].per_answer for each in rounds]) / 1024 for one in contestants]
    note = "each worker at the most answers that it carried"
    return draw(
        [
            Bars(
                "CPU of the worker per token",
                note,
                [(*bar, f"{bar[1]:,.0f} µs") for bar in zip(names, cpu, strict=True)],
            ),
            Bars("Memory per answer", note, [(*bar, f"{bar[1]:,.0f} KiB") for bar in zip(names, memory, strict=True)]),
        ]
    )


@asynccontextmanager
async def _contestants(quick: bool) -> AsyncIterator[tuple[list[Contestant], Redis, Provider]]:
    """All workers, warm and idle, on one Redis."""
    room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    steps = [10] if quick else [step for step in (10, 20, 40, 80) if step * CHILD < room / 2]
    with Parts() as parts:
        redis, database = parts.redis(), parts.postgres()
        async with provider(RATE, every=EVERY) as source:
            program = parts.headwater(
                "worker",
                DATABASE_URL=database.url(),
                REDIS_URL=redis.url(),
                OPENAI_BASE_URL=source.url,
                OPENAI_MODEL="scripted",
                HEADWATER_WORKER_CONCURRENCY=str(ANSWERS + 10),
            )
            contestants = [
                Contestant(
                    "headwater", program, _sender(redis), [50] if quick else [100, 300, 600, ANSWERS], whole=True
                )
            ]
            for pool, forks in (("prefork", True), ("threads", False)):
                url = redis.url(database=1 + forks)
                command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive_worker", "worker"]
                command += ["--pool", pool, "--concurrency", str(steps[-1]), "--loglevel", "WARNING", "-n", pool]
                command += ["--without-mingle", "--without-gossip"]
                program = parts.program(pool, 0, command, ready=lambda: True, REDIS_URL=url, OPENAI_BASE_URL=source.url)
                contestants.append(Contestant(f"{pool} + openai", program, _naive_sender(url), steps, forks))
            for one in contestants:
                await _warm(one, source)
            yield contestants, redis, source


def _sender(redis: Redis) -> Callable[[int], None]:
    celery = make_celery(Settings(REDIS_URL=redis.url(), _env_file=None))

    def send(answers: int) -> None:
        for _ in range(answers):
            asked = {"messages": [{"role": "user", "content": "Tell me."}]}
            run = Run(new_id(), "chat", "local", asked, time.time_ns() // 1_000_000)
            celery.send_task(RUN_TASK, args=[run.to_json()], task_id=run.id, queue=queue_of(run), ignore_result=True)

    return send


def _naive_sender(url: str) -> Callable[[int], None]:
    celery: Any = Celery("naive", broker=url, set_as_current=False)

    def send(answers: int) -> None:
        for _ in range(answers):
            celery.send_task("naive.answer", args=[new_id()], ignore_result=True)

    return send


async def _warm(one: Contestant, source: Provider) -> None:
    """Everything imported, connected and called once."""
    await asyncio.to_thread(one.send, 4)
    if await source.streaming(4, 60.0) < 4:
        raise RuntimeError(f"{one.name} takes no work. Its log:\n{one.program.log_file.read_text()[-2000:]}")
    await _drain(one, source)
    one.idle = memory_of(one.program.pids)


async def _drain(one: Contestant, source: Provider) -> None:
    """End the answers and wait until the worker has nothing left to do."""
    await source.finish()
    end, before = time.monotonic() + 30.0, math.inf
    while time.monotonic() < end:
        now = cpu_of(one.program.pids)
        if now - before < 0.02 and (await source.stats())["active"] == 0:
            return
        before = now
        await asyncio.sleep(0.5)


async def _ramp(one: Contestant, redis: Redis, source: Provider, report: Report) -> Window:
    """More and more answers, as a rule until it does not carry them; the last it carried, or else the first."""
    kept: Window | None = None
    for step in one.steps:
        window = await _window(one, step, redis, source)
        report.rows.append(window.row())
        if kept is None or window.carried:
            kept, one.best = window, step
        if not (window.carried or one.whole):
            break
    assert kept is not None
    return kept


async def _window(one: Contestant, answers: int, redis: Redis, source: Provider) -> Window:
    pids = one.program.pids
    await asyncio.to_thread(one.send, answers)
    # Those that do not come to stream are offered all the same.
    absent = answers - await source.streaming(answers, 15.0)
    await asyncio.sleep(SETTLE)
    async with tap() as follower:
        follower.read(0, redis.port, PSUBSCRIBE)
        before = await source.stats()
        watch, begun = Watch(worker=pids, redis=[redis.pid]), time.monotonic_ns()
        await asyncio.sleep(WINDOW)
        usage, ended = watch.usage(), time.monotonic_ns()
        offered = (await source.stats())["stamps"] - before["stamps"] + round(absent * RATE * WINDOW / EVERY)
        memory = memory_of(pids)
        per_answer = one.per_answer(answers, memory)
        await asyncio.sleep(LATE)
    await _drain(one, source)
    lags = [seen.lag for seen in follower.seen if begun <= seen.stamp < ended]
    published = EVERY * sum(begun <= seen.arrival < ended for seen in follower.seen)
    missing = [math.inf] * max(0, offered - len(lags))
    return Window(
        one.name,
        answers,
        # The stamps at the window's two edges make it exact to a few.
        min(1.0, sum(lag <= LATE for lag in lags) / max(1, offered)),
        quantile([*lags, *missing], 0.5),
        quantile([*lags, *missing], 0.99),
        usage.cpu["worker"] / max(1, published) * 1e6,
        usage.cpu["redis"] / max(1, published) * 1e6,
        memory,
        per_answer,
        usage.steal,
        usage.foreign,
    )


def _ms(seconds: float) -> float | str:
    """Milliseconds; for tokens that did not come within the measurement only that."""
    return "not in time" if math.isinf(seconds) else seconds * 1000
