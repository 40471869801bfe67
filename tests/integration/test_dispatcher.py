"""Handing runs over to a real broker, also while it is frozen."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import orjson
import redis.asyncio

from headwater.dev.services import Redis
from headwater.queue import Dispatcher, level_of, lists_of, make_celery
from headwater.service import running
from headwater.settings import Settings
from headwater.telemetry import Telemetry
from support.runs import new_run
from support.wait import eventually


async def test_runs_reach_their_queues_as_json(redis_url: str) -> None:
    celery = make_celery(Settings(redis_url=redis_url))
    dispatcher = Dispatcher(celery, telemetry=Telemetry())
    chat, job = new_run("chat"), new_run("shorts")
    async with running(dispatcher), redis.asyncio.Redis.from_url(redis_url) as raw:
        dispatcher.enqueue(chat)
        dispatcher.enqueue(job)
        for queue, run in (("chat", chat), ("jobs", job)):
            name = lists_of(queue)[level_of(run, 0)]
            await eventually(partial(raw.llen, name))
            message = orjson.loads(await raw.lindex(name, 0) or b"")
            assert message["headers"]["id"] == run.id
            assert message["content-type"] == "application/json"
    await asyncio.to_thread(celery.close)


async def test_a_frozen_redis_blocks_neither_the_caller_nor_the_stop(tmp_path: Path) -> None:
    server = Redis(tmp_path / "redis", options={"appendonly": "no"})
    server.start()
    celery = make_celery(Settings(redis_url=server.url()))
    dispatcher = Dispatcher(celery, telemetry=Telemetry())
    runs = [new_run("chat") for _ in range(3)]
    try:
        async with redis.asyncio.Redis.from_url(server.url()) as raw, running(dispatcher):
            dispatcher.enqueue(runs[0])
            await eventually(lambda: raw.llen(lists_of("chat")[level_of(runs[0], 0)]))
            os.kill(server.pid, signal.SIGSTOP)
            dispatcher.enqueue(runs[1])
            dispatcher.enqueue(runs[2])
            # While a send hangs.
            async with asyncio.timeout(10):
                await dispatcher.stop()
            assert len(dispatcher._waiting) == 1
    finally:
        os.kill(server.pid, signal.SIGCONT)
        await asyncio.to_thread(celery.close)
        server.stop()
