"""A process that dies at a named step loses nothing and doubles nothing: every step there is, over real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
import psycopg
import pytest
import pytest_asyncio
import redis.asyncio

from headwater.ids import new_id
from headwater.streams import keys
from headwater.telemetry import STEPS
from support.openai_scenarios import answer
from support.stack import Process, Stack, StackMaker
from support.wait import eventually

SETTINGS = {"HEADWATER_LEASE_SECONDS": "2", "HEADWATER_QUEUE_GRACE": "2", "HEADWATER_WORKER_CONCURRENCY": "4"}
#: Seconds from the crash to the end of the answer; generous, as the machine may be busy.
RECOVERY = 60.0

ACCEPT = [step.name for step in STEPS if step.name.startswith("accept.")]
CANCEL = [step.name for step in STEPS if step.name.startswith("cancel.")]
# A worker saves and syncs twice: the running row and the answer.
WORK = [step.name for step in STEPS if step.where == "worker"] + ["save.journalled:2", "sync.applied:2"]


@pytest_asyncio.fixture(scope="module")
async def stack(stack_maker: StackMaker) -> AsyncIterator[Stack]:
    """Of two servers the first is the one that dies; workers are started by each test."""
    maker = stack_maker.fresh()
    stack = await maker(servers=2, start=False, settings=SETTINGS)
    await stack.servers[1].start()
    yield stack
    await maker.stop()


def test_every_step_has_a_test_here() -> None:
    named = {name.partition(":")[0] for name in [*ACCEPT, *CANCEL, *WORK]}
    assert named == {step.name for step in STEPS}


@dataclass
class Question:
    """A message with its key, as a client that repeats it until it has a reply."""

    chat_id: str
    text: str
    key: str

    async def post(self, base_url: str) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=base_url, timeout=60, trust_env=False) as http:
            reply = await http.post(
                f"/api/chats/{self.chat_id}/messages",
                json={"content": self.text},
                headers={"Idempotency-Key": self.key},
            )
        assert reply.status_code == 202, reply.text
        accepted: dict[str, Any] = reply.json()
        return accepted


async def ask(stack: Stack, text: str) -> Question:
    async with stack.client(1) as http:
        made = await http.post("/api/chats", json={})
    return Question(made.json()["id"], text, new_id())


async def armed(process: Process, failpoint: str) -> None:
    process.change(DEBUG="1", HEADWATER_FAILPOINT=failpoint)
    await process.restart()


async def mended(process: Process) -> None:
    process.change(DEBUG=None, HEADWATER_FAILPOINT=None)
    await process.restart()


async def died(process: Process) -> None:
    await eventually(lambda: not process.running, RECOVERY)
    assert process.exit_code == 137, process.log()[-3000:]


async def events_of(stack: Stack, run_id: str) -> list[dict[str, Any]]:
    """The whole log, once it has its terminal event."""
    async with redis.asyncio.Redis.from_url(stack.redis_url) as client:

        async def closed() -> list[dict[str, Any]]:
            found = [orjson.loads(item) for item in await client.lrange(keys.chunks(run_id), 0, -1)]
            return found if found and found[-1]["type"] in TERMINAL else []

        return await eventually(closed, RECOVERY, every=0.05)


TERMINAL = {"done", "error", "cancelled"}


def shown(events: list[dict[str, Any]]) -> str:
    """What a reader has on the screen at the end."""
    text = ""
    for event in events:
        if event["type"] == "reset":
            text = ""
        elif event["type"] == "content":
            text += event["text"]
    return text


async def one_whole_answer(stack: Stack, question: Question, accepted: dict[str, Any], end: str = "done") -> str:
    """One run, one terminal event, one row; what readers saw is what is stored. Returns the text."""
    events = await events_of(stack, accepted["task_id"])
    assert [event["type"] for event in events if event["type"] in TERMINAL] == [end]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))

    async def stored() -> bool:
        with psycopg.connect(stack.database_url) as connection:
            runs = connection.execute("SELECT id::text, state FROM runs WHERE chat_id = %s", [question.chat_id])
            said = connection.execute(
                "SELECT role, status, content FROM messages WHERE chat_id = %s ORDER BY created_at, id",
                [question.chat_id],
            )
            assert runs.fetchall() == [(accepted["task_id"], end)]
            assert said.fetchall() == [("user", "done", question.text), ("assistant", end, shown(events))]
        return True

    await eventually(stored, RECOVERY, every=0.05)
    return shown(events)


@pytest.mark.parametrize("failpoint", ACCEPT)
async def test_a_server_that_dies_while_it_accepts_has_accepted_once(stack: Stack, failpoint: str) -> None:
    if not stack.worker.running:
        await mended(stack.worker)
    await armed(stack.server, failpoint)
    question = await ask(stack, f"{failpoint} [[scenario:hello]]")
    with pytest.raises(httpx.TransportError):
        await question.post(stack.server.base_url)
    await died(stack.server)
    accepted = await question.post(stack.servers[1].base_url)
    assert await question.post(stack.servers[1].base_url) == accepted
    assert await one_whole_answer(stack, question, accepted) == "Hello, world"


@pytest.mark.parametrize("failpoint", CANCEL)
async def test_a_server_that_dies_while_it_cancels_keeps_the_cancel(stack: Stack, failpoint: str) -> None:
    if not stack.worker.running:
        await mended(stack.worker)
    await armed(stack.server, failpoint)
    question = await ask(stack, f"{failpoint} [[scenario:slow]]")
    accepted = await question.post(stack.servers[1].base_url)
    async with redis.asyncio.Redis.from_url(stack.redis_url) as client:
        await eventually(lambda: client.llen(keys.chunks(accepted["task_id"])), RECOVERY)
    async with stack.client() as http:
        with pytest.raises(httpx.TransportError):
            await http.post(f"/api/task/{accepted['task_id']}/cancel")
    await died(stack.server)
    # Nobody asks again.
    await one_whole_answer(stack, question, accepted, "cancelled")


@pytest.mark.parametrize("failpoint", WORK)
async def test_a_worker_that_dies_leaves_one_answer(stack: Stack, failpoint: str) -> None:
    stack.worker.kill()
    await armed(stack.worker, failpoint)
    text = f"{failpoint} [[words:12]] [[rate:100]]"
    question = await ask(stack, text)
    accepted = await question.post(stack.servers[1].base_url)
    await died(stack.worker)
    await mended(stack.worker)
    assert await question.post(stack.servers[1].base_url) == accepted
    assert await one_whole_answer(stack, question, accepted) == answer(text, 12)
