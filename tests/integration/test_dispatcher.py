"""Handing runs over to a real broker, also while it is frozen."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import orjson
import pytest
import redis.asyncio

from headwater.dev.services import Redis
from headwater.queue import Dispatcher, level_of, lists_of, make_celery
from headwater.service import running
from headwater.settings import Settings
from headwater.streams.places import Places
from headwater.streams.probe import redis_facts
from headwater.telemetry import Telemetry
from support.own_redis import own_redis
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


async def test_a_queue_that_redis_refuses_does_not_hold_up_the_others(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    celery = make_celery(Settings(redis_url=redis_url))
    dispatcher = Dispatcher(celery, telemetry=Telemetry())
    chat, job = new_run("chat"), new_run("shorts")
    async with running(dispatcher), redis.asyncio.Redis.from_url(redis_url) as raw:
        await raw.mset(dict.fromkeys(lists_of("chat"), "something else's"))
        dispatcher.enqueue(chat)
        dispatcher.enqueue(job)
        await eventually(lambda: raw.llen(lists_of("jobs")[level_of(job, 0)]))
    assert f"refuses to queue run {chat.id} for chat" in caplog.text
    await asyncio.to_thread(celery.close)


async def test_turns_that_redis_refuses_are_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [new_run("chat") for _ in range(3)]
    with own_redis(tmp_path) as own:
        async with redis.asyncio.Redis.from_url(own.url()) as raw:
            assert not (await redis_facts(own.url())).refused
            keys = ["~stream:*", "~headwater:due", "~headwater:workers", "~_kombu*", "~chat*"]
            rights = ["on", ">pw", "+@all", "&*", *keys]
            await raw.execute_command("ACL", "SETUSER", "narrow", *rights)  # type: ignore[no-untyped-call]
            url = own.url().replace("//", "//narrow:pw@")
            assert "headwater:owner:" in (await redis_facts(url)).refused
            celery, places = make_celery(Settings(redis_url=url)), Places(url)
            async with running(dispatcher := Dispatcher(celery, telemetry=Telemetry(), places=places)):
                for run in runs:
                    dispatcher.enqueue(run)
                    dispatcher.answered(run)
                await eventually(lambda: _length(raw, lists_of("chat")[level_of(runs[0], 0)], len(runs)))
            await asyncio.to_thread(celery.close)
            places.close()
    assert caplog.text.count("Redis refuses to keep turns") == 1


async def _length(raw: redis.asyncio.Redis, key: str, wanted: int) -> bool:
    return await raw.llen(key) == wanted


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
            async with asyncio.timeout(60):
                await dispatcher.stop()
            assert len(dispatcher._waiting) == 1
    finally:
        os.kill(server.pid, signal.SIGCONT)
        await asyncio.to_thread(celery.close)
        server.stop()
