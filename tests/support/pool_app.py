"""A Celery app that knows nothing of headwater but its pool: what a project that only wants the pool would write."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

import redis
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

URL = os.environ["POOL_BROKER"]  # noqa: TID251  # an application of its own, with an environment of its own
app = Celery("pool_app", broker=URL, task_cls="headwater.worker.pool:AsyncTask")
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)
board: Any = redis.Redis.from_url(URL)


@app.task(bind=True)  # type: ignore[untyped-decorator]
async def wait_for(self: Any, key: str) -> None:
    """Counts itself in, waits until somebody sets `key`, and counts itself out under its own task's id."""
    mine = self.request.id
    board.sadd("begun", mine)
    while not board.exists(key):  # noqa: ASYNC110  # another process sets it
        await asyncio.sleep(0.05)
    # Another task ran on this thread meanwhile: the request is still this one's.
    board.sadd("ended", self.request.id if self.request.id == mine else "somebody else's")


@app.task(bind=True, soft_time_limit=0.3)  # type: ignore[untyped-decorator]
async def soft(self: Any) -> None:
    try:
        await asyncio.sleep(60)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0)
        board.incr("soft")


@app.task(time_limit=0.3)  # type: ignore[untyped-decorator]
async def hard() -> None:
    try:
        await asyncio.sleep(60)
    finally:
        board.incr("hard")


@app.task(bind=True, max_retries=2)  # type: ignore[untyped-decorator]
async def again(self: Any) -> None:
    board.incr("again")
    raise self.retry(countdown=0)


@app.task  # type: ignore[untyped-decorator]
def blocking() -> None:
    """An ordinary task: it must not hold up the loop."""
    board.set("blocking", threading.current_thread().name)
    while not board.exists("release blocking"):
        time.sleep(0.02)
