"""Runs executed by real Celery workers over real Redis and PostgreSQL, with a scripted model's API."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import redis.asyncio
from celery import Celery

from headwater import streams
from headwater.clock import SystemClock
from headwater.dev.services import free_port
from headwater.events import Event, EventType
from headwater.ids import new_id
from headwater.messages import Chat, Message, MessageStatus, Role
from headwater.queue import RUN_TASK, make_celery, queue_of
from headwater.records import Record
from headwater.runs import Run, RunState
from headwater.settings import Settings
from headwater.store import Store
from headwater.streams.base import StreamLog
from headwater.transcript import Transcript
from support.openai_scenarios import answer, chunk
from support.openai_server import OpenAIServer
from support.stack import Process, Stack, StackMaker
from support.wait import eventually

#: A short lease, so that a dead worker is noticed soon, and long enough for one that lives on a busy machine.
QUICK = {"HEADWATER_LEASE_SECONDS": "4", "HEADWATER_QUEUE_GRACE": "2", "HEADWATER_WORKER_CONCURRENCY": "4"}


@dataclass
class Client:
    """What a server does for a message: rows, log, queue. And what a reader sees."""

    log: StreamLog
    store: Store
    celery: Celery

    async def accept(self, question: str) -> Run:
        """A question with its rows and its announcement, not yet enqueued."""
        now = 1_767_225_600_000
        chat = Chat(new_id(), "local", now, now, title="Test")
        asked = Message(new_id(), chat.id, "local", Role.USER, question, now)
        run = Run(
            id=new_id(),
            kind="chat",
            owner_id="local",
            input={"messages": [{"role": "user", "content": question}], "parent_id": asked.id},
            created_at=now,
            chat_id=chat.id,
            message_id=new_id(),
        )
        answering = Message(
            str(run.message_id), chat.id, "local", Role.ASSISTANT, "", now, MessageStatus.PROCESSING, asked.id,
            run_id=run.id,
        )  # fmt: skip
        await self.store.apply([Record.of(thing) for thing in (chat, asked, answering, run)])
        await self.log.open(run, 15)
        return run

    def ring(self, run: Run) -> None:
        self.celery.send_task(
            RUN_TASK, args=[run.to_json()], argsrepr=f"<run {run.id}>", task_id=run.id, queue=queue_of(run)
        )

    async def send(self, question: str) -> Run:
        run = await self.accept(question)
        await asyncio.to_thread(self.ring, run)
        return run

    async def events(self, run: Run) -> list[Event]:
        page = await self.log.read(run.id, 0, 100_000)
        return list(page.events) if page is not None else []

    async def ended(self, run: Run, timeout: float = 90) -> list[Event]:
        """All events, once the log is closed."""

        async def closed() -> list[Event] | None:
            events = await self.events(run)
            return events if events and events[-1].terminal else None

        events = await eventually(closed, timeout, every=0.05)
        assert events is not None
        return events

    async def speaking(self, run: Run, pieces: int = 1) -> None:
        """Wait until the answer has begun."""

        async def said() -> bool:
            return sum(event.type is EventType.CONTENT for event in await self.events(run)) >= pieces

        await eventually(said)

    async def row(self, run: Run) -> Run:
        """The run's row, once it has ended."""

        async def stored() -> Run | None:
            row = await self.store.runs.get(run.id)
            return row if row is not None and row.state.terminal else None

        row = await eventually(stored, every=0.05)
        assert row is not None
        return row

    async def state(self, run: Run) -> str:
        """What Celery says of the task."""
        return str(await asyncio.to_thread(lambda: self.celery.AsyncResult(run.id).state))

    async def state_is(self, run: Run, wanted: str) -> None:
        """Wait until Celery says so: it hears of a run's end after the log."""

        async def said() -> bool:
            assert await self.state(run) == wanted
            return True

        await eventually(said, every=0.05)

    async def message(self, run: Run) -> Message:
        """The answer's row, once it has ended."""

        async def stored() -> Message | None:
            message = await self.store.chats.message(str(run.message_id))
            return message if message is not None and message.status is not MessageStatus.PROCESSING else None

        message = await eventually(stored, every=0.05)
        assert message is not None
        return message


@asynccontextmanager
async def client_of(stack: Stack) -> AsyncIterator[Client]:
    settings = Settings(redis_url=stack.redis_url)
    log = streams.connect(stack.redis_url)
    store = Store(stack.database_url, pool_size=2, wait=5, clock=SystemClock())
    celery = make_celery(settings)
    try:
        yield Client(log, store, celery)
    finally:
        await asyncio.to_thread(celery.close)
        await store.close()
        await log.close()


def check_whole(events: list[Event], text: str) -> None:
    """Dense numbers, one terminal event, and the text behind the last reset."""
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events if event.terminal] == [EventType.DONE]
    assert Transcript.of(events).content == text


@pytest_asyncio.fixture(scope="module")
async def stacks(stack_maker: StackMaker) -> AsyncIterator[dict[str, Stack]]:
    """Two workers of each pool, for all tests here: starting workers is what takes time."""
    maker = stack_maker.fresh()
    made = [
        await maker(servers=0, workers=2, settings={**QUICK, "HEADWATER_WORKER_POOL": pool}, start=False)
        for pool in ("asyncio", "prefork")
    ]
    yield dict(zip(("asyncio", "prefork"), made, strict=True))
    await maker.stop()


async def awake(stack: Stack) -> Stack:
    """With all its workers, whatever the test before did to them."""
    sleeping = [worker for worker in stack.workers if not worker.running]
    for worker in sleeping:
        worker.launch()
    await asyncio.gather(*(worker.ready() for worker in sleeping))
    return stack


@pytest_asyncio.fixture
async def stack(stacks: dict[str, Stack]) -> Stack:
    return await awake(stacks["asyncio"])


@pytest_asyncio.fixture
async def prefork(stacks: dict[str, Stack]) -> Stack:
    return await awake(stacks["prefork"])


@pytest_asyncio.fixture(params=["asyncio", "prefork"])
async def either(request: pytest.FixtureRequest, stacks: dict[str, Stack]) -> Stack:
    return await awake(stacks[request.param])


async def test_a_run_streams_and_ends_in_the_database(either: Stack, openai_server: OpenAIServer) -> None:
    async with client_of(either) as client:
        name = f"sea-{new_id()}"
        said = [
            {"chunk": chunk("Far, ")},
            {"wait": name},
            {"chunk": chunk("far away.")},
            {"chunk": chunk(finish="stop")},
        ]
        openai_server.load({"scenarios": {name: {"steps": [*said, {"chunk": chunk(choices=False, usage=(7, 60))}]}}})
        run = await client.accept(f"How far is the sea? [[scenario:{name}]]")
        assert await client.state(run) == "PENDING"
        client.ring(run)
        await client.speaking(run)
        await client.state_is(run, "STARTED")
        openai_server.release(name)
        events = await client.ended(run)
        check_whole(events, "Far, far away.")
        assert events[0].data["state"] == "running"
        assert events[-1].data["usage"]["completion_tokens"] == 60
        row = await client.row(run)
        assert (row.state, row.attempt) == (RunState.DONE, 1)
        message = await client.message(run)
        assert (message.content, message.status) == ("Far, far away.", MessageStatus.DONE)
        await client.state_is(run, "SUCCESS")
        result = await asyncio.to_thread(lambda: client.celery.AsyncResult(run.id).get(timeout=60))
        assert (result["run_id"], result["status"]) == (run.id, "done")


async def test_celery_tells_failed_and_cancelled_runs_apart(stack: Stack) -> None:
    async with client_of(stack) as client:
        failing, slow = await client.send("[[scenario:auth]]"), await client.send(f"[[scenario:hang]] {new_id()}")
        error = (await client.ended(failing))[-1]
        assert (error.type, error.data["code"]) == (EventType.ERROR, "provider_auth")
        await client.state_is(failing, "FAILURE")
        await client.speaking(slow)
        await client.log.cancel(slow.id)
        events = await client.ended(slow)
        assert events[-1].type is EventType.CANCELLED
        await client.state_is(slow, "REVOKED")
        kept = await client.message(slow)
        assert kept.content == Transcript.of(events).content != ""
        assert kept.status is MessageStatus.CANCELLED


async def test_a_revoke_by_celerys_tools_is_a_cancel(stack: Stack) -> None:
    async with client_of(stack) as client:
        run = await client.send(f"[[scenario:hang]] {new_id()}")
        await client.speaking(run)
        await asyncio.to_thread(client.celery.control.revoke, run.id, terminate=True)
        events = await client.ended(run)
        assert [event.type for event in events if event.terminal] == [EventType.CANCELLED]
        assert (await client.row(run)).state is RunState.CANCELLED


async def test_a_cancel_closes_the_call_to_the_model(stack: Stack, openai_server: OpenAIServer) -> None:
    async with client_of(stack) as client:
        # Says three words and nothing more, so that only the renewal can tell of the cancel.
        question = f"[[scenario:hang]] {new_id()}"
        run = await client.send(question)
        await client.speaking(run)
        await client.log.cancel(run.id)
        assert (await client.ended(run))[-1].type is EventType.CANCELLED
        request = next(each for each in openai_server.chats if each.question == question)
        await eventually(lambda: request.disconnected_at is not None)


async def test_the_same_task_sent_three_times_gives_one_stream(stack: Stack, openai_server: OpenAIServer) -> None:
    async with client_of(stack) as client:
        question = f"Once? {new_id()} [[words:40]][[rate:50]]"
        run = await client.accept(question)
        for _ in range(3):
            client.ring(run)
        events = await client.ended(run)
        check_whole(events, answer(question, 40))
        client.ring(run)
        await eventually(lambda: sum(f"{run.id}] succeeded" in line for line in lines_of(stack)) == 4)
        assert await client.events(run) == events
        assert sum(each.question == question for each in openai_server.chats) == 1


async def test_a_worker_killed_in_the_middle_is_replaced_and_the_answer_begins_again(either: Stack) -> None:
    async with client_of(either) as client:
        question = f"Who is there? {new_id()} [[words:60]][[rate:30]]"
        run = await client.send(question)
        await client.speaking(run, 3)
        either.workers[await holder_of(client, either, run)].kill()
        events = await client.ended(run)
        check_whole(events, answer(question, 60))
        resets = [event for event in events if event.type is EventType.RESET]
        assert [event.data["reason"] for event in resets] == ["worker_lost"]
        assert (await client.row(run)).attempt == 2


async def test_a_worker_killed_before_the_first_token_is_replaced_without_a_reset(
    stack: Stack, openai_server: OpenAIServer
) -> None:
    async with client_of(stack) as client:
        name = f"later-{new_id()}"
        openai_server.load({"scenarios": {name: {"steps": [{"words": 5}], "before": [{"wait": name}]}}})
        question = f"[[scenario:{name}]]"
        run = await client.send(question)
        await eventually(lambda: any(each.question == question for each in openai_server.chats))
        stack.workers[await holder_of(client, stack, run)].kill()
        openai_server.release(name)
        events = await client.ended(run)
        check_whole(events, answer(question, 5))
        assert EventType.RESET not in {event.type for event in events}
        assert [event.data["attempt"] for event in events if event.type is EventType.STATE] == [1, 2]


async def test_a_run_that_kills_its_process_fails_after_three_attempts(prefork: Stack) -> None:
    async with client_of(prefork) as client:
        run = await client.send(f"[[scenario:hang]] {new_id()}")
        pid = 0
        for attempt in (1, 2, 3):
            await eventually(partial(attempt_is, client, run, attempt), 60)
            # Each attempt in another child of the pool; Celery replaces it.
            before, pid = pid, await pid_of(client, run)
            assert pid != before
            assert pid not in {worker.pid for worker in prefork.workers}
            os.kill(pid, signal.SIGKILL)
        events = await client.ended(run)
        assert (events[-1].type, events[-1].data["code"]) == (EventType.ERROR, "worker_lost")
        assert (await client.row(run)).state is RunState.FAILED


async def test_a_stopped_worker_that_wakes_up_late_writes_nothing(stack: Stack) -> None:
    async with client_of(stack) as client:
        question = f"Zombie? {new_id()} [[words:60]][[rate:30]]"
        run = await client.send(question)
        await client.speaking(run, 3)
        zombie = stack.workers[await holder_of(client, stack, run)]
        zombie.signal(signal.SIGSTOP)
        events = await client.ended(run)
        zombie.signal(signal.SIGCONT)
        check_whole(events, answer(question, 60))
        await eventually(lambda: f"Run {run.id} stops at attempt 1, another one has it" in zombie.log(), 60)
        assert await client.events(run) == events


async def test_a_worker_told_to_end_hands_its_run_over_without_waiting_for_the_answer(
    either: Stack, openai_server: OpenAIServer
) -> None:
    async with client_of(either) as client:
        name = f"hand-over-{new_id()}"
        run = await say_and_wait(client, openai_server, name)
        leaving = either.workers[await holder_of(client, either, run)]
        # The model says nothing more until the worker has ended.
        await leaving.terminate()
        openai_server.release(name)
        events = await client.ended(run)
        check_whole(events, "Hello, world")
        assert [event.data["reason"] for event in events if event.type is EventType.RESET] == ["handed_over"]


async def test_a_run_that_no_message_told_of_is_found_by_the_sweeper(stack: Stack) -> None:
    async with client_of(stack) as client:
        run = await client.accept("[[scenario:hello]]")
        await client.log.open(run, 0.1)
        check_whole(await client.ended(run), "Hello, world")


async def test_a_run_that_redis_forgot_is_found_by_its_row(stack: Stack) -> None:
    async with client_of(stack) as client:
        run = await client.accept("[[scenario:hello]]")
        await client.log.forget(run.id)
        check_whole(await client.ended(run), "Hello, world")
        assert (await client.row(run)).state is RunState.DONE


async def test_a_redis_that_comes_back_empty_is_written_again_under_the_same_epoch(stack: Stack) -> None:
    async with client_of(stack) as client:
        question = f"Forgotten? {new_id()} [[words:60]][[rate:30]]"
        run = await client.send(question)
        await client.speaking(run, 5)
        before = await client.log.meta(run.id)
        async with redis.asyncio.Redis.from_url(stack.redis_url) as raw:
            await raw.flushall()
        check_whole(await client.ended(run), answer(question, 60))
        after = await client.log.meta(run.id)
        assert before is not None
        assert after is not None
        assert (after.epoch, after.attempt) == (before.epoch, 1)


async def test_a_redis_that_is_frozen_for_a_while_loses_nothing(stack: Stack) -> None:
    assert stack.redis_server is not None
    async with client_of(stack) as client:
        question = f"Frozen? {new_id()} [[words:60]][[rate:30]]"
        run = await client.send(question)
        await client.speaking(run, 5)
        holder = stack.workers[await holder_of(client, stack, run)]
        os.kill(stack.redis_server.pid, signal.SIGSTOP)
        try:
            await eventually(lambda: f"Run {run.id} goes on in memory" in holder.log(), 60)
        finally:
            os.kill(stack.redis_server.pid, signal.SIGCONT)
        check_whole(await client.ended(run), answer(question, 60))


async def test_celerys_own_command_starts_a_worker_that_can_be_asked_and_that_leaves_nothing_behind(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    stack = await make_stack(servers=0, workers=1, settings=QUICK, start=False)
    command = [sys.executable, "-m", "celery", "-A", "headwater.worker"]
    options = ["worker", "--pool=threads", "--concurrency=4", "--loglevel=INFO", "-E"]
    process = await asyncio.create_subprocess_exec(*command, *options, env=stack.environment, start_new_session=True)
    try:
        async with client_of(stack) as client:
            name = f"asked-{new_id()}"
            run = await say_and_wait(client, openai_server, name)
            (active,) = await inspected(client, "active")
            assert (active["id"], active["args"]) == (run.id, f"<run {run.id}>")
            assert name not in str(active)
            stats = await asyncio.to_thread(lambda: client.celery.control.inspect(timeout=60, limit=1).stats())
            assert [each["pool"]["max-concurrency"] for each in stats.values()] == [4]
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 60) == 0
            # It was the only worker: the run goes on when there is one again.
            await stack.start()
            openai_server.release(name)
            check_whole(await client.ended(run), "Hello, world")
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


async def test_several_worker_processes_are_one_command(make_stack: StackMaker) -> None:
    port = neighbours()
    settings = {**QUICK, "HEADWATER_WORKER_METRICS_PORT": str(port)}
    stack = await make_stack(servers=0, workers=0, settings=settings, start=False)
    pair = Pair("pair", ["worker", "--processes", "2", "--name", "pair@%h"], stack.environment, stack.folder)
    try:
        await pair.start()
        async with client_of(stack) as client, httpx.AsyncClient(trust_env=False) as http:
            asked = await asyncio.to_thread(lambda: client.celery.control.inspect(timeout=60, limit=2).stats())
            assert sorted(name.partition("@")[0] for name in asked) == ["pair-1", "pair-2"]
            assert {facts["pool"]["implementation"] for facts in asked.values()} == {"headwater.worker.pool:AsyncPool"}
            assert {facts["pool"]["max-concurrency"] for facts in asked.values()} == {4}
            for each in (port, port + 1):
                assert (await http.get(f"http://127.0.0.1:{each}/metrics")).status_code == 200
            # One that dies is begun again, and the other has its run meanwhile.
            question = f"Who is there? {new_id()} [[words:60]][[rate:30]]"
            run = await client.send(question)
            await client.speaking(run, 3)
            dead = await pid_of(client, run)
            assert dead in pair.workers()
            os.kill(dead, signal.SIGKILL)
            check_whole(await client.ended(run), answer(question, 60))
            await eventually(lambda: len(pair.workers()) == 3, 60)
            assert "starting it again" in pair.log()
            # Nothing outlives the supervisor, whether it is told to end or killed.
            await pair.terminate()
            assert (pair.exit_code, alive(pair.workers())) == (0, [])
            await pair.start()
            os.kill(pair.pid, signal.SIGKILL)
            await eventually(lambda: not alive(pair.workers()), 30)
    finally:
        for pid in alive(pair.workers()):
            os.kill(pid, signal.SIGKILL)
        pair.kill()


class Pair(Process):
    """Two workers under one supervisor."""

    def workers(self) -> list[int]:
        """The processes it said were ready, in order."""
        return [int(pid) for pid in re.findall(r"worker-\d +│ ready \(process (\d+)\)", self.log())]

    async def _answers(self) -> bool:
        return len(self.workers()) == 2


def neighbours() -> int:
    """The first of two free ports, below those that outgoing connections are given meanwhile."""
    while True:
        port = random.randrange(15_000, 30_000)
        with (
            suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
            socket.create_server(("127.0.0.1", port + 1)),
        ):
            return port


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


async def test_a_worker_serves_the_figures_of_the_runs_it_executed(make_stack: StackMaker) -> None:
    port = free_port()
    stack = await make_stack(servers=0, workers=1, settings={**QUICK, "HEADWATER_WORKER_METRICS_PORT": str(port)})
    async with client_of(stack) as client, httpx.AsyncClient(trust_env=False) as http:
        await client.ended(await client.send("[[scenario:auth]]"))

        async def counted() -> bool:
            metrics = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
            return 'headwater_runs_ended_total{code="provider_auth",kind="chat",state="failed"} 1.0' in metrics

        await eventually(counted)


async def say_and_wait(client: Client, openai_server: OpenAIServer, name: str) -> Run:
    """A run that says `Hello, `, waits until `name` is released, and says the rest."""
    hello = [{"chunk": chunk("Hello, ")}, {"wait": name}, {"chunk": chunk("world")}]
    openai_server.load({"scenarios": {name: {"steps": [*hello, {"chunk": chunk(finish="stop")}, {"done": True}]}}})
    run = await client.send(f"[[scenario:{name}]]")
    await client.speaking(run)
    return run


def lines_of(stack: Stack) -> list[str]:
    return [line for worker in stack.workers for line in worker.log().splitlines()]


async def inspected(client: Client, what: str) -> list[dict[str, Any]]:
    # One worker is asked, whose answer ends the wait.
    answers = await asyncio.to_thread(lambda: getattr(client.celery.control.inspect(timeout=60, limit=1), what)())
    return [task for tasks in answers.values() for task in tasks]


async def attempt_is(client: Client, run: Run, attempt: int) -> bool:
    meta = await client.log.meta(run.id)
    return meta is not None and meta.attempt == attempt and meta.status is RunState.RUNNING


async def pid_of(client: Client, run: Run) -> int:
    """The process that holds the run."""
    async with redis.asyncio.Redis.from_url(str(client.celery.conf.broker_url), decode_responses=True) as raw:
        holder = str(await raw.hget(f"stream:{{{run.id}}}:metadata", "holder"))
    return int(holder.split(":")[1])


async def holder_of(client: Client, stack: Stack, run: Run) -> int:
    """Which of the stack's workers holds the run."""
    pid = await pid_of(client, run)
    # A child of the prefork pool has its worker's session.
    return [worker.pid for worker in stack.workers].index(os.getsid(pid))
