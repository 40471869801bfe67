"""The asyncio pool in a real Celery worker over real Redis, in an app that uses nothing else of headwater."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis

from headwater.settings import child_environment
from headwater.worker.pool import AsyncPool
from support.wait import eventually

TESTS = Path(__file__).parent.parent


class Worker:
    def __init__(self, url: str, log: Path) -> None:
        self.log = log
        environment = child_environment(
            POOL_BROKER=url, PYTHONPATH=str(TESTS), CELERY_CUSTOM_WORKER_POOL="headwater.worker.pool:AsyncPool"
        )
        command = [sys.executable, "-m", "celery", "-A", "support.pool_app", "worker", "--pool", "custom", "-c", "300"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--without-mingle", "--without-gossip", "--loglevel", "INFO"],
                env=environment,
                stdout=output,
                stderr=output,
            )
        self.board: Any = redis.Redis.from_url(url)
        from celery import Celery

        self.app = Celery("sender", broker=url)

    def send(self, name: str, *arguments: Any) -> str:
        return str(self.app.send_task(f"support.pool_app.{name}", args=arguments, ignore_result=True).id)

    def waiting(self) -> int:
        return int(self.board.hlen("unacked")) + int(self.board.llen("celery"))


@pytest.fixture
async def worker(redis_url: str, tmp_path: Path) -> AsyncIterator[Worker]:
    worker = Worker(redis_url, tmp_path / "worker.log")
    try:
        await eventually(lambda: " ready." in worker.log.read_text(), 60)
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()
        worker.board.close()
        worker.app.close()


async def test_hundreds_of_tasks_run_at_once_beside_one_that_blocks(worker: Worker) -> None:
    worker.send("blocking")
    ids = {worker.send("wait_for", "go") for _ in range(200)}
    await eventually(lambda: worker.board.scard("begun") == 200, 60)
    assert worker.board.get("blocking").decode().startswith("sync-task")
    inspect = worker.app.control.inspect(timeout=5)
    active = await asyncio.to_thread(inspect.active)
    assert sum(len(tasks) for tasks in active.values()) == 201
    stats = await asyncio.to_thread(inspect.stats)
    assert next(iter(stats.values()))["pool"]["running"] == 201
    worker.board.set("go", 1)
    worker.board.set("release blocking", 1)
    await eventually(lambda: worker.board.scard("ended") == 200, 60)
    assert {member.decode() for member in worker.board.smembers("ended")} == ids
    await eventually(lambda: worker.waiting() == 0, 30)


async def test_time_limits_retries_and_revoke_reach_the_coroutine(worker: Worker) -> None:
    for name in ("soft", "hard", "again"):
        worker.send(name)
    await eventually(lambda: [worker.board.get(key) for key in ("soft", "hard", "again")] == [b"1", b"1", b"3"], 60)
    endless = worker.send("wait_for", "never")
    await eventually(lambda: worker.board.sismember("begun", endless), 30)
    await asyncio.to_thread(worker.app.control.revoke, endless, terminate=True)
    await eventually(lambda: worker.waiting() == 0, 30)
    assert worker.board.scard("ended") == 0


async def test_a_warm_shutdown_waits_for_what_was_begun(worker: Worker) -> None:
    mine = worker.send("wait_for", "go")
    await eventually(lambda: worker.board.sismember("begun", mine), 30)
    worker.process.send_signal(signal.SIGTERM)
    await eventually(lambda: "Warm shutdown" in worker.log.read_text(), 30)
    worker.board.set("go", 1)
    assert await asyncio.to_thread(worker.process.wait, 30) == 0
    assert worker.board.sismember("ended", mine)
    assert worker.waiting() == 0


@pytest.mark.parametrize("option", ["maxtasksperchild", "max_memory_per_child"])
def test_what_it_cannot_do_is_refused(option: str) -> None:
    with pytest.raises(Exception, match="no child processes"):
        AsyncPool(10, **{option: 5})
