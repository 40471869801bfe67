"""Readers: a thousand streams through one server process, beside the usual server and beside Nchan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from benchmarks import nchan
from benchmarks.chart import Bars, draw
from benchmarks.contestants import Contestant, Headwater, Naive, Nchan, Polling, redis_pids
from benchmarks.load.streams import Publisher, Readers
from benchmarks.machine import memory_of, raise_descriptors
from benchmarks.parts import Parts
from benchmarks.report import Report, Row, median
from benchmarks.window import Load, Stage, Window

ABOUT: Final = (
    "One server process on one core; Redis, the publisher and the readers share another one. Events are "
    "JSON of about 100 bytes with the time of their publishing in it. headwater's go through its log as a worker's "
    "do, the usual server's (`benchmarks/naive.py`: a Redis subscription per reader) are plain PUBLISH, and Nchan's "
    "(nginx from Debian, memory store) are posted to it over kept-alive connections, which is part of its cost. "
    "The contestants take turns in rounds; a cell is the median of its rounds, a goal that of the rounds' ratios."
)
SERVER_CORE, LOAD_CORE = 0, 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    rounds: int
    distinct: Load
    shared: Load
    quiet: Load
    #: Open streams without events, and as many as the usual server is asked to hold.
    idle: int
    idle_naive: int
    growth: Sequence[int]
    growth_naive: Sequence[int]


FULL: Final = Plan(
    rounds=5,
    distinct=Load(1000, 1000, 30, 3.0),
    shared=Load(10, 1000, 30, 3.0),
    quiet=Load(100, 100, 20, 4.0, tick=0.0),
    idle=5000,
    idle_naive=1000,
    growth=(100, 300, 1000, 3000),
    growth_naive=(100, 300, 1000),
)
QUICK: Final = Plan(
    rounds=1,
    distinct=Load(50, 50, 30, 1.0, 0.5),
    shared=Load(5, 50, 30, 1.0, 0.5),
    quiet=Load(20, 20, 20, 1.0, 0.5, tick=0.0),
    idle=200,
    idle_naive=100,
    growth=(20, 60),
    growth_naive=(20,),
)


async def run(quick: bool = False) -> Report:
    """All scenarios; about eight minutes, and half a minute when `quick`."""
    plan = QUICK if quick else FULL
    report = Report("readers", ABOUT)
    descriptors = raise_descriptors()
    with Parts() as parts:
        redis = parts.redis(LOAD_CORE)
        ours = Headwater(parts, redis, SERVER_CORE)
        naive, polling = Naive(parts, redis, SERVER_CORE), Polling(parts, redis, SERVER_CORE)
        peer = nchan.start(parts, SERVER_CORE, descriptors)
        if isinstance(peer, str):
            report.notes.append(f"Nchan: {peer}. Its rows and goals are missing.")
        peers = [] if isinstance(peer, str) else [Nchan(peer)]
        stage = Stage(LOAD_CORE, redis_pids(redis))
        # A server is still busy with itself in its first seconds.
        await asyncio.sleep(0.5 if quick else 5.0)
        # First, while the servers are fresh: what earlier readers left behind would be taken for nothing.
        idle = await _idle(report, stage, [ours, *peers, naive], plan, descriptors)
        distinct = await _rounds(report, stage, [ours, naive, *peers], plan.distinct, plan.rounds)
        distinct += await _rounds(report, stage, [polling], plan.distinct, 1)
        report.tables[f"{plan.distinct.runs:,} runs, one reader each"] = _table(distinct)
        shared = await _rounds(report, stage, [ours, naive, *peers], plan.shared, plan.rounds)
        report.tables[f"{plan.shared.runs:,} runs, {plan.shared.readers // plan.shared.runs} readers each"] = _table(
            shared
        )
        _goals(report, distinct, shared)
        await _quiet(report, stage, ours, redis.port, plan)
        await _growth(report, stage, ours, naive, plan)
    report.pictures["readers.svg"] = _picture(distinct, shared, idle)
    return report


async def _rounds(
    report: Report, stage: Stage, contestants: Sequence[Contestant], load: Load, rounds: int
) -> list[Window]:
    order: list[Contestant] = []
    for number in range(rounds):
        # Whoever is last meets another moment of the machine than whoever is first, so they take turns in that too.
        turn = number % len(contestants)
        order += [*contestants[turn:], *contestants[:turn]]
    return [await _measured(report, stage, contestant, load) for contestant in order]


async def _measured(report: Report, stage: Stage, contestant: Contestant, load: Load) -> Window:
    window = await stage.measure(contestant, load)
    print(window.line(), flush=True)
    report.data.append(window.row())
    return window


def _table(windows: Sequence[Window]) -> list[Row]:
    rows: list[Row] = []
    for name in dict.fromkeys(window.contestant for window in windows):
        mine = [window for window in windows if window.contestant == name]
        rows.append(
            {
                "server": name,
                "rounds": len(mine),
                "due/s": round(_mid(mine, lambda one: one.offered)),
                "delivered": f"{_mid(mine, lambda one: one.delivered):.2%}",
                "CPU µs/event": _mid(mine, lambda one: one.cpu_us),
                "with Redis": _mid(mine, lambda one: one.cpu_us + one.redis_us),
                "p50 ms": _mid(mine, lambda one: one.p50_ms),
                "p99 ms": _mid(mine, lambda one: one.p99_ms),
                "server's core": f"{_mid(mine, lambda one: one.server_core):.0%}",
                "Redis": f"{_mid(mine, lambda one: one.redis_core):.0%}",
                "publisher": f"{_mid(mine, lambda one: one.publisher_core):.0%}",
                "client": f"{_mid(mine, lambda one: one.client_core):.0%}",
                "steal": f"{max(one.steal for one in mine):.1%}",
                "foreign": f"{max(one.foreign for one in mine):.1%}",
            }
        )
    return rows


def _mid(windows: Sequence[Window], value: Callable[[Window], float]) -> float:
    return median([value(window) for window in windows])


def _ratio(windows: Sequence[Window], other: str, value: Callable[[Window], float]) -> float:
    """The median of the rounds' ratios of ours to another's."""
    ours = [value(window) for window in windows if window.contestant == Headwater.name]
    others = [value(window) for window in windows if window.contestant == other]
    return median([a / max(b, 1e-9) for a, b in zip(ours, others, strict=False)])


def _goals(report: Report, distinct: Sequence[Window], shared: Sequence[Window]) -> None:
    for what, windows in (("distinct runs", distinct), ("shared runs", shared)):
        delivered = _mid([one for one in windows if one.contestant == Headwater.name], lambda one: one.delivered)
        report.goal(f"{what}: delivered share", delivered, ">= 0.999", delivered >= 0.999)
    checks = [
        ("distinct runs: p50 / naive's", distinct, Naive.name, lambda one: one.p50_ms, 1 / 100),
        ("distinct runs: p99 / naive's", distinct, Naive.name, lambda one: one.p99_ms, 1 / 20),
        ("distinct runs: CPU per event / naive's", distinct, Naive.name, lambda one: one.cpu_us, 1 / 2.5),
        ("distinct runs: CPU per event / Nchan's", distinct, Nchan.name, lambda one: one.cpu_us, 0.6),
        ("shared runs: CPU per event / naive's", shared, Naive.name, lambda one: one.cpu_us, 1 / 2.5),
        ("shared runs: CPU per event / Nchan's", shared, Nchan.name, lambda one: one.cpu_us, 1.0),
    ]
    for what, windows, other, value, reach in checks:
        if any(window.contestant == other for window in windows):
            ratio = _ratio(windows, other, value)
            report.goal(what, ratio, f"<= {reach:g}", ratio <= reach)
    disturbed = sum(window.disturbed for window in [*distinct, *shared])
    if disturbed:
        report.notes.append(
            f"{disturbed} of {len(distinct) + len(shared)} windows were disturbed (steal above 5 % or other programs "
            "above 25 % of the machine): their tails say more about the neighbours."
        )
    behind = [one for one in (*distinct, *shared) if one.offered < 0.98 * one.asked]
    if behind:
        names = ", ".join(dict.fromkeys(one.contestant for one in behind))
        report.notes.append(
            f"{len(behind)} windows had fewer events than were to be published ({names}): Redis, or the server for "
            "Nchan, took no more."
        )
    fullest = max([*distinct, *shared], key=lambda one: one.load_core)
    report.notes.append(
        f"Redis, the publisher and the load client took {fullest.load_core:.0%} of a core together at most "
        f"({fullest.contestant})" + (", so they may have been the limit." if fullest.load_full else ".")
    )


async def _quiet(report: Report, stage: Stage, ours: Headwater, redis_port: int, plan: Plan) -> None:
    """Latency when there is time for everything, beside a bare subscriber of the same messages in the same window."""
    rows: list[dict[str, Any]] = []
    load = plan.quiet
    for _ in range(plan.rounds):
        channels = await ours.channels(load.runs)
        async with (
            Publisher(ours.spec(channels, load.rate, load.tick), stage.core) as publisher,
            Readers(
                redis_port,
                [f"SUBSCRIBE {' '.join(channels.names)}"],
                1,
                warmup=load.warmup + 0.5,
                seconds=load.seconds,
                core=stage.core,
            ) as raw,
            stage.readers(ours, channels, load) as readers,
        ):
            await readers.said("open")
            publisher.go()
            seen, bare = await asyncio.gather(readers.result(), raw.result())
            sent = await publisher.stop(seen["from_ns"], seen["to_ns"])
        rows.append(
            {
                "delivered": seen["delivered"] / max(1, sent["published"]),
                "p50 ms": seen["p50_us"] / 1000,
                "p99 ms": seen["p99_us"] / 1000,
                "raw p50 ms": bare["p50_us"] / 1000,
                "raw p99 ms": bare["p99_us"] / 1000,
                "p50 / raw": seen["p50_us"] / max(1, bare["p50_us"]),
                "p99 / raw": seen["p99_us"] / max(1, bare["p99_us"]),
            }
        )
        print("  quiet", rows[-1], flush=True)
    report.data += rows
    middle = {name: median([row[name] for row in rows]) for name in rows[0]}
    report.tables[f"Quiet: {load.readers} readers, {load.rate:g} events/s each, beside a bare Redis subscriber"] = [
        middle
    ]
    report.goal("quiet: p50 ms", middle["p50 ms"], "< 1", middle["p50 ms"] < 1)
    report.goal("quiet: p99 ms", middle["p99 ms"], "< 5", middle["p99 ms"] < 5)
    report.goal("quiet: p50 / raw subscriber's", middle["p50 / raw"], "<= 2.5", middle["p50 / raw"] <= 2.5)
    report.goal("quiet: p99 / raw subscriber's", middle["p99 / raw"], "<= 10", middle["p99 / raw"] <= 10)


async def _idle(
    report: Report, stage: Stage, contestants: Sequence[Contestant], plan: Plan, descriptors: int
) -> dict[str, float]:
    """KiB of memory per open stream without events, by contestant."""
    # The server and the client hold a descriptor per stream; some more are their own.
    most = min(plan.idle, descriptors - 500)
    if most < plan.idle:
        report.notes.append(f"Idle: {most:,} streams instead of {plan.idle:,}, as no more files may be open.")
    memory: dict[str, float] = {}
    rows: list[Row] = []
    for contestant in contestants:
        count = min(most, plan.idle_naive) if isinstance(contestant, Naive) else most
        load = Load(count, count, 0, 0.1, warmup=2.0)
        await _warm(stage, contestant)
        before = memory_of(contestant.pids)
        async with stage.readers(contestant, await contestant.channels(count), load) as readers:
            opened = int((await readers.said("open")).split()[1])
            await readers.said("measure")
            # Per stream that is open, should some have been refused.
            memory[contestant.name] = (memory_of(contestant.pids) - before) / 1024 / max(1, opened)
        rows.append({"server": contestant.name, "open streams": opened, "KiB per stream": memory[contestant.name]})
        print("  idle", rows[-1], flush=True)
    report.tables["Idle streams"] = rows
    if Nchan.name in memory:
        ratio = memory[Headwater.name] / memory[Nchan.name]
        report.goal("memory per reader / Nchan's (0.25 would be a feat)", ratio, "<= 1", ratio <= 1)
    return memory


async def _warm(stage: Stage, contestant: Contestant) -> None:
    """The first readers load code and fill caches, which is no memory per stream."""
    load = Load(20, 20, 0, 0.1, warmup=0.3)
    async with stage.readers(contestant, await contestant.channels(20), load) as readers:
        await readers.result()


async def _growth(report: Report, stage: Stage, ours: Headwater, naive: Naive, plan: Plan) -> None:
    """What an event costs as streams grow, and where it bends."""
    for contestant, counts in ((ours, plan.growth), (naive, plan.growth_naive)):
        loads = [replace(plan.distinct, runs=count, readers=count) for count in counts]
        windows = [await _measured(report, stage, contestant, load) for load in loads]
        report.tables[f"As streams grow: {contestant.name}"] = [
            {
                "streams": window.readers,
                "due/s": round(window.offered),
                "delivered": f"{window.delivered:.2%}",
                "CPU µs/event": window.cpu_us,
                "p50 ms": window.p50_ms,
                "p99 ms": window.p99_ms,
                "server's core": f"{window.server_core:.0%}",
                "Redis": f"{window.redis_core:.0%}",
                "publisher": f"{window.publisher_core:.0%}",
                "client": f"{window.client_core:.0%}",
                "steal": f"{window.steal:.1%}",
                "foreign": f"{window.foreign:.1%}",
            }
            for window in windows
        ]
        report.notes.append(_bend(contestant.name, windows, plan.distinct.rate))


def _bend(name: str, windows: Sequence[Window], rate: float) -> str:
    """Where it stops keeping up, and what was full there."""
    for window in windows:
        behind = window.offered < 0.98 * rate * window.readers
        if window.delivered < 0.995 or window.p99_ms > 250 or behind:
            return f"{name} bends at {window.readers:,} streams: {_full(window)}."
    return f"{name} keeps up to {windows[-1].readers:,} streams, the most that was tried."


def _full(window: Window) -> str:
    shares = {
        "the server": window.server_core,
        "Redis": window.redis_core,
        "the publisher": window.publisher_core,
        "the load client": window.client_core,
    }
    most = max(shares, key=lambda name: shares[name])
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    around = f"of a core each: {parts}; of the machine: other programs {window.foreign:.0%}, steal {window.steal:.0%}"
    if shares[most] > 0.85:
        return f"{most} has a core full ({around})"
    return f"no process of its own has a core full, the machine is ({around})"


def _short(windows: Sequence[Window]) -> str:
    """What to say of a server that did not deliver everything."""
    delivered = _mid(windows, lambda one: one.delivered)
    return "" if delivered >= 0.999 else f", {delivered:.0%} delivered"


def _picture(distinct: Sequence[Window], shared: Sequence[Window], idle: dict[str, float]) -> str:
    groups = []
    for title, windows in (("one reader per run", distinct), ("readers share runs", shared)):
        names = list(dict.fromkeys(window.contestant for window in windows))
        of = {name: [window for window in windows if window.contestant == name] for name in names}
        note = f"{windows[0].readers:,} readers, {windows[0].runs:,} runs"
        cpu = {name: _mid(of[name], lambda one: one.cpu_us) for name in names}
        p50 = {name: _mid(of[name], lambda one: one.p50_ms) for name in names}
        groups.append(
            Bars(
                f"CPU per delivered event, {title}",
                note,
                [(name, cpu[name], f"{cpu[name]:.1f} µs{_short(of[name])}") for name in names],
            )
        )
        groups.append(
            Bars(
                f"Publish to reader, {title}",
                f"{note}; median latency",
                [(name, p50[name], f"{p50[name]:,.2f} ms") for name in names],
            )
        )
    bars = [(name, value, f"{value:.1f} KiB") for name, value in idle.items()]
    groups.append(Bars("Memory per open stream", "without events", bars))
    return draw(groups)
