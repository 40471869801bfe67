"""The worker's event loop in a thread: what a task hears when it dies, and that another one begins."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.exceptions import Reject

from headwater.dev.services import free_port
from headwater.queue import RUN_TASK, make_celery
from headwater.settings import Settings
from headwater.worker import tasks
from headwater.worker.graph import Graph
from headwater.worker.runtime import Runtime, RuntimeGone, Runtimes
from support.runs import new_run
from support.wait import eventually


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Servers that are not there: a runtime must start all the same."""
    return Settings(
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
        database_url=f"postgresql://nobody@127.0.0.1:{free_port()}/none",
        data_dir=tmp_path,
    )


@pytest.fixture
def celery(settings: Settings) -> Celery:
    return make_celery(settings)


@pytest.fixture
def runtimes(settings: Settings, celery: Celery) -> Iterator[Runtimes]:
    made = Runtimes(settings, celery)
    yield made
    made.stop()


def die(runtime: Runtime) -> None:
    """End its loop from inside, as a fault in it would."""

    def fail() -> None:
        asyncio.get_running_loop().stop()

    runtime._call(fail)


async def in_thread(work: Callable[[], object]) -> BaseException | None:
    """What `work` raises."""
    try:
        await asyncio.to_thread(work)
    except (Reject, RuntimeGone) as error:
        return error
    return None


async def opened(runtime: Runtime) -> Graph:
    """Its parts, once they are open."""
    graph = await eventually(lambda: runtime.graph)
    assert graph is not None
    return graph


def execute(runtime: Runtime) -> str | None:
    """As a task of a synchronous pool does."""
    return runtime.wait(runtime.execute(new_run()))


async def test_one_process_has_one_runtime(runtimes: Runtimes) -> None:
    first = await asyncio.to_thread(runtimes.here)
    assert await asyncio.to_thread(runtimes.here) is first
    assert [thread.name for thread in threading.enumerate()].count("headwater") == 1


async def test_a_task_under_which_the_loop_dies_goes_back_to_the_queue(
    runtimes: Runtimes, celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.worker.runtime.WATCH", 0.01)
    tasks.register(celery, runtimes)
    runtime = await asyncio.to_thread(runtimes.here)
    graph = await opened(runtime)
    # Redis is away, so the claim waits.
    waiting = asyncio.create_task(in_thread(lambda: celery.tasks[RUN_TASK](new_run().to_json())))
    await eventually(lambda: graph.runner._active)
    die(runtime)
    rejected = await waiting
    assert isinstance(rejected, Reject)
    assert rejected.requeue
    assert isinstance(rejected.__cause__, RuntimeGone)


async def test_a_loop_that_died_is_replaced(runtimes: Runtimes) -> None:
    first = await asyncio.to_thread(runtimes.here)
    await opened(first)
    die(first)
    await eventually(lambda: not first.alive)
    assert isinstance(await in_thread(lambda: execute(first)), RuntimeGone)
    second = await asyncio.to_thread(runtimes.here)
    assert second is not first
    assert second.alive


async def test_a_worker_without_a_usable_journal_gives_its_tasks_back(
    runtimes: Runtimes,
    celery: Celery,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("headwater.worker.runtime.START_PATIENCE", 0.05)
    settings.journal_file.write_bytes(b"not a database" * 1000)
    tasks.register(celery, runtimes)
    result = await asyncio.to_thread(celery.tasks[RUN_TASK].apply, [new_run().to_json()])
    assert (result.state, result.result.requeue) == ("REJECTED", True)
    await eventually(lambda: "cannot start" in caplog.text)
    assert "reject requeue=True: The parts of this worker do not start" in caplog.text
    assert "Traceback" not in caplog.text


async def test_it_drains_and_stops_while_redis_is_away(runtimes: Runtimes) -> None:
    runtime = await asyncio.to_thread(runtimes.here)
    waiting = asyncio.create_task(asyncio.to_thread(execute, runtime))
    graph = await opened(runtime)
    await eventually(lambda: graph.runner._active)
    runtime.drain()
    assert await waiting is None
    await asyncio.to_thread(runtimes.stop)
    assert not runtime.alive


async def test_on_a_running_loop_it_lives_there_and_closes_its_parts_when_it_is_stopped(runtimes: Runtimes) -> None:
    runtime = runtimes.here()
    graph = await opened(runtime)
    assert "headwater" not in {thread.name for thread in threading.enumerate()}
    # Redis is away, so the claim waits.
    waiting = asyncio.create_task(runtime.execute(new_run()))
    await eventually(lambda: graph.runner._active)
    runtimes.stop()
    assert await waiting is None
    await eventually(lambda: not runtime.alive)
    assert not graph.syncer.started.is_set()


async def test_who_waits_for_parts_that_cannot_start_goes_back_to_the_queue_when_the_worker_ends(
    runtimes: Runtimes, settings: Settings
) -> None:
    settings.journal_file.write_bytes(b"not a database" * 1000)
    runtime = runtimes.here()
    waiting = asyncio.create_task(runtime.execute(new_run()))
    await asyncio.sleep(0)
    runtimes.drain()
    with pytest.raises(RuntimeGone):
        await waiting
    await eventually(lambda: not runtime.alive)


async def test_a_worker_of_one_process_serves_its_metrics_and_gives_the_port_back(
    settings: Settings, celery: Celery
) -> None:
    port = free_port()
    runtimes = Runtimes(settings.model_copy(update={"worker_metrics_port": port}), celery)
    runtime = await asyncio.to_thread(runtimes.here)
    try:
        await opened(runtime)
        assert b"# TYPE headwater_runs_ended_total counter" in await asyncio.to_thread(scrape, port)
    finally:
        await asyncio.to_thread(runtimes.stop)
    with pytest.raises(OSError):
        await asyncio.to_thread(scrape, port)


async def test_a_metrics_port_that_is_taken_keeps_no_worker_from_working(
    settings: Settings, celery: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        runtimes = Runtimes(settings.model_copy(update={"worker_metrics_port": port}), celery)
        runtime = await asyncio.to_thread(runtimes.here)
        try:
            await opened(runtime)
        finally:
            await asyncio.to_thread(runtimes.stop)
    assert f"HEADWATER_WORKER_METRICS_PORT={port} cannot be bound" in caplog.text


async def test_a_child_of_a_pool_leaves_the_metrics_port_alone(
    settings: Settings, celery: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    runtimes = Runtimes(settings.model_copy(update={"worker_metrics_port": port}), celery)
    # As after a fork: made by another process.
    monkeypatch.setattr(runtimes, "_maker", os.getppid())
    runtime = await asyncio.to_thread(runtimes.here)
    try:
        await opened(runtime)
        with pytest.raises(OSError):
            await asyncio.to_thread(scrape, port)
    finally:
        await asyncio.to_thread(runtimes.stop)


def scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return bytes(answer.read())
