"""A Celery app that knows nothing of headwater but its pool: what a project that only wants the pool would write."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextvars import ContextVar
from typing import Any

import redis
from celery import Celery, chord, group, signals
from celery.exceptions import SoftTimeLimitExceeded

URL = os.environ["POOL_BROKER"]  # noqa: TID251  # an application of its own, with an environment of its own
app = Celery("pool_app", broker=URL, backend=URL, task_cls="headwater.worker.pool:AsyncTask")
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=4,
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
    worker_soft_shutdown_timeout=float(os.environ.get("POOL_SOFT", "0")),  # noqa: TID251
)
board: Any = redis.Redis.from_url(URL)
colour: ContextVar[str] = ContextVar("colour", default="none")
gates: dict[str, asyncio.Task[None]] = {}


async def _opened(key: str) -> None:
    while not board.exists(key):  # noqa: ASYNC110  # another process sets it
        await asyncio.sleep(0.05)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def begin(**_: Any) -> None:
    """Something that the tasks share, open as long as the worker lives."""
    gates["shared"] = asyncio.get_running_loop().create_task(_shared())


async def _shared() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        board.set("shared closed", 1)


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
async def quits() -> None:
    """What it begins beside itself takes the loop along."""

    async def leave() -> None:
        raise SystemExit(3)

    await asyncio.create_task(leave())


@app.task(bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
async def wait_for(self: Any, key: str) -> None:
    """Counts itself in, waits until somebody sets `key`, and counts itself out under its own task's id."""
    mine = self.request.id
    board.sadd("begun", mine)
    if key not in gates:
        gates[key] = asyncio.get_running_loop().create_task(_opened(key))
    await asyncio.shield(gates[key])
    # Another task ran on this thread meanwhile: the request is still this one's.
    board.sadd("ended", self.request.id if self.request.id == mine else "somebody else's")


@app.task(bind=True)  # type: ignore[untyped-decorator]
async def paint(self: Any, mine: str) -> list[str]:
    """What it finds of others' context variables, and of its own after others ran."""
    found = colour.get()
    colour.set(mine)
    for _ in range(5):
        await asyncio.sleep(0.01)
    return [found, colour.get(), self.request.args[0]]


@app.task(bind=True, soft_time_limit=0.3)  # type: ignore[untyped-decorator]
async def soft(self: Any) -> str:
    try:
        await asyncio.sleep(60)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0)
        return "had time to tidy up"
    return "was never told"


@app.task(time_limit=0.3)  # type: ignore[untyped-decorator]
async def hard() -> None:
    try:
        await asyncio.sleep(60)
    finally:
        board.incr("hard")


@app.task(bind=True, max_retries=2)  # type: ignore[untyped-decorator]
async def again(self: Any) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@app.task(bind=True, autoretry_for=(ConnectionError,), retry_backoff=False, default_retry_delay=0, max_retries=3)  # type: ignore[untyped-decorator]
async def by_itself(self: Any) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 1:
        raise ConnectionError("once")
    return int(self.request.retries)


@app.task  # type: ignore[untyped-decorator]
async def fail() -> None:
    await asyncio.sleep(0)
    raise LookupError("deep inside")


@app.task  # type: ignore[untyped-decorator]
async def cancels_itself() -> None:
    raise asyncio.CancelledError


@app.task(bind=True)  # type: ignore[untyped-decorator]
async def stubborn(self: Any, key: str) -> str:
    """Swallows its cancel and goes on, if it gets there."""
    board.sadd("begun", self.request.id)
    try:
        await _opened("never")
    except asyncio.CancelledError:
        board.sadd("cancelled", self.request.id)
        await _opened(key)
    return "as if nothing had happened"


@app.task  # type: ignore[untyped-decorator]
async def add(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


@app.task  # type: ignore[untyped-decorator]
async def total(parts: list[int]) -> int:
    await asyncio.sleep(0)
    return sum(parts)


@app.task  # type: ignore[untyped-decorator]
def spread() -> list[str]:
    """Begins a group and a chord. Returns the ids of the group's tasks and of the chord's last."""
    parts = [add.s(number, number) for number in range(20)]
    return [*(each.id for each in group(parts)().results), chord(parts)(total.s()).id]


@app.task(rate_limit="2/s")  # type: ignore[untyped-decorator]
async def slowly() -> float:
    return time.monotonic()


@app.task  # type: ignore[untyped-decorator]
async def hog(seconds: float) -> None:
    """Keeps the loop from going round."""
    time.sleep(seconds)  # noqa: ASYNC251


@app.task  # type: ignore[untyped-decorator]
def blocking() -> None:
    """An ordinary task: it must not hold up the loop."""
    board.set("blocking", threading.current_thread().name)
    while not board.exists("release blocking"):
        time.sleep(0.02)


@app.task  # type: ignore[untyped-decorator]
async def joins() -> str:
    """Asks for another task's result, which would hold up the loop."""
    try:
        add.delay(1, 1).get(timeout=5)
    except RuntimeError as error:
        return str(error)
    return "was let"


def _note(name: str, sender: Any) -> None:
    board.hincrby("signals", f"{name} {sender.name.rpartition('.')[2]}", 1)


for _signal in ("prerun", "postrun", "success", "failure", "retry", "revoked"):

    def _heard(sender: Any, name: str = _signal, **_: Any) -> None:
        _note(name, sender)

    getattr(signals, f"task_{_signal}").connect(_heard, weak=False)
