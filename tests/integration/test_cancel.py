"""A cancel that was promised happens: while Redis is away, comes back empty, and when the server dies meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from headwater import streams
from headwater.errors import NotFound
from headwater.ids import new_id
from headwater.intake import CANCELLING
from headwater.messages import MessageStatus
from headwater.runs import RunState
from support.house import ME, STRANGER, House, make_house
from support.house import frozen as all_frozen
from support.ids import alien_id
from support.openai_server import OpenAIServer
from support.own_postgres import OwnPostgres
from support.own_redis import OwnRedis, frozen, own_redis
from support.reader import Reader, ask, row_of
from support.runs import new_run
from support.stack import StackMaker
from support.wait import eventually


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OwnRedis]:
    with own_redis(tmp_path) as server:
        yield server


async def kept(house: House) -> None:
    """Until no promise is left."""

    async def none_left() -> bool:
        return not await house.journal.cancels(10)

    await eventually(none_left)


async def test_a_worker_is_told_when_redis_answers_again(own: OwnRedis, database_url: str, tmp_path: Path) -> None:
    async with make_house(own.url(), database_url, tmp_path) as house:
        chat = await house.intake.create_chat(ME)
        accepted = await house.intake.send(ME, chat.id, "wait")
        working = house.begin()
        await eventually(lambda: house.asked)
        with frozen(own):
            with pytest.raises(NotFound):
                await house.intake.cancel(STRANGER, accepted.task_id)
            for _ in range(2):
                stopped = await asyncio.wait_for(house.intake.cancel(ME, accepted.task_id), 30)
                assert stopped.status == CANCELLING
            assert await house.journal.cancels(10) == [accepted.task_id]
        ended = await asyncio.wait_for(working, 60)
        assert ended is not None
        assert ended.state is RunState.CANCELLED
        await kept(house)
        answer = (await house.reading.get_chat(ME, chat.id)).messages[-1]
        assert (answer.content, answer.status) == ("You said: ", MessageStatus.CANCELLED)


async def test_a_wish_made_while_nobody_knew_the_owner_is_the_owners_alone(own: OwnRedis, tmp_path: Path) -> None:
    with OwnPostgres.running() as postgres:
        async with make_house(own.url(), postgres.url(), tmp_path) as house:
            mine, theirs, queued = [
                (await house.intake.send(ME, (await house.intake.create_chat(ME)).id, words)).task_id
                for words in ("wait", "wait", "hello")
            ]
            await eventually(house.synced)
            working = [house.begin(), house.begin()]
            await eventually(lambda: len(house.asked) == 2)
            await eventually(house.synced)
            nobody = alien_id()
            with frozen(own), postgres.frozen():
                for caller, run_id in ((STRANGER, mine), (ME, mine), (STRANGER, theirs), (ME, queued), (ME, nobody)):
                    stopped = await asyncio.wait_for(house.intake.cancel(caller, run_id), 30)
                    assert stopped.status == CANCELLING
                assert await house.journal.cancels(10) == []
                assert len(await house.journal.wishes(10)) == 5

            async def judged() -> bool:
                return not await house.journal.wishes(10)

            await eventually(judged)
            ended = await asyncio.wait_for(working[0], 60)
            assert ended is not None
            assert ended.state is RunState.CANCELLED
            await kept(house)
            assert (await house.reading.run_view(ME, queued)).state is RunState.CANCELLED
            house.gate.set()
            other = await asyncio.wait_for(working[1], 60)
            assert other is not None
            assert other.state is RunState.DONE


async def test_a_wish_is_judged_by_redis_while_postgresql_is_still_away(own: OwnRedis, tmp_path: Path) -> None:
    with OwnPostgres.running() as postgres:
        async with make_house(own.url(), postgres.url(), tmp_path) as house:
            chat = await house.intake.create_chat(ME)
            accepted = await house.intake.send(ME, chat.id, "wait")
            working = house.begin()
            await eventually(lambda: house.asked)
            await eventually(house.synced)
            nobody = alien_id()
            with postgres.frozen():
                with frozen(own):
                    for run_id in (nobody, accepted.task_id):
                        assert (await house.intake.cancel(ME, run_id)).status == CANCELLING
                ended = await asyncio.wait_for(working, 60)
                assert ended is not None
                assert ended.state is RunState.CANCELLED
                assert await house.journal.wishes(10) == [(nobody, ME.owner_id)]


async def test_a_worker_whose_redis_comes_back_empty_keeps_what_it_said(
    own: OwnRedis, database_url: str, tmp_path: Path
) -> None:
    async with make_house(own.url(), database_url, tmp_path) as house:
        chat = await house.intake.create_chat(ME)
        accepted = await house.intake.send(ME, chat.id, "wait")
        working = house.begin()

        async def spoken() -> bool:
            page = await house.log.read(accepted.task_id, 0, 10)
            return page is not None and any(event.type == "content" for event in page.events)

        await eventually(spoken)
        own.stop()
        assert (await house.intake.cancel(ME, accepted.task_id)).status == CANCELLING
        own.start()
        ended = await asyncio.wait_for(working, 60)
        assert ended is not None
        assert (ended.state, ended.attempt) == (RunState.CANCELLED, 1)
        await kept(house)
        answer = (await house.reading.get_chat(ME, chat.id)).messages[-1]
        assert (answer.content, answer.status) == ("You said: ", MessageStatus.CANCELLED)


async def test_a_queued_run_is_ended_by_the_next_server_on_the_same_journal(
    own: OwnRedis, database_url: str, tmp_path: Path
) -> None:
    async with make_house(own.url(), database_url, tmp_path) as house:
        chat = await house.intake.create_chat(ME)
        accepted = await house.intake.send(ME, chat.id, "hello")
        own.stop()
        assert (await house.intake.cancel(ME, accepted.task_id)).status == CANCELLING
    own.start()
    async with make_house(own.url(), database_url, tmp_path) as house:
        await kept(house)
        assert (await house.reading.run_view(ME, accepted.task_id)).state is RunState.CANCELLED
        assert (await house.intake.cancel(ME, accepted.task_id)).status == "cancelled"
        answer = (await house.reading.get_chat(ME, chat.id)).messages[-1]
        assert answer.status is MessageStatus.CANCELLED
        await house.intake.send(ME, chat.id, "next")


async def test_promises_that_take_their_time_do_not_stand_in_the_way_of_others(
    redis_url: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.intake.stops.BATCH", 2)
    async with make_house(redis_url, database_url, tmp_path) as house, AsyncExitStack() as last:
        # Its lease does not end before the test does: the promises stay.
        log = streams.connect(redis_url, lease_seconds=3600)
        last.push_async_callback(log.close)
        for _ in range(3):
            held = new_run("chat", owner_id=ME.owner_id)
            await log.claim(held, "a worker that is frozen")
            await house.journal.note_cancel(held.id)
        queued = await house.intake.send(ME, (await house.intake.create_chat(ME)).id, "hello")
        await house.journal.note_cancel(queued.task_id)

        async def ended() -> bool:
            return (await house.reading.run_view(ME, queued.task_id)).state is RunState.CANCELLED

        await eventually(ended)


async def test_a_promise_that_cannot_be_kept_is_told_once_and_does_not_stand_in_the_way_of_others(
    redis_url: str, database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_house(redis_url, database_url, tmp_path) as house:
        # It is no run's id, and comes first.
        await house.journal.note_cancel("\x00")
        for _ in range(2):
            queued = await house.intake.send(ME, (await house.intake.create_chat(ME)).id, "hello")
            await house.journal.note_cancel(queued.task_id)
            await house.intake.stops.look()
            assert (await house.reading.run_view(ME, queued.task_id)).state is RunState.CANCELLED
    assert len([record for record in caplog.records if "cancelled as promised" in record.getMessage()]) == 1


@pytest.mark.parametrize("also", ["Redis", "Redis and PostgreSQL"])
async def test_the_call_to_the_model_is_closed_while_redis_is_still_away(
    make_stack: StackMaker, openai_server: OpenAIServer, also: str
) -> None:
    stack = await make_stack(own_postgres=True)
    assert stack.redis_server is not None
    assert stack.postgres_server is not None
    async with stack.client() as http:
        # Says three words and nothing more for ever.
        question = f"[[scenario:hang]] {new_id()}"
        accepted = await ask(http, question)
        reader = Reader(stack.base_url, accepted["task_id"])
        reading = asyncio.create_task(reader.read())
        await eventually(lambda: len(reader.text) > 5)
        await eventually(lambda: row_of(stack, accepted["message_id"])[0] == "processing")
        request = next(each for each in openai_server.chats if each.question == question)
        loop = asyncio.get_running_loop()
        with ExitStack() as away:
            away.enter_context(all_frozen(stack.redis_server.pid))
            if also != "Redis":
                away.enter_context(all_frozen(stack.postgres_server.pid))
            begun = loop.time()
            stopped = await http.post(f"/api/task/{accepted['task_id']}/cancel")
            print(f"\n{also} away: answered after {loop.time() - begun:.2f} s")
            assert (stopped.status_code, stopped.json()["status"]) == (202, CANCELLING)
            await eventually(lambda: request.disconnected_at is not None)
            print(f"the call to the model was closed after {loop.time() - begun:.2f} s")
            assert not reading.done()
        await reading
    assert reader.end == "cancelled"
    await eventually(lambda: row_of(stack, accepted["message_id"]) == ("cancelled", reader.text))


async def test_a_server_killed_after_its_promise_leaves_it_to_the_next(make_stack: StackMaker) -> None:
    stack = await make_stack()
    assert stack.redis_server is not None
    async with stack.client() as http:
        # It speaks for longer than the next server takes to start.
        accepted = await ask(http, "Stop me. [[words:6000]] [[rate:20]]")
        reader = Reader(stack.base_url, accepted["task_id"])
        reading = asyncio.create_task(reader.read())
        await eventually(lambda: len(reader.text) > 20)
        os.kill(stack.redis_server.pid, signal.SIGSTOP)
        try:
            begun = asyncio.get_running_loop().time()
            stopped = await http.post(f"/api/task/{accepted['task_id']}/cancel")
            print(f"cancel with Redis frozen: {asyncio.get_running_loop().time() - begun:.2f} s")
            assert (stopped.status_code, stopped.json()["status"]) == (202, CANCELLING)
            stack.server.kill()
        finally:
            os.kill(stack.redis_server.pid, signal.SIGCONT)
        await stack.server.start()
        await reading
    assert reader.end == "cancelled"
    await eventually(lambda: row_of(stack, accepted["message_id"]) == ("cancelled", reader.text))
