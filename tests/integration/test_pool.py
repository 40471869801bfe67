"""The asyncio pool in a real Celery worker over real Redis, in an app that uses nothing else of headwater."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis
from celery import Celery

from headwater.dev.services import Redis
from headwater.settings import child_environment
from headwater.worker.pool import AsyncPool
from support.wait import eventually

TESTS = Path(__file__).parent.parent


class Sent:
    """A task that was sent, and what the worker's result backend says of it."""

    def __init__(self, board: Any, task_id: str) -> None:
        self.id = task_id
        self._board = board

    @property
    def meta(self) -> dict[str, Any]:
        stored = self._board.get(f"celery-task-meta-{self.id}")
        return dict(json.loads(stored)) if stored else {"status": "PENDING"}

    @property
    def state(self) -> str:
        return str(self.meta["status"])

    async def result(self, state: str = "SUCCESS") -> Any:
        """What it returned or raised, once it has ended in this state."""
        await eventually(lambda: self.state in {"SUCCESS", "FAILURE", "REVOKED"}, 30)
        assert self.state == state, self.meta
        return self.meta["result"]


class Worker:
    def __init__(self, url: str, log: Path, *options: str, **environment: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "celery", "-A", "support.pool_app", "worker", "--pool", "custom", *options]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--without-mingle", "--without-gossip", "--loglevel", "INFO"],
                env=child_environment(
                    POOL_BROKER=url,
                    PYTHONPATH=str(TESTS),
                    CELERY_CUSTOM_WORKER_POOL="headwater.worker.pool:AsyncPool",
                    **environment,
                ),
                stdout=output,
                stderr=output,
            )
        self.board: Any = redis.Redis.from_url(url)
        self.app = Celery("sender", broker=url)

    def log(self) -> str:
        return self._log.read_text()

    def send(self, name: str, *arguments: Any, **options: Any) -> Sent:
        return Sent(self.board, self.app.send_task(f"support.pool_app.{name}", args=arguments, **options).id)

    async def ask(self, what: str) -> Any:
        """What `celery inspect` tells of it."""
        answers = await asyncio.to_thread(getattr(self.app.control.inspect(timeout=60, limit=1), what))
        (answer,) = answers.values()
        return answer

    async def order(self, call: Callable[..., Any], *arguments: Any) -> Any:
        (answer,) = await asyncio.to_thread(call, *arguments, reply=True, timeout=60, limit=1)
        return next(iter(answer.values()))

    def waiting(self) -> int:
        """Messages that nobody has acknowledged."""
        return int(self.board.hlen("unacked")) + int(self.board.llen("celery"))

    async def begun(self, *sent: Sent) -> None:
        await eventually(lambda: all(self.board.sismember("begun", each.id) for each in sent), 30)

    async def ended(self, sign: signal.Signals | None = None) -> int:
        if sign is not None:
            self.process.send_signal(sign)
        return await asyncio.to_thread(self.process.wait, 60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.board.close()
        self.app.close()


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    server = Redis(folder / "redis", options={"appendonly": "no"})
    server.start()
    try:
        yield server.url()
    finally:
        server.stop()


@pytest_asyncio.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    """One worker for all tests that leave it alive: starting workers is what takes time."""
    folder = tmp_path_factory.mktemp("pool")
    with _redis(folder) as url:
        worker = Worker(url, folder / "worker.log", "-c", "1500", "-E")
        try:
            await eventually(lambda: " ready." in worker.log(), 60)
            yield worker
        finally:
            worker.close()


@pytest.fixture
async def worker(shared: Worker) -> Worker:
    await eventually(lambda: shared.waiting() == 0, 30)
    shared.board.delete("begun", "ended", "cancelled", "signals", "go", "release", "blocking", "release blocking")
    return shared


@pytest.fixture
async def own(redis_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Worker]:
    """A worker to be ended."""
    worker = Worker(redis_url, tmp_path / "worker.log", "-c", "2", **getattr(request, "param", {}))
    try:
        await eventually(lambda: " ready." in worker.log(), 60)
        yield worker
    finally:
        worker.close()


# --- many at once ---------------------------------------------------------------------------------


async def test_a_thousand_tasks_run_at_once_beside_one_that_blocks(worker: Worker) -> None:
    worker.send("blocking")
    sent = [worker.send("wait_for", "go") for _ in range(1000)]
    await worker.begun(sent[-1])
    await eventually(lambda: worker.board.scard("begun") == 1000, 60)
    assert (await eventually(lambda: worker.board.get("blocking"))).decode().startswith("sync-task")
    assert len(await worker.ask("active")) == 1001
    pool = (await worker.ask("stats"))["pool"]
    assert (pool["running"], pool["max-concurrency"]) == (1001, 1500)
    worker.board.set("go", 1)
    worker.board.set("release blocking", 1)
    await eventually(lambda: worker.board.scard("ended") == 1000, 60)
    assert {member.decode() for member in worker.board.smembers("ended")} == {each.id for each in sent}
    await eventually(lambda: worker.waiting() == 0, 30)
    await eventually(lambda: worker.log().count("wait_for[") >= 2000, 30)


async def test_tasks_at_once_keep_their_requests_and_context_variables_apart(worker: Worker) -> None:
    sent = {f"colour {number}": worker.send("paint", f"colour {number}") for number in range(50)}
    for mine, each in sent.items():
        assert await each.result() == ["none", mine, mine]


async def test_places_are_added_and_taken_away_while_it_works(own: Worker) -> None:
    running = [own.send("wait_for", "go") for _ in range(3)]
    await eventually(lambda: own.board.scard("begun") == 2, 30)
    await eventually(lambda: _count(own, "reserved", 1))
    assert "ok" in await own.order(own.app.control.pool_grow, 1)
    await own.begun(*running)
    assert "ok" in await own.order(own.app.control.pool_shrink, 2)
    assert (await own.ask("stats"))["pool"]["max-concurrency"] == 1
    assert "at least one" in str(await own.order(own.app.control.pool_shrink, 1))
    # One at a time, once those that had a place have ended.
    own.board.set("go", 1)
    await eventually(lambda: own.waiting() == 0, 30)
    later = [own.send("wait_for", "later") for _ in range(3)]
    await eventually(lambda: own.board.scard("begun") == 4, 30)
    assert len(await own.ask("active")) == 1
    # What waits for a place can be revoked, also with `terminate`, before it was ever begun.
    first = next(each for each in later if own.board.sismember("begun", each.id))
    others = [each for each in later if each is not first]
    for each, terminate in zip(others, (True, False), strict=True):
        await own.order(own.app.control.revoke, each.id, None, terminate)
    own.board.set("later", 1)
    await eventually(lambda: own.waiting() == 0, 30)
    await eventually(lambda: {each.state for each in others} == {"REVOKED"})
    assert own.board.scard("begun") == 4


async def _count(worker: Worker, what: str, wanted: int) -> bool:
    return len(await worker.ask(what)) == wanted


async def _idle(worker: Worker) -> bool:
    return bool((await worker.ask("stats"))["pool"]["running"] == 0)


# --- what Celery promises of a task ---------------------------------------------------------------


async def test_results_retries_and_failures_are_those_of_any_task(worker: Worker) -> None:
    assert await worker.send("again").result() == 2
    assert await worker.send("by_itself").result() == 1
    failed = worker.send("fail")
    assert (await failed.result("FAILURE"))["exc_message"] == ["deep inside"]
    assert 'raise LookupError("deep inside")' in failed.meta["traceback"]
    assert "nobody cancelled" in str(await worker.send("cancels_itself").result("FAILURE"))
    assert "Never call result.get()" in await worker.send("joins").result()
    assert await worker.send("add", 1, 2, countdown=0.5).result() == 3
    seen = {key.decode(): int(value) for key, value in worker.board.hgetall("signals").items()}
    assert seen["prerun again"] == seen["postrun again"] == 3
    assert (seen["retry again"], seen["success again"]) == (2, 1)
    assert seen["failure fail"] == 1


async def test_groups_and_chords_come_together(worker: Worker) -> None:
    *parts, whole = [Sent(worker.board, each) for each in await worker.send("spread").result()]
    assert [await each.result() for each in parts] == [2 * number for number in range(20)]
    assert await whole.result() == 380


async def test_a_rate_limit_holds(worker: Worker) -> None:
    sent = [worker.send("slowly") for _ in range(3)]
    times = sorted([await each.result() for each in sent])
    # Two a second: never all three at once. They are let go at half seconds and begin when the machine lets them.
    assert times[2] - times[0] > 0.1


async def test_events_tell_a_tasks_life(worker: Worker) -> None:
    heard: list[tuple[str, str]] = []
    done, listening = threading.Event(), threading.Event()

    def listen() -> None:
        with worker.app.connection() as connection:
            receiver = worker.app.events.Receiver(
                connection, handlers={"*": lambda event: heard.append((event["type"], event.get("uuid", "")))}
            )
            for _ in receiver.itercapture(timeout=None, wakeup=False):
                listening.set()
                if done.is_set():
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    await eventually(listening.is_set, 30)
    sent = worker.send("add", 1, 2)
    await sent.result()
    await eventually(
        lambda: [kind for kind, uuid in heard if uuid == sent.id] == ["task-received", "task-started", "task-succeeded"]
    )
    done.set()
    await asyncio.to_thread(thread.join, 30)


# --- limits ---------------------------------------------------------------------------------------


async def test_time_limits_reach_the_coroutine(worker: Worker) -> None:
    assert await worker.send("soft").result() == "had time to tidy up"
    sent = worker.send("hard")
    assert (await sent.result("FAILURE"))["exc_type"] == "TimeLimitExceeded"
    await eventually(lambda: worker.board.get("hard") == b"1")


async def test_a_revoked_task_is_cancelled_and_stays_revoked_whatever_it_makes_of_that(worker: Worker) -> None:
    endless, stubborn = worker.send("wait_for", "never"), worker.send("stubborn", "release")
    await worker.begun(endless, stubborn)
    for each in (endless, stubborn):
        await worker.order(worker.app.control.revoke, each.id, None, True)
    await eventually(lambda: worker.board.sismember("cancelled", stubborn.id))
    await eventually(lambda: stubborn.state == "REVOKED")
    worker.board.set("release", 1)
    await eventually(lambda: worker.waiting() == 0, 30)
    # Its place is free again once it has really ended.
    await eventually(lambda: worker.board.hget("signals", "postrun stubborn") == b"1")
    await eventually(lambda: _idle(worker))
    assert stubborn.state == "REVOKED"
    assert worker.board.scard("ended") == 0
    assert worker.board.hget("signals", "revoked stubborn") == b"1"
    assert worker.board.hget("signals", "success stubborn") is None


async def test_a_coroutine_that_holds_up_the_loop_is_named(worker: Worker) -> None:
    sent = worker.send("hog", 3)
    await sent.result()
    log = await eventually(lambda: worker.log() if "The event loop goes on" in worker.log() else None)
    assert log is not None
    assert f"The event loop stands still: support.pool_app.hog[{sent.id}]" in log
    assert "time.sleep(seconds)" in log


@pytest.mark.parametrize("option", ["maxtasksperchild", "max_memory_per_child"])
def test_what_it_cannot_do_is_refused(option: str) -> None:
    with pytest.raises(Exception, match="no child processes"):
        AsyncPool(10, **{option: 5})


# --- trouble and ends -----------------------------------------------------------------------------


async def test_a_lost_connection_to_the_broker_costs_no_task(worker: Worker) -> None:
    sent = worker.send("wait_for", "go")
    await worker.begun(sent)
    worker.board.client_kill_filter(_type="normal", skipme=True)
    await eventually(lambda: "Connection to broker lost" in worker.log(), 30)
    worker.board.set("go", 1)
    await eventually(lambda: worker.board.sismember("ended", sent.id), 30)
    assert await worker.send("add", 20, 22).result() == 42


async def test_a_worker_whose_loop_died_ends_and_says_so(own: Worker) -> None:
    waits = own.send("wait_for", "never")
    await own.begun(waits)
    own.send("quits")
    assert await own.ended() == 1
    assert "The pool's event loop died" in own.log()
    assert not own.board.sismember("ended", waits.id)


async def test_a_warm_shutdown_ends_what_was_begun_and_gives_back_the_rest(own: Worker) -> None:
    sent = [own.send("wait_for", "go") for _ in range(5)]
    await eventually(lambda: own.board.scard("begun") == 2, 30)
    own.process.send_signal(signal.SIGTERM)
    await eventually(lambda: "Warm shutdown" in own.log(), 30)
    own.board.set("go", 1)
    assert await own.ended() == 0
    begun = {member.decode() for member in own.board.smembers("begun")}
    assert {member.decode() for member in own.board.smembers("ended")} == begun < {each.id for each in sent}
    assert len(begun) == 2
    assert own.waiting() == 3
    # What the tasks shared was closed after them.
    assert own.board.get("shared closed") == b"1"


@pytest.mark.parametrize("own", [{}, {"POOL_SOFT": "2"}], indirect=True, ids=["cold", "soft"])
async def test_a_cold_shutdown_ends_whatever_the_tasks_do(own: Worker, request: pytest.FixtureRequest) -> None:
    sent, stubborn = own.send("wait_for", "go"), own.send("stubborn", "never")
    await own.begun(sent, stubborn)
    own.process.send_signal(signal.SIGQUIT)
    soft = request.node.callspec.id == "soft"
    if soft:
        await eventually(lambda: "Initiating Soft Shutdown" in own.log(), 30)
        own.board.set("go", 1)
    await own.ended()
    assert own.board.sismember("ended", sent.id) == soft
    assert own.board.sismember("cancelled", stubborn.id)
    assert own.waiting() >= 1
    assert f"go on and are left behind: {stubborn.id}" in own.log()
