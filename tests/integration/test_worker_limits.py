"""What a worker must survive, and what becomes of its runs: its own death, its limits, time, and what nobody expected.

Every test goes through a real server, as a person does, and looks at the run's one end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio

from headwater.ids import new_id
from headwater.streams import keys
from support import odd_worker
from support.openai_scenarios import answer
from support.reader import TERMINAL, Reader, ask, message_of, row_of
from support.stack import Process, Stack, StackMaker
from support.wait import eventually

#: Seconds; short, so that a dead worker is noticed soon, and long enough for one that lives on a busy machine.
LEASE = "4"


async def holder(stack: Stack, run_id: str) -> int:
    """The process that holds the run."""
    async with redis.asyncio.Redis.from_url(stack.redis_url, decode_responses=True) as raw:
        held = await raw.hget(keys.metadata(run_id), "holder")
    return int(str(held).split(":")[1])


async def ended(stack: Stack, accepted: dict[str, Any], end: str, text: str) -> dict[str, Any]:
    """The terminal event, once the run has it: the only one, the last, and the same as the row."""
    reader = await Reader(stack.base_url, accepted["task_id"]).read()
    assert (reader.end, reader.text) == (end, text)
    status = {"done": "done", "error": "failed", "cancelled": "cancelled"}[end]
    await eventually(lambda: row_of(stack, accepted["message_id"]) == (status, text))
    async with stack.client() as http:
        page = (await http.get(f"/api/runs/{accepted['task_id']}/events", params={"limit": 1000})).json()
        task = (await http.get(f"/api/task/{accepted['task_id']}")).json()
    assert [item["seq"] for item in page["items"]] == list(range(1, len(page["items"]) + 1))
    assert [item["type"] for item in page["items"] if item["type"] in TERMINAL] == [end]
    assert page["items"][-1] == reader.events[-1]
    assert task["status"] == status
    return reader.events[-1]


# --- a worker with the defaults -------------------------------------------------------------------


async def test_with_the_defaults_a_dead_worker_is_noticed_by_its_lease(make_stack: StackMaker) -> None:
    stack = await make_stack(workers=2)
    question = f"Who is there? {new_id()} [[words:60]] [[rate:20]]"
    async with stack.client() as http:
        accepted = await ask(http, question)
        reader = Reader(stack.base_url, accepted["task_id"])
        reading = asyncio.create_task(reader.read())
        await eventually(lambda: len(reader.text) > 20, 30)
        first = await holder(stack, accepted["task_id"])
        loop = asyncio.get_running_loop()
        next(worker for worker in stack.workers if worker.pid == first).kill()
        killed = loop.time()
        await eventually(lambda: any(event["type"] == "reset" for event in reader.events), 60)
        # The lease, a look of the sweeper and the way through the queue: 10 + 2 s and a little.
        print(f"\nanother worker has the run {loop.time() - killed:.1f} s after the first was killed")
        await reading
        assert (await http.get(f"/api/task/{accepted['task_id']}")).json()["attempt"] == 2
    await ended(stack, accepted, "done", answer(question, 60))


# --- time -----------------------------------------------------------------------------------------


async def test_time_is_limited(make_stack: StackMaker) -> None:
    # Far apart, and far above what a busy machine adds to the pauses of a model that speaks.
    stack = await make_stack(settings={"HEADWATER_PROVIDER_IDLE": "3", "HEADWATER_RUN_DEADLINE": "9"})
    question = "Endless [[words:2000]] [[rate:40]]"
    async with stack.client() as http:
        silent, endless = await ask(http, "[[scenario:hang]]"), await ask(http, question)
        assert (await ended(stack, silent, "error", "Hello, world"))["code"] == "provider_timeout"
        page = Reader(stack.base_url, endless["task_id"])
        said = (await page.read()).text
        assert answer(question, 2000).startswith(said)
        assert said
        error = await ended(stack, endless, "error", said)
        assert (error["code"], error["retryable"]) == ("deadline", True)


async def test_clocks_that_jump_change_nothing(make_stack: StackMaker, tmp_path: Path) -> None:
    """An hour forth and back, under a run and between two, in server and worker, together and against each other."""
    clocks = {name: tmp_path / name for name in ("server", "worker")}
    stack = await make_stack(settings={"HEADWATER_LEASE_SECONDS": LEASE, "ODD_POLICY": "restart"}, start=False)
    for name, process in (("server", stack.server), ("worker", stack.worker)):
        make_odd(process)
        process.change(ODD_CLOCK=str(clocks[name]))
    await stack.start()
    async with stack.client() as http:
        questions = [f"Question {number} [[words:60]] [[rate:20]]" for number in range(3)]
        chat, said = None, []
        for number, question in enumerate(questions):
            accepted = await ask(http, question, chat)
            chat = accepted["chat_id"]
            reader = Reader(stack.base_url, accepted["task_id"])
            reading = asyncio.create_task(reader.read())
            await eventually(partial(_said, reader, 20), 30)
            clocks["server"].write_text(("3600", "-3600", "0")[number])
            clocks["worker"].write_text(("-3600", "3600", "0")[number])
            if number == 2:
                stack.worker.kill()
                clocks["worker"].write_text("-7200")
                await stack.worker.start()
            await reading
            assert any(event["type"] == "reset" for event in reader.events) == (number == 2)
            stamps = [event["at"] for event in reader.events]
            assert max(stamps) - min(stamps) > 3_500_000, "the clock did jump"
            await ended(stack, accepted, "done", answer(question, 60))
            task = (await http.get(f"/api/task/{accepted['task_id']}")).json()
            # The lease runs by Redis's clock, and the higher attempt wins also when its clock is behind.
            assert task["attempt"] == (2 if number == 2 else 1)
            said += [question, answer(question, 60)]
        found = (await http.get(f"/api/chats/{chat}")).json()
        assert [message["content"] for message in found["messages"]] == said
        ats = [message["created_at"] for message in found["messages"]]
        assert ats == sorted(ats)


def _said(reader: Reader, characters: int) -> bool:
    return len(reader.text) > characters


# --- a worker that is told to go wrong ------------------------------------------------------------


@pytest_asyncio.fixture(scope="module")
async def odd(stack_maker: StackMaker) -> AsyncIterator[Stack]:
    maker = stack_maker.fresh()
    settings = {
        "HEADWATER_LEASE_SECONDS": LEASE,
        "HEADWATER_QUEUE_GRACE": "2",
        "HEADWATER_WORKER_POOL": "prefork",
        "HEADWATER_WORKER_CONCURRENCY": "2",
    }
    stack = await maker(settings=settings, start=False)
    make_odd(stack.worker)
    await stack.start()
    yield stack
    await maker.stop()


def make_odd(process: Process) -> None:
    command = process._command
    process._command = [sys.executable, "-P", str(odd_worker.__file__), *command[command.index("headwater") + 1 :]]


async def test_a_run_that_kills_its_worker_fails_with_a_reason_and_can_be_tried_again(
    odd: Stack, tmp_path: Path
) -> None:
    poison = tmp_path / "poison"
    poison.touch()
    async with odd.client() as http:
        accepted = await ask(http, f"[[odd:die {poison}]] [[scenario:hello]]")
        error = await ended(odd, accepted, "error", "")
        assert (error["code"], error["retryable"]) == ("worker_lost", True)
        assert "died 3 times" in error["message"]
        assert (await message_of(http, accepted))["error"]["code"] == "worker_lost"
        poison.unlink()
        again = await http.post(f"/api/chats/{accepted['chat_id']}/messages/{accepted['message_id']}/regenerate")
        assert again.status_code == 202, again.text
        await ended(odd, again.json(), "done", "Hello, world")


async def test_a_kind_that_is_interrupted_keeps_what_it_said(odd: Stack, tmp_path: Path) -> None:
    poison = tmp_path / "poison"
    poison.touch()
    async with odd.client() as http:
        accepted = await ask(http, f"[[odd:die late {poison}]]")
        error = await ended(odd, accepted, "error", "Half")
        assert (error["code"], error["retryable"]) == ("worker_lost", True)


async def test_a_kind_that_continues_goes_on_behind_what_was_said(make_stack: StackMaker) -> None:
    stack = await make_stack(
        settings={"HEADWATER_LEASE_SECONDS": LEASE, "ODD_POLICY": "continue"}, workers=2, start=False
    )
    for worker in stack.workers:
        make_odd(worker)
    await stack.start()
    async with stack.client() as http:
        accepted = await ask(http, "[[odd:on]]")
        reader = await Reader(stack.base_url, accepted["task_id"]).read()
        assert (reader.end, reader.text) == ("done", "Half and half")
        assert [event["type"] for event in reader.events if event["type"] in {"reset", "content"}] == ["content"] * 2
        assert (await http.get(f"/api/task/{accepted['task_id']}")).json()["attempt"] == 2
    await ended(stack, accepted, "done", "Half and half")
    assert sum(worker.running for worker in stack.workers) == 1


@pytest.mark.parametrize("name", ["KeyError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "RecursionError"])
async def test_what_nobody_expected_ends_the_run_and_not_its_worker(odd: Stack, name: str) -> None:
    async with odd.client() as http:
        accepted = await ask(http, f"[[odd:raise {name}]]")
        error = await ended(odd, accepted, "error", "Half")
        assert error["code"] == "internal"
        assert "oddity" not in str(error)
        assert (await http.get(f"/api/task/{accepted['task_id']}")).json()["attempt"] == 1


async def test_a_memory_limit_ends_the_run_and_not_its_worker(odd: Stack) -> None:
    async with odd.client() as http:
        accepted, other = await ask(http, "[[odd:memory]]"), await ask(http, "Meanwhile [[words:20]] [[rate:20]]")
        assert (await ended(odd, accepted, "error", "Half"))["code"] == "internal"
        await ended(odd, other, "done", answer("Meanwhile [[words:20]] [[rate:20]]", 20))
    assert "MemoryError" in odd.worker.log()


# --- Celery's own limit ---------------------------------------------------------------------------


async def test_children_that_celery_replaces_for_their_memory_lose_nothing(make_stack: StackMaker) -> None:
    # A run may be given to a child that is about to end; it is then found by its lease or after the grace.
    quick = {"HEADWATER_LEASE_SECONDS": LEASE, "HEADWATER_QUEUE_GRACE": "2"}
    stack = await make_stack(start=False, settings=quick)
    await stack.server.start()
    # More than a kilobyte each: every child is replaced after its first run.
    options = ["--pool=prefork", "--concurrency=1", "--max-memory-per-child=1", "--loglevel=WARNING"]
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "celery", "-A", "headwater.worker", "worker", *options],
        env=stack.environment,
        start_new_session=True,
    )
    try:
        async with stack.client() as http:
            held = []
            for number in range(3):
                question = f"Run {number} [[words:20]] [[rate:40]]"
                accepted = await ask(http, question)
                held.append(await _holder_once_said(stack, accepted))
                await ended(stack, accepted, "done", answer(question, 20))
        assert len(set(held)) == 3
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


async def _holder_once_said(stack: Stack, accepted: dict[str, Any]) -> int:
    reader = Reader(stack.base_url, accepted["task_id"])
    reader.leave_after = 3
    await reader.read()
    return await holder(stack, accepted["task_id"])
