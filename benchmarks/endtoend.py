"""The whole stack: from a message to its first token, and from a token to the browser, part by part."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import aiohttp
import redis.asyncio

from benchmarks.chart import Bars, draw
from benchmarks.load import Provider, Seen, Tap, provider, tap
from benchmarks.machine import Watch, family, raise_descriptors
from benchmarks.parts import Parts, Program
from benchmarks.report import Report, Row, quantile
from headwater.dev.services import Redis

#: Tokens a second of one answer, and how many of them carry one stamp.
RATE: Final = 30
EVERY: Final = 5
LEVELS: Final = (1, 100, 500)
#: Seconds of one answer: of one chat, so that there are enough of them, and of many.
SHORT: Final = 1.0
LONG: Final = 8.0
#: Seconds measured, after as many as the answers need to be out of step.
WINDOW: Final = 10.0
#: A token that reaches its reader later than so many seconds counts as not delivered.
LATE: Final = 1.0

PSUBSCRIBE: Final = b"*2\r\n$10\r\nPSUBSCRIBE\r\n$8\r\nstream:*\r\n"
FIRST: Final = "First token"
TOKEN: Final = "Token → browser"
PARTS: Final = ("accept", "queue", "provider", "worker → log", "log → socket")


@dataclass(slots=True)
class Turn:
    """One message and its answer. Times in ns of CLOCK_MONOTONIC."""

    posted: int
    accepted: int = 0
    run_id: str = ""
    claimed: int = 0


@dataclass(slots=True)
class Stack:
    """What is running, and what was asked of it."""

    redis: Redis
    source: Provider
    server: Program
    watched: dict[str, list[int]]
    session: aiohttp.ClientSession
    turns: list[Turn] = field(default_factory=list)


async def run(quick: bool = False) -> Report:
    report = Report(
        "endtoend",
        "Chats on the whole stack: one server process, one worker process, Redis, PostgreSQL, and a scripted API that "
        f"says {RATE} tokens/s at once. First token: accept is POST → 202, queue 202 → claimed by the worker, provider "
        "claimed → the API's first token, then into the log, then to the reader's socket. Token → browser: "
        "from the moment a token is due until it is in the reader's socket.",
    )
    raise_descriptors()
    with Parts() as parts:
        servers, database = parts.redis(), parts.postgres()
        async with provider(RATE, every=EVERY) as source, aiohttp.ClientSession(connector=_many()) as session:
            settings = {"REDIS_URL": servers.url(), "DATABASE_URL": database.url(), "OPENAI_BASE_URL": source.url}
            settings |= {"OPENAI_MODEL": "scripted", "HEADWATER_WORKER_CONCURRENCY": str(max(LEVELS) + 10)}
            worker = _start(parts, "worker", settings)
            server = _start(parts, "server", settings | {"HEADWATER_MAX_STREAMS": "10000"})
            watched = {"server": server.pids, "worker": worker.pids, "Redis": [servers.pid], "API": [source.pid]}
            stack = Stack(servers, source, server, watched, session)
            await _level(stack, 2, SHORT, 1.0, None)
            # The workers of PostgreSQL come with the first connections.
            watched["PostgreSQL"] = family(database.pid)
            for chats in (1, 20) if quick else LEVELS:
                length = SHORT if chats == 1 or quick else LONG
                await _level(stack, chats, length, 3.0 if quick else WINDOW, report)
    report.pictures["endtoend.svg"] = draw([_bars(title, report.tables.get(title, [])) for title in (FIRST, TOKEN)])
    return report


def _start(parts: Parts, what: str, settings: dict[str, str]) -> Program:
    return parts.headwater(what, **settings)  # type: ignore[arg-type]


def _many() -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(limit=0)


async def _level(stack: Stack, chats: int, length: float, window: float, report: Report | None) -> None:
    """So many chats at once, each asking again when its answer is over."""
    stack.turns.clear()
    ids = await asyncio.gather(*(_create(stack) for _ in range(chats)))
    async with tap() as readers:
        readers.read(0, stack.redis.port, PSUBSCRIBE)
        asking = [
            asyncio.create_task(_chat(stack, chat, length, number / chats * length, readers))
            for number, chat in enumerate(ids)
        ]
        try:
            await asyncio.sleep(length)
            before = await stack.source.stats()
            begun, watch = time.monotonic_ns(), Watch(**stack.watched)
            await asyncio.sleep(window)
            ended, usage = time.monotonic_ns(), watch.usage()
            offered = (await stack.source.stats())["stamps"] - before["stamps"]
        finally:
            for task in asking:
                task.cancel()
            ends = await asyncio.gather(*asking, return_exceptions=True)
        if failures := [end for end in ends if isinstance(end, Exception)]:
            raise failures[0]
        await asyncio.sleep(LATE)
        await stack.source.finish()
        await asyncio.sleep(0.5)
    await _claims(stack)
    if report is not None:
        _first_tokens(report, stack, chats, readers.seen, range(begun, ended))
        _tokens(report, chats, readers.seen, range(begun, ended))
        in_time = sum(seen.reader > 0 and begun <= seen.stamp < ended and seen.lag <= LATE for seen in readers.seen)
        # The stamps at the window's two edges make the share exact to a few.
        load = {"tokens/s": EVERY * offered / window, "delivered %": 100 * min(1.0, in_time / max(1, offered))}
        cpu = {f"{name} %": 100 * seconds / window for name, seconds in usage.cpu.items()}
        machine = {"steal %": 100 * usage.steal, "foreign %": 100 * usage.foreign}
        report.tables.setdefault("Load, and CPU in % of one core", []).append(
            {"chats": chats, **load, **cpu, **machine}
        )


async def _create(stack: Stack) -> str:
    async with stack.session.post(f"{stack.server.base}/api/chats", json={}) as response:
        response.raise_for_status()
        return str((await response.json())["id"])


async def _chat(stack: Stack, chat: str, length: float, offset: float, readers: Tap) -> None:
    """Ask, follow the answer, ask again."""
    url = f"{stack.server.base}/api/chats/{chat}/messages"
    body = {"content": f"Tell me. [[tokens:{round(length * RATE)}]]"}
    await asyncio.sleep(offset)
    while True:
        turn = Turn(time.monotonic_ns())
        async with stack.session.post(url, json=body) as response:
            answer: Any = await response.json()
            if response.status == 409:
                # The answer before is not over yet.
                await asyncio.sleep(0.2)
                continue
            response.raise_for_status()
        turn.accepted, turn.run_id = time.monotonic_ns(), answer["task_id"]
        stack.turns.append(turn)
        request = f"GET /api/stream/{turn.run_id} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
        readers.read(len(stack.turns), stack.server.port, request.encode())
        await asyncio.sleep(length + 0.3)


async def _claims(stack: Stack) -> None:
    """When each run was claimed, by Redis's clock, which is this machine's."""
    apart = time.time_ns() - time.monotonic_ns()
    async with redis.asyncio.Redis.from_url(stack.redis.url()) as client:
        for turn in stack.turns:
            started: Any = await client.hget(f"stream:{{{turn.run_id}}}:metadata", "started_at")
            turn.claimed = int(started or 0) * 1_000_000 - apart if started else 0


def _first_tokens(report: Report, stack: Stack, chats: int, all_seen: Sequence[Seen], window: range) -> None:
    first: dict[int, Seen] = {}
    for seen in all_seen:
        first.setdefault(seen.reader, seen)
    logged = _logged(all_seen)
    spent: list[Sequence[float]] = []
    for number, turn in enumerate(stack.turns, 1):
        if turn.posted in window and number in first and turn.claimed:
            token = first[number]
            published = logged.get(token.stamp, token.arrival)
            steps = [turn.posted, turn.accepted, turn.claimed, token.stamp, published, token.arrival]
            # The worker may be quicker than the 202, and the reader's socket be looked at ahead of Redis's.
            parts = [max(0.0, (until - since) / 1e6) for since, until in pairwise(steps)]
            spent.append([(token.arrival - turn.posted) / 1e6, *parts])
    _rows(report, FIRST, chats, ("POST → first token", *PARTS), spent)


def _tokens(report: Report, chats: int, all_seen: Sequence[Seen], window: range) -> None:
    logged = _logged(all_seen)
    spent: list[Sequence[float]] = []
    for seen in all_seen:
        if seen.reader and seen.stamp in window:
            published = min(logged.get(seen.stamp, seen.arrival), seen.arrival)
            parts = [(published - seen.stamp) / 1e6, (seen.arrival - published) / 1e6]
            spent.append([seen.lag * 1000, *parts])
    _rows(report, TOKEN, chats, ("token → browser", *PARTS[3:]), spent)
    if chats == 100 and spent:
        p50 = quantile([each[2] for each in spent], 0.5)
        report.goal("published → reader's socket with 100 chats, p50 ms", p50, "< 5", p50 < 5)


def _bars(title: str, rows: Sequence[Row]) -> Bars:
    bars = [(f"{row['chats']}: {row['part']}", row["p50 ms"], f"{row['p50 ms']:,.1f} ms") for row in rows]
    return Bars(title, "median of each part, by the number of chats", bars)


def _logged(all_seen: Iterable[Seen]) -> dict[int, int]:
    """When each stamp was published."""
    logged: dict[int, int] = {}
    for seen in all_seen:
        if seen.reader == 0:
            logged.setdefault(seen.stamp, seen.arrival)
    return logged


def _rows(report: Report, title: str, chats: int, names: Sequence[str], spent: Sequence[Sequence[float]]) -> None:
    """One row for the whole, the first of each, and one for each part of it."""
    whole = sum(sum(each[1:]) for each in spent)
    for column, name in enumerate(names):
        values = [each[column] for each in spent]
        row: dict[str, Any] = {"chats": chats, "part": name, "count": len(values)}
        row |= {"p50 ms": quantile(values, 0.5), "p99 ms": quantile(values, 0.99)}
        row["share %"] = 100 * sum(values) / max(1e-9, whole) if column else 100.0
        report.tables.setdefault(title, []).append(row)
