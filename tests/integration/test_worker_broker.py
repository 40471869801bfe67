"""A worker and a broker that goes away, fills up and comes back under it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from functools import partial

import pytest
import redis.asyncio

from support.openai_scenarios import answer
from support.reader import Reader, ask
from support.stack import StackMaker
from support.wait import eventually


@pytest.mark.parametrize("times", [1, 3])
async def test_a_worker_outlives_a_broker_that_is_killed_while_it_answers(make_stack: StackMaker, times: int) -> None:
    stack = await make_stack()
    assert stack.redis_server is not None
    question = f"Hold on, {times} [[words:60]] [[rate:15]]"
    async with stack.client() as http:
        accepted = await ask(http, question)
        reader = Reader(stack.base_url, accepted["task_id"])
        reading = asyncio.create_task(reader.read())
        for least in range(20, 20 * times + 1, 20):
            await eventually(partial(_has, reader, least))
            stack.redis_server.kill()
            stack.redis_server.start()
        await reading
        assert (reader.text, reader.end) == (answer(question, 60), "done")
        # It came back empty: the message cannot be given back nor acknowledged. The next run is taken all the same.
        again = await ask(http, "And now? [[scenario:hello]]")
        assert (await Reader(stack.base_url, again["task_id"]).read()).text == "Hello, world"
    assert stack.worker.running


async def test_a_worker_that_starts_while_redis_is_full_takes_work_when_it_is_not(make_stack: StackMaker) -> None:
    stack = await make_stack(start=False)
    async with redis.asyncio.Redis.from_url(stack.redis_url) as raw:
        await raw.config_set("maxmemory", 1)
        stack.worker.launch()
        await eventually(lambda: "Frequent restarts" in stack.worker.log(), timeout=30)
        await stack.server.start()
        async with stack.client() as http:
            accepted = await ask(http, "Full [[scenario:hello]]")
            await raw.config_set("maxmemory", 0)
            assert (await Reader(stack.base_url, accepted["task_id"]).read()).text == "Hello, world"
    assert stack.worker.running
    assert "Traceback" not in stack.worker.log()


def _has(reader: Reader, characters: int) -> bool:
    return len(reader.text) > characters


FALLS = """
import sys
from celery.worker.consumer import Consumer
from headwater.queue import make_celery, run_command
from headwater.settings import load_settings

class Falls(Consumer):
    def start(self):
        raise RuntimeError("it falls")

app = make_celery(load_settings(_env_file=None, REDIS_URL=sys.argv[1]))
app.conf.worker_consumer = Falls
sys.exit(run_command(app, ["--quiet", "worker", "--pool=solo", "--without-mingle", "--without-gossip"]))
"""


def test_a_worker_that_falls_says_so_by_its_exit_code(redis_url: str) -> None:
    ended = subprocess.run([sys.executable, "-c", FALLS, redis_url], capture_output=True, timeout=60, check=False)
    assert b"it falls" in ended.stderr
    assert ended.returncode == 1
