"""Messages that arrive while their chat is answering, over a real Redis, PostgreSQL and journal."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio
import redis.asyncio

from headwater.dev.services import Postgres
from headwater.errors import ChatBusy, ChatQueueFull, KeyReused
from headwater.ids import new_id
from headwater.intake import Accepted
from headwater.intake.turns import MAX_QUEUED
from headwater.messages import Role
from headwater.runs import Run, RunState
from headwater.settings import WhenBusy
from headwater.streams.redis import RedisStreamLog
from support.house import ME, House, frozen, make_house
from support.openai_scenarios import Scenario, Step, chunk
from support.openai_server import OpenAIServer
from support.reader import Reader, ask
from support.stack import Stack, StackMaker
from support.wait import eventually

ENQUEUE, INTERRUPT = WhenBusy.ENQUEUE, WhenBusy.INTERRUPT


@pytest_asyncio.fixture
async def house(redis_url: str, database_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with make_house(redis_url, database_url, tmp_path) as made:
        yield made


async def answering(house: House, text: str = "wait") -> tuple[str, Accepted, asyncio.Task[Run | None]]:
    """A chat in the middle of an answer."""
    chat = await house.intake.create_chat(ME)
    accepted = await house.intake.send(ME, chat.id, text)
    asked = len(house.asked)
    worker = house.begin()
    await eventually(lambda: len(house.asked) > asked)
    return chat.id, accepted, worker


async def drained(house: House) -> list[Run]:
    """Let workers take what is in the queue until nothing is; the runs that ended."""
    ended = []
    while house.queue:
        run = await house.begin()
        if run is not None:
            ended.append(run)
    return ended


def prompts(house: House) -> list[list[str]]:
    return [[str(message["content"]) for message in request.messages] for request in house.asked]


async def contents(house: House, chat_id: str) -> list[str]:
    return [message.content for message in (await house.reading.get_chat(ME, chat_id)).messages]


async def test_queued_messages_are_answered_in_order_each_with_the_answers_before_it(house: House) -> None:
    chat_id, first, worker = await answering(house)
    second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
    third = await house.intake.send(ME, chat_id, "three", when_busy=ENQUEUE)
    view = await house.reading.get_chat(ME, chat_id)
    assert [message.parent_id for message in view.messages] == [None, *(one.id for one in view.messages[:-1])]
    assert await drained(house) == [], "nobody answers out of turn"
    active = await house.reading.active_task(ME, chat_id)
    assert active is not None
    assert active.id == first.task_id

    house.gate.set()
    await worker
    assert [run.id for run in await drained(house)] == [second.task_id, third.task_id]
    said = ["wait", "You said: wait", "two", "You said: two", "three"]
    assert prompts(house) == [said[:1], said[:3], said]
    assert await contents(house, chat_id) == [*said, "You said: three"]
    assert await house.reading.active_task(ME, chat_id) is None


@pytest.mark.parametrize("end", ["cancel", "fail"])
async def test_an_answer_that_ends_badly_lets_the_next_begin_with_what_it_said(house: House, end: str) -> None:
    chat_id, first, worker = await answering(house, "wait and fail" if end == "fail" else "wait")
    second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
    await drained(house)
    if end == "cancel":
        await house.intake.cancel(ME, first.task_id)
    else:
        house.gate.set()
    ended = await worker
    assert ended is not None
    assert ended.state is (RunState.FAILED if end == "fail" else RunState.CANCELLED)
    assert [run.id for run in await drained(house)] == [second.task_id]
    assert prompts(house)[-1][1:] == ["You said: ", "two"]


async def test_a_queued_message_is_cancelled_at_once_and_the_one_behind_it_still_waits(house: House) -> None:
    chat_id, _first, worker = await answering(house)
    second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
    third = await house.intake.send(ME, chat_id, "three", when_busy=ENQUEUE)
    await drained(house)
    stopped = await house.intake.cancel(ME, second.task_id)
    assert stopped.status == RunState.CANCELLED
    assert await drained(house) == [], "the first is still answering"
    house.gate.set()
    await worker
    assert [run.id for run in await drained(house)] == [third.task_id]
    assert prompts(house)[-1] == ["wait", "You said: wait", "two", "three"]


async def test_an_interruption_stops_the_answer_and_begins_after_its_end(house: House) -> None:
    chat_id, first, worker = await answering(house)
    second = await house.intake.send(ME, chat_id, "rather this", when_busy=INTERRUPT)
    ended = await asyncio.wait_for(worker, 60)
    assert ended is not None
    assert (ended.id, ended.state) == (first.task_id, RunState.CANCELLED)
    assert [run.id for run in await drained(house)] == [second.task_id]
    assert prompts(house)[-1] == ["wait", "You said: ", "rather this"]


async def test_an_interruption_ends_what_was_queued_before_it_as_well(house: House) -> None:
    chat_id, _, worker = await answering(house)
    second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
    third = await house.intake.send(ME, chat_id, "rather this", when_busy=INTERRUPT)
    await asyncio.wait_for(worker, 60)

    async def cancelled() -> bool:
        return (await house.reading.run_view(ME, second.task_id)).state is RunState.CANCELLED

    await eventually(cancelled)
    assert [run.id for run in await drained(house)] == [third.task_id]


async def test_the_wish_to_interrupt_is_on_the_disk_with_the_message(house: House) -> None:
    chat_id, first, _ = await answering(house)
    house.intake.stops.bring = lambda run_ids: None  # type: ignore[method-assign]
    await house.intake.send(ME, chat_id, "rather this", when_busy=INTERRUPT)
    assert await house.journal.cancels(10) == [first.task_id]


async def test_without_a_wish_the_setting_decides(redis_url: str, database_url: str, tmp_path: Path) -> None:
    async with make_house(redis_url, database_url, tmp_path, when_busy="enqueue") as house:
        chat_id, first, _ = await answering(house)
        await house.intake.send(ME, chat_id, "two")
        with pytest.raises(ChatBusy) as caught:
            await house.intake.send(ME, chat_id, "three", when_busy=WhenBusy.REJECT)
        assert caught.value.extra == {"task_id": first.task_id}


async def test_only_so_many_messages_wait_and_a_key_holds_for_them_too(house: House) -> None:
    chat_id, first, _ = await answering(house)
    queued = [
        await house.intake.send(ME, chat_id, f"{number}", when_busy=ENQUEUE, key=f"key {number}".replace(" ", "-"))
        for number in range(MAX_QUEUED)
    ]
    for when_busy in (ENQUEUE, INTERRUPT):
        with pytest.raises(ChatQueueFull) as caught:
            await house.intake.send(ME, chat_id, "one more", when_busy=when_busy)
        assert caught.value.extra == {"task_id": first.task_id}
    again = await house.intake.send(ME, chat_id, "4", when_busy=ENQUEUE, key="key-4")
    assert again == queued[4]
    with pytest.raises(KeyReused):
        await house.intake.send(ME, chat_id, "4", when_busy=INTERRUPT, key="key-4")
    assert len(await contents(house, chat_id)) == 2 * (1 + MAX_QUEUED)


async def test_two_servers_that_take_messages_at_once_bring_them_into_one_line(
    house: House, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    chat_id, _, worker = await answering(house)
    async with make_house(redis_url, database_url, tmp_path) as other:
        taken = await asyncio.gather(
            *(
                each.intake.send(ME, chat_id, f"{name}{number}", when_busy=ENQUEUE)
                for number in range(4)
                for name, each in (("a", house), ("b", other))
            )
        )
        house.queue += other.queue
        house.gate.set()
        await worker
        # A worker at a time, so the order of the questions is the order of the line.
        await drained(house)
        view = await house.reading.get_chat(ME, chat_id)
        questions = [message.content for message in view.messages if message.role is Role.USER][1:]
        assert sorted(questions) == sorted(f"{name}{number}" for number in range(4) for name in "ab")
        assert prompts(house)[-1][2::2] == questions
        assert [len(prompt) for prompt in prompts(house)] == list(range(1, 2 * len(taken) + 2, 2))


async def test_a_queued_message_survives_a_redis_that_forgot_everything(house: House) -> None:
    chat_id, _, worker = await answering(house)
    second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
    await drained(house)
    assert isinstance(house.log, RedisStreamLog)
    await house.log._send(("FLUSHALL",))
    waiting = await house.store.runs.get(second.task_id)
    assert waiting is not None
    house.queue.append(waiting)
    assert await drained(house) == [], "its row tells that it must wait"
    house.gate.set()
    await worker
    # Parked anew, so the end of the first rings for it.
    assert [run.id for run in await drained(house)] == [second.task_id]
    assert prompts(house)[-1] == ["wait", "You said: wait", "two"]


async def test_what_was_said_before_is_read_from_the_rows_once_the_log_is_gone(house: House) -> None:
    chat_id, first, worker = await answering(house)
    second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
    await drained(house)
    house.gate.set()
    await worker
    await house.log.forget(first.task_id)
    assert [run.id for run in await drained(house)] == [second.task_id]
    assert prompts(house)[-1] == ["wait", "You said: wait", "two"]


async def test_messages_wait_and_are_answered_while_postgresql_is_away(house: House, postgres_server: Postgres) -> None:
    chat_id, first, worker = await answering(house)
    with frozen(postgres_server.pid):
        second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
        third = await house.intake.send(ME, chat_id, "three", when_busy=ENQUEUE)
        assert await drained(house) == []
        active = await house.reading.active_task(ME, chat_id)
        assert active is not None
        assert active.id == first.task_id
        house.gate.set()
        await worker
        assert [run.id for run in await drained(house)] == [second.task_id, third.task_id]
    assert prompts(house)[-1] == ["wait", "You said: wait", "two", "You said: two", "three"]


async def test_deleting_a_chat_ends_what_waits_in_it(house: House) -> None:
    chat_id, _, worker = await answering(house)
    second = await house.intake.send(ME, chat_id, "two", when_busy=ENQUEUE)
    await drained(house)
    await house.intake.delete_chat(ME, chat_id)
    await worker
    assert await drained(house) == []
    assert len(house.asked) == 1
    meta = await house.log.meta(second.task_id)
    assert meta is None or meta.status is RunState.CANCELLED


# --- whole processes ------------------------------------------------------------------------------


async def test_messages_that_wait_outlive_the_worker_the_server_and_what_redis_knew(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    quick = {"HEADWATER_LEASE_SECONDS": "2", "HEADWATER_QUEUE_GRACE": "2"}
    stack = await make_stack(settings=quick)
    name = f"held-{new_id()}"
    held: list[Step] = [
        {"chunk": chunk("Well, ")},
        {"wait": name},
        {"chunk": chunk("yes.")},
        {"chunk": chunk(finish="stop")},
    ]
    openai_server.scenarios[name] = Scenario(held)
    async with stack.client() as http:
        first = await ask(http, f"Is it so? [[scenario:{name}]]")
        path = f"/api/chats/{first['chat_id']}/messages"
        runs = [first]
        for content in ("And why? [[words:3]]", "Since when? [[words:3]]"):
            answer = await http.post(path, json={"content": content, "when_busy": "enqueue"})
            assert answer.status_code == 202
            runs.append(answer.json())

        async def speaks() -> bool:
            return "Well" in (await http.get(f"/api/runs/{first['task_id']}/events")).text

        await eventually(speaks, 30)
        stack.worker.kill()
        await stack.worker.start()
        await stack.server.restart()
        await eventually(speaks, 30)
        async with redis.asyncio.Redis.from_url(stack.redis_url) as raw:
            await raw.flushall()
        openai_server.release(name)
        for accepted in runs:
            reader = await Reader(stack.base_url, accepted["task_id"]).read()
            assert reader.end == "done"
    times = [await eventually(partial(row_of_run, stack, accepted["task_id"])) for accepted in runs]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(times)), "never two at once, and in order"
    last = openai_server.chats[-1].body["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == "Well, yes."


def row_of_run(stack: Stack, run_id: str) -> tuple[datetime, datetime]:
    with psycopg.connect(stack.database_url) as connection:
        found = connection.execute("SELECT started_at, ended_at FROM runs WHERE id = %s", (run_id,)).fetchone()
    assert found is not None
    # The end may be said before PostgreSQL has it.
    assert found[1] is not None
    return found[0], found[1]
