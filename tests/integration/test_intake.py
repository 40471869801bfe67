"""Intake over a real Redis, PostgreSQL and journal: what is accepted, what is refused, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import psycopg
import pytest
import pytest_asyncio

from headwater import streams
from headwater.dev.services import Postgres, free_port
from headwater.errors import (
    ChatBusy,
    InvalidInput,
    JournalUnavailable,
    KeyReused,
    NotFound,
    StoreUnavailable,
)
from headwater.events import Event, EventType
from headwater.ids import new_id
from headwater.intake import CANCELLING
from headwater.journal import Field
from headwater.journal import rows as journal_rows
from headwater.journal.file import unavailable
from headwater.messages import Chat, Message, MessageStatus, Role
from headwater.records import Record
from headwater.runs import Run, RunState
from support.house import ME, STRANGER, House, frozen, make_house
from support.ids import old_id
from support.runs import new_run
from support.wait import eventually


@pytest_asyncio.fixture
async def house(redis_url: str, database_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with make_house(redis_url, database_url, tmp_path) as made:
        yield made


def rows(url: str, table: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
    assert found is not None
    return int(found[0])


async def synced(house: House) -> None:
    """Until PostgreSQL has everything."""
    await eventually(house.synced)


# --- sending -------------------------------------------------------------------------------------


async def test_a_message_is_answered_and_kept(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    accepted = await house.intake.send(ME, chat.id, "Why is the sky blue?\nShort, please.", key="first")

    stored = await house.store.chats.get(ME.owner_id, chat.id)
    assert stored.title == "Why is the sky blue?"
    question, answer = await house.store.chats.messages(ME.owner_id, chat.id)
    assert (question.id, answer.id) == (accepted.user_message_id, accepted.message_id)
    assert (question.role, question.status, question.parent_id) == (Role.USER, MessageStatus.DONE, None)
    assert (answer.role, answer.status, answer.parent_id) == (Role.ASSISTANT, MessageStatus.PROCESSING, question.id)
    assert answer.run_id == accepted.task_id
    queued = await house.store.runs.get(accepted.task_id)
    assert queued is not None
    assert (queued.state, queued.idempotency_key, queued.message_id) == (RunState.QUEUED, "first", answer.id)
    meta = await house.log.meta(accepted.task_id)
    assert meta is not None
    assert (meta.status, meta.owner_id, meta.chat_id) == (RunState.QUEUED, ME.owner_id, chat.id)
    assert [run.id for run in house.queue] == [accepted.task_id]
    active = await house.reading.active_task(ME, chat.id)
    assert active is not None
    assert active.id == accepted.task_id

    ended = await house.work()

    assert ended.state is RunState.DONE
    await synced(house)
    view = await house.reading.get_chat(ME, chat.id)
    assert [message.id for message in view.messages] == [question.id, answer.id]
    assert view.messages[1].content == "You said: Why is the sky blue?\nShort, please."
    assert view.messages[1].status is MessageStatus.DONE
    assert await house.reading.active_task(ME, chat.id) is None
    assert (await house.reading.run_view(ME, accepted.task_id)).state is RunState.DONE


async def test_the_next_message_follows_the_newest_and_the_model_sees_the_branch(house: House) -> None:
    chat = await house.intake.create_chat(ME, title="Named")
    for text in ("one", "two"):
        await house.intake.send(ME, chat.id, text)
        await house.work()
    view = await house.reading.get_chat(ME, chat.id)
    assert [message.parent_id for message in view.messages] == [None, *(one.id for one in view.messages[:-1])]
    assert [message["content"] for message in house.asked[-1].messages] == ["one", "You said: one", "two"]
    assert view.chat.title == "Named"


async def test_editing_makes_a_branch_beside_the_old_message(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    first = await house.intake.send(ME, chat.id, "one")
    await house.work()
    await house.intake.send(ME, chat.id, "two")
    await house.work()
    edited = await house.intake.send(ME, chat.id, "two, better", parent_id=first.message_id)
    await house.work()
    assert [message["content"] for message in house.asked[-1].messages] == ["one", "You said: one", "two, better"]
    root = await house.intake.send(ME, chat.id, "anew", parent_id=None)
    await house.work()
    assert [message["content"] for message in house.asked[-1].messages] == ["anew"]
    follow = await house.intake.send(ME, chat.id, "and then?")
    view = await house.reading.get_chat(ME, chat.id)
    parents = {message.id: message.parent_id for message in view.messages}
    assert parents[str(edited.user_message_id)] == first.message_id
    assert parents[str(root.user_message_id)] is None
    assert parents[str(follow.user_message_id)] == root.message_id, "the newest branch goes on"


async def test_an_answer_is_made_again_beside_the_first(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    first = await house.intake.send(ME, chat.id, "one")
    await house.work()
    again = await house.intake.regenerate(ME, chat.id, first.message_id)
    assert again.user_message_id is None
    await house.work()
    view = await house.reading.get_chat(ME, chat.id)
    answers = [message for message in view.messages if message.role is Role.ASSISTANT]
    assert [answer.id for answer in answers] == [first.message_id, again.message_id]
    assert {answer.parent_id for answer in answers} == {first.user_message_id}
    assert house.asked[0].messages == house.asked[1].messages
    with pytest.raises(InvalidInput):
        await house.intake.regenerate(ME, chat.id, str(first.user_message_id))
    with pytest.raises(NotFound):
        await house.intake.regenerate(ME, chat.id, old_id())


async def test_a_failed_answer_can_be_tried_again(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    first = await house.intake.send(ME, chat.id, "please fail")
    assert (await house.work()).state is RunState.FAILED
    again = await house.intake.regenerate(ME, chat.id, first.message_id)
    assert [run.id for run in house.queue] == [again.task_id]


@pytest.mark.parametrize("text", ["", " \n\t", "x" * 101, "a\0b", "half \ud83d of it"])
async def test_a_message_that_cannot_be_kept_leaves_nothing(
    text: str, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    async with make_house(redis_url, database_url, tmp_path, max_message=100) as house:
        chat = await house.intake.create_chat(ME)
        with pytest.raises(InvalidInput):
            await house.intake.send(ME, chat.id, text, key="key")
        await nothing_came_of_it(house, chat.id, database_url)
        assert await house.journal.find_key(ME.owner_id, "key") is None


async def nothing_came_of_it(house: House, chat_id: str, database_url: str) -> None:
    assert house.queue == []
    assert [record.kind for record in await house.journal.kept(chat_id)] == ["chat"]
    assert rows(database_url, "messages") == rows(database_url, "runs") == 0


async def test_what_belongs_to_nobody_or_to_somebody_else_is_not_found(house: House, database_url: str) -> None:
    chat, other = await house.intake.create_chat(ME), await house.intake.create_chat(ME)
    elsewhere = await house.intake.send(ME, other.id, "elsewhere")
    await house.work()
    messages, runs = rows(database_url, "messages"), rows(database_url, "runs")
    for caller, chat_id, parent_id in [
        (ME, old_id(), None),
        (ME, "no-id", None),
        (STRANGER, chat.id, None),
        (STRANGER, other.id, elsewhere.message_id),
        (ME, chat.id, elsewhere.message_id),
        (ME, chat.id, old_id()),
        (ME, chat.id, "no-id"),
    ]:
        with pytest.raises(NotFound):
            await house.intake.send(caller, chat_id, "hello", parent_id=parent_id)
    for verb in (
        house.intake.regenerate(STRANGER, other.id, elsewhere.message_id),
        house.intake.regenerate(ME, chat.id, elsewhere.message_id),
        house.intake.rename_chat(STRANGER, chat.id, "Mine now"),
        house.intake.delete_chat(STRANGER, chat.id),
        house.intake.delete_chat(ME, old_id()),
        house.intake.cancel(STRANGER, elsewhere.task_id),
        house.intake.cancel(ME, old_id()),
        house.intake.cancel(ME, "no-id"),
        house.reading.get_chat(STRANGER, chat.id),
        house.reading.run_view(STRANGER, elsewhere.task_id),
        house.reading.may_read(STRANGER, elsewhere.task_id),
        house.reading.active_task(STRANGER, other.id),
        house.reading.owner_of(old_id()),
    ):
        with pytest.raises(NotFound):
            await verb
    assert (rows(database_url, "messages"), rows(database_url, "runs")) == (messages, runs)
    assert house.queue == []
    assert (await house.reading.list_chats(STRANGER)).items == []
    assert await house.reading.active_tasks(STRANGER) == []


# --- one answer ----------------------------------------------------------------------------------


async def test_of_ten_messages_at_once_one_is_taken(house: House, database_url: str) -> None:
    chat = await house.intake.create_chat(ME)
    outcomes = await asyncio.gather(
        *(house.intake.send(ME, chat.id, f"message {number}") for number in range(10)), return_exceptions=True
    )
    taken = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, ChatBusy)]
    assert (len(taken), len(refused)) == (1, 9)
    assert {error.extra["task_id"] for error in refused} == {taken[0].task_id}
    assert [run.id for run in house.queue] == [taken[0].task_id]
    await eventually(lambda: (rows(database_url, "messages"), rows(database_url, "runs")) == (2, 1))


async def test_of_ten_messages_through_two_processes_one_is_taken(
    house: House, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    # Another host: nothing but PostgreSQL and Redis in common.
    async with make_house(redis_url, database_url, tmp_path / "other") as other:
        chat = await house.intake.create_chat(ME)
        houses = [house, other] * 5
        outcomes = await asyncio.gather(
            *(each.intake.send(ME, chat.id, "hello") for each in houses), return_exceptions=True
        )
        kinds = sorted(type(outcome).__name__ for outcome in outcomes)
        assert kinds == ["Accepted"] + ["ChatBusy"] * 9
        assert len(house.queue) + len(other.queue) == 1
        await eventually(lambda: rows(database_url, "runs") == 1)


async def test_the_same_key_ten_times_at_once_is_one_run(house: House, database_url: str) -> None:
    chat = await house.intake.create_chat(ME)
    outcomes = await asyncio.gather(*(house.intake.send(ME, chat.id, "hello", key="once") for _ in range(10)))
    assert len(set(outcomes)) == 1
    assert len(house.queue) == 1
    await eventually(lambda: rows(database_url, "runs") == 1)
    await house.work()
    assert await house.intake.send(ME, chat.id, "hello", key="once") == outcomes[0], "also after the end"


async def test_the_same_key_is_known_on_a_host_with_another_journal(
    house: House, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    chat = await house.intake.create_chat(ME)
    first = await house.intake.send(ME, chat.id, "hello", key="once")
    async with make_house(redis_url, database_url, tmp_path / "other") as other:
        assert await other.intake.send(ME, chat.id, "hello", key="once") == first
        with pytest.raises(KeyReused):
            await other.intake.send(ME, chat.id, "something else", key="once")
        assert other.queue == []


async def test_the_same_key_on_two_hosts_at_once_is_one_run(
    house: House, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    async with make_house(redis_url, database_url, tmp_path / "other") as other:
        chat = await house.intake.create_chat(ME)
        outcomes = await asyncio.gather(
            *(each.intake.send(ME, chat.id, "hello", key="once") for each in [house, other] * 5)
        )
        assert len(set(outcomes)) == 1
        assert len(house.queue) + len(other.queue) == 1
        await eventually(lambda: rows(database_url, "runs") == 1)


async def test_a_key_with_another_request_is_refused(house: House, database_url: str) -> None:
    chat, other = await house.intake.create_chat(ME), await house.intake.create_chat(ME)
    first = await house.intake.send(ME, chat.id, "hello", key="once")
    for verb in (
        house.intake.send(ME, chat.id, "hello!", key="once"),
        house.intake.send(ME, other.id, "hello", key="once"),
        house.intake.send(ME, chat.id, "hello", parent_id=None, key="once"),
        house.intake.regenerate(ME, chat.id, first.message_id, key="once"),
        house.intake.create_chat(ME, key="once"),
    ):
        with pytest.raises(KeyReused):
            await verb
    await eventually(lambda: rows(database_url, "runs") == 1)
    for key in ("", "x" * 256, "a\nb", "a\0b"):
        with pytest.raises(InvalidInput):
            await house.intake.send(ME, other.id, "hello", key=key)


async def test_a_chat_made_twice_with_one_key_is_one_chat(house: House, database_url: str) -> None:
    first = await house.intake.create_chat(ME, title="Trip", key="chat")
    assert (await house.intake.create_chat(ME, title="Trip", key="chat")).id == first.id
    with pytest.raises(KeyReused):
        await house.intake.create_chat(ME, title="Other", key="chat")
    await eventually(lambda: rows(database_url, "chats") == 1)


async def test_a_run_that_ended_in_the_log_does_not_hold_the_chat_up(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    first = await house.intake.send(ME, chat.id, "hello")
    run = house.queue.pop()
    # A worker of another host: its journal has the end, PostgreSQL not yet.
    lease = await house.log.claim(run, "elsewhere")
    said = [Event(EventType.CONTENT, {"text": "Good "}), Event(EventType.CONTENT, {"text": "day"})]
    events = [*said, Event(EventType.DONE, {"finish_reason": "stop"})]
    await house.log.append(lease, [event.stamped(seq, seq) for seq, event in enumerate(events, start=1)])
    second = await house.intake.send(ME, chat.id, "go on")
    assert second.task_id != first.task_id
    await house.work()
    assert [message["content"] for message in house.asked[-1].messages] == ["hello", "Good day", "go on"]


# --- trouble -------------------------------------------------------------------------------------


async def test_without_postgresql_a_message_is_taken_and_arrives_later(
    redis_url: str, database_url: str, tmp_path: Path, postgres_server: Postgres
) -> None:
    async with make_house(redis_url, database_url, tmp_path, db_wait=0.6) as house:
        await house.intake.create_chat(ME, title="Older")
        chat = await house.intake.create_chat(ME, title="Trip")
        await house.intake.send(ME, chat.id, "before")
        await house.work()
        await synced(house)
        first_page = await house.reading.list_chats(ME, limit=1)
        with frozen(postgres_server.pid):
            accepted = await asyncio.wait_for(house.intake.send(ME, chat.id, "meanwhile", key="once"), 60)
            assert await house.intake.send(ME, chat.id, "meanwhile", key="once") == accepted
            with pytest.raises(ChatBusy):
                await house.intake.send(ME, chat.id, "another")
            with pytest.raises(KeyReused):
                await house.intake.send(ME, chat.id, "another", key="once")
            with pytest.raises(NotFound):
                await house.intake.send(STRANGER, chat.id, "hello")
            with pytest.raises(StoreUnavailable):
                await house.intake.send(ME, new_id(), "hello")
            assert (await house.work()).state is RunState.DONE
            assert [message["content"] for message in house.asked[-1].messages][-1] == "meanwhile"
            assert house.asked[-1].messages[0]["content"] == "before", "the journal remembers the branch"
            view = await house.reading.get_chat(ME, chat.id)
            assert view.degraded
            assert view.messages[-1].content == "You said: meanwhile"
            page = await house.reading.list_chats(ME)
            assert page.degraded
            assert [item.title for item in page.items] == ["Trip", "Older"]
            assert (await house.reading.run_view(ME, accepted.task_id)).state is RunState.DONE
            assert await house.reading.owner_of(accepted.task_id) == ME.owner_id
            fresh = await house.intake.create_chat(ME)
            await house.intake.send(ME, fresh.id, "in a new chat")
            with pytest.raises(StoreUnavailable):
                await house.intake.delete_chat(ME, chat.id)
            with pytest.raises(StoreUnavailable):
                await house.reading.list_chats(ME, after=first_page.next)
        await synced(house)
        messages = await house.store.chats.messages(ME.owner_id, chat.id)
        assert [message.content for message in messages] == [
            "before",
            "You said: before",
            "meanwhile",
            "You said: meanwhile",
        ]
        assert len(await house.store.chats.messages(ME.owner_id, fresh.id)) == 2


async def test_postgresql_lost_between_journal_and_commit_loses_nothing(
    redis_url: str, database_url: str, tmp_path: Path, postgres_server: Postgres
) -> None:
    async with make_house(redis_url, database_url, tmp_path, db_wait=0.6) as house:
        chat = await house.intake.create_chat(ME)
        add = house.journal.add
        freezer = frozen(postgres_server.pid)

        async def add_and_freeze(*arguments: object) -> object:
            house.journal.add = add  # type: ignore[method-assign]
            added = await add(*arguments)  # type: ignore[arg-type]
            freezer.__enter__()
            return added

        # A failpoint: the moment cannot be met from outside.
        house.journal.add = add_and_freeze  # type: ignore[method-assign, assignment]
        try:
            accepted = await house.intake.send(ME, chat.id, "hello")
        finally:
            freezer.__exit__(None, None, None)
        assert [run.id for run in house.queue] == [accepted.task_id]
        await synced(house)
        assert await house.store.runs.get(accepted.task_id) is not None


async def test_without_redis_a_message_is_taken(database_url: str, redis_url: str, tmp_path: Path) -> None:
    away = streams.connect(f"redis://127.0.0.1:{free_port()}/0")
    try:
        async with make_house(redis_url, database_url, tmp_path, intake_log=away) as house:
            chat = await house.intake.create_chat(ME)
            accepted = await house.intake.send(ME, chat.id, "hello")
            assert [run.id for run in house.queue] == [accepted.task_id]
            with pytest.raises(ChatBusy):
                await house.intake.send(ME, chat.id, "another")
            with pytest.raises(NotFound):
                await house.intake.cancel(STRANGER, accepted.task_id)
            assert (await house.intake.cancel(ME, accepted.task_id)).status == CANCELLING
            assert await house.journal.cancels(10) == [accepted.task_id], "a promise that outlives the process"
            await house.journal.drop_cancels([accepted.task_id])
            assert (await house.reading.run_view(ME, accepted.task_id)).state is RunState.QUEUED
            assert (await house.work()).state is RunState.DONE
            await house.intake.send(ME, chat.id, "another")
    finally:
        await away.close()


async def test_who_waits_for_redis_keeps_no_connection_to_postgresql_from_others(
    redis_url: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headwater.intake.turns.LOG_WAIT", 120)
    both = asyncio.Barrier(2)
    async with make_house(redis_url, database_url, tmp_path, db_pool_size=1) as house:
        chats = [await house.intake.create_chat(ME) for _ in range(2)]
        await synced(house)
        opened = house.log.open

        async def slow(run: Run, grace: float) -> None:
            await both.wait()
            await opened(run, grace)

        monkeypatch.setattr(house.log, "open", slow)
        async with asyncio.timeout(90):
            await asyncio.gather(*(house.intake.send(ME, chat.id, "hello") for chat in chats))
        await eventually(lambda: rows(database_url, "runs") == 2)
    assert "PostgreSQL" not in caplog.text


async def test_a_run_that_another_process_begins_while_the_chat_is_looked_at_is_not_overlooked(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = await house.intake.create_chat(ME)
    await synced(house)
    begun = new_run("chat", owner_id=ME.owner_id, chat_id=chat.id)
    read = journal_rows.unsynced_of

    def read_too_early(connection: apsw.Connection, field: Field, value: str) -> Any:
        found = read(connection, field, value)
        with closing(apsw.Connection(connection.filename)) as other, other:
            journal_rows.add(other, [journal_rows.encoded(Record.of(begun), 1)], None, 1)
        monkeypatch.undo()
        return found

    monkeypatch.setattr(journal_rows, "unsynced_of", read_too_early)
    with pytest.raises(ChatBusy) as busy:
        await house.intake.send(ME, chat.id, "hello")
    assert busy.value.extra["task_id"] == begun.id


async def test_of_ten_messages_through_two_processes_without_postgresql_one_is_taken(
    redis_url: str, database_url: str, tmp_path: Path, postgres_server: Postgres
) -> None:
    async with (
        make_house(redis_url, database_url, tmp_path, db_wait=0.6) as house,
        make_house(redis_url, database_url, tmp_path, db_wait=0.6) as other,
    ):
        chat = await house.intake.create_chat(ME)
        await house.intake.send(ME, chat.id, "before")
        await house.work()
        await synced(house)
        with frozen(postgres_server.pid):
            outcomes = await asyncio.gather(
                *(each.intake.send(ME, chat.id, f"hello {n}") for n, each in enumerate([house, other] * 5)),
                return_exceptions=True,
            )
            taken = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
            refused = [outcome for outcome in outcomes if isinstance(outcome, ChatBusy)]
            assert (len(taken), len(refused)) == (1, 9), outcomes
            assert {error.extra["task_id"] for error in refused} == {taken[0].task_id}
            assert [run.id for run in (*house.queue, *other.queue)] == [taken[0].task_id]
            left = other if other.queue else house
            assert (await left.work()).state is RunState.DONE
            await house.intake.send(ME, chat.id, "and the next")
        await synced(house)
        await eventually(lambda: rows(database_url, "runs") == 3)


async def test_a_run_whose_server_died_without_postgresql_is_found_by_another(
    redis_url: str, database_url: str, tmp_path: Path, postgres_server: Postgres
) -> None:
    async with make_house(redis_url, database_url, tmp_path, db_wait=0.6) as house:
        chat = await house.intake.create_chat(ME)
        await synced(house)
        with frozen(postgres_server.pid):
            accepted = await house.intake.send(ME, chat.id, "hello", key="once")
            # What is left of a server that died before it announced and enqueued.
            await house.log.forget(accepted.task_id)
            run = house.queue.pop()
            assert await eventually(lambda: house.overlay.unfinished(older_than=0, limit=10)) == [run]
            # A client that repeats its request need not wait for the sweeper.
            assert await house.intake.send(ME, chat.id, "hello", key="once") == accepted
            assert house.queue == [run]
            assert (await house.work()).state is RunState.DONE
            assert await house.intake.send(ME, chat.id, "hello", key="once") == accepted
            assert house.queue == [], "what has ended is not rung for"
            with pytest.raises(StoreUnavailable):
                await house.overlay.unfinished(older_than=0, limit=10)


async def test_a_full_disk_refuses_before_anything_is_accepted(house: House, database_url: str) -> None:
    chat = await house.intake.create_chat(ME)
    add = house.journal.add

    async def full(*arguments: object) -> object:
        raise unavailable("The journal cannot grow.", "storage_full")

    house.journal.add = full  # type: ignore[method-assign, assignment]
    for verb in (house.intake.send(ME, chat.id, "hello", key="once"), house.intake.create_chat(ME)):
        with pytest.raises(JournalUnavailable):
            await verb
    house.journal.add = add  # type: ignore[method-assign]
    await nothing_came_of_it(house, chat.id, database_url)
    assert await house.reading.active_task(ME, chat.id) is None
    await house.intake.send(ME, chat.id, "hello", key="once")


async def test_what_only_the_journal_has_is_read_and_used(house: House, database_url: str) -> None:
    await house.syncer.stop()
    chat = await house.intake.create_chat(ME, title="Fresh")
    assert rows(database_url, "chats") == 0
    assert [item.id for item in (await house.reading.list_chats(ME)).items] == [chat.id]
    assert (await house.reading.list_chats(ME, query="FRE")).items
    assert not (await house.reading.list_chats(ME, query="old")).items
    assert (await house.reading.get_chat(ME, chat.id)).chat == chat
    with pytest.raises(NotFound):
        await house.reading.get_chat(STRANGER, chat.id)
    assert await house.reading.active_task(ME, chat.id) is None
    with pytest.raises(NotFound):
        await house.reading.active_task(STRANGER, chat.id)
    accepted = await house.intake.send(ME, chat.id, "hello")
    assert [run.id for run in await house.reading.active_tasks(ME)] == [accepted.task_id]
    await house.work()
    assert await house.reading.active_tasks(ME) == []
    view = await house.reading.get_chat(ME, chat.id)
    assert view.messages[-1].content == "You said: hello", "the answer is in the journal alone"
    await house.intake.send(ME, chat.id, "and?")
    await house.work()
    assert house.asked[-1].messages[1]["content"] == "You said: hello"


# --- stopping ------------------------------------------------------------------------------------


async def test_a_queued_run_is_cancelled_at_once(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    accepted = await house.intake.send(ME, chat.id, "hello")
    stopped = await house.intake.cancel(ME, accepted.task_id)
    assert (stopped.task_id, stopped.status, stopped.ended) == (accepted.task_id, "cancelled", True)
    page = await house.log.read(accepted.task_id, 0, 10)
    assert page is not None
    assert page.events[-1].type is EventType.CANCELLED
    run = house.queue.pop()
    assert await house.runner.execute(run, "late") is None, "a worker that comes late finds it ended"
    assert house.asked == []
    answer = (await house.reading.get_chat(ME, chat.id)).messages[-1]
    assert answer.status is MessageStatus.CANCELLED
    assert (await house.intake.cancel(ME, accepted.task_id)).status == "cancelled"
    await house.intake.send(ME, chat.id, "next")


async def test_a_run_that_is_answering_is_cancelled_by_its_worker(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    accepted = await house.intake.send(ME, chat.id, "wait")
    working = house.begin()
    await eventually(lambda: house.asked)
    first = await house.intake.cancel(ME, accepted.task_id)
    assert (first.status, first.ended) == (CANCELLING, False)
    ended = await working
    assert ended is not None
    assert ended.state is RunState.CANCELLED
    assert (await house.intake.cancel(ME, accepted.task_id)).status == "cancelled"
    answer = (await house.reading.get_chat(ME, chat.id)).messages[-1]
    assert (answer.content, answer.status) == ("You said: ", MessageStatus.CANCELLED)


async def test_a_run_that_ended_stays_as_it_ended(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    accepted = await house.intake.send(ME, chat.id, "hello")
    await house.work()
    assert (await house.intake.cancel(ME, accepted.task_id)).status == "done"
    await synced(house)
    await house.log.forget(accepted.task_id)
    assert (await house.intake.cancel(ME, accepted.task_id)).status == "done", "also when only the store knows"


async def test_a_run_that_redis_forgot_is_cancelled_by_its_row(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    accepted = await house.intake.send(ME, chat.id, "hello")
    await house.log.forget(accepted.task_id)
    assert (await house.intake.cancel(ME, accepted.task_id)).status == "cancelled"


# --- chats as wholes -----------------------------------------------------------------------------


async def test_a_chat_is_renamed_and_stays_so(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    assert (await house.intake.rename_chat(ME, chat.id, "  My \n trip ")).title == "My trip"
    await house.intake.send(ME, chat.id, "hello")
    await house.work()
    await synced(house)
    assert (await house.reading.get_chat(ME, chat.id)).chat.title == "My trip"
    for title in ("", " \n", "x" * 201, "a\0b", "\ud83d"):
        with pytest.raises(InvalidInput):
            await house.intake.rename_chat(ME, chat.id, title)
        with pytest.raises(InvalidInput):
            await house.intake.create_chat(ME, title=title)


async def test_a_title_that_postgresql_took_is_taken_though_the_journal_is_full(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    await synced(house)

    async def full(*arguments: object) -> object:
        raise unavailable("The journal cannot grow.", "storage_full")

    house.journal.add = full  # type: ignore[method-assign, assignment]
    assert (await house.intake.rename_chat(ME, chat.id, "My trip")).title == "My trip"
    assert (await house.reading.get_chat(ME, chat.id)).chat.title == "My trip"


async def test_a_deletion_that_broke_off_is_ended_when_it_is_asked_for_again(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    await synced(house)
    forget = house.journal.forget

    async def full(chat_id: str) -> int:
        raise unavailable("The journal cannot grow.", "storage_full")

    house.journal.forget = full  # type: ignore[method-assign]
    with pytest.raises(JournalUnavailable):
        await house.intake.delete_chat(ME, chat.id)
    house.journal.forget = forget  # type: ignore[method-assign]
    for caller, left in ((STRANGER, 1), (ME, 0)):
        with pytest.raises(NotFound):
            await house.intake.delete_chat(caller, chat.id)
        assert len(await house.journal.kept(chat.id)) == left


async def test_deleting_a_chat_stops_its_answer_and_removes_every_trace(house: House, database_url: str) -> None:
    chat = await house.intake.create_chat(ME)
    old = await house.intake.send(ME, chat.id, "old")
    await house.work()
    accepted = await house.intake.send(ME, chat.id, "wait")
    working = house.begin()
    await eventually(lambda: len(house.asked) == 2)
    await house.intake.delete_chat(ME, chat.id)
    ended = await working
    assert ended is not None
    assert ended.state is RunState.CANCELLED
    await synced(house)
    with pytest.raises(NotFound):
        await house.reading.get_chat(ME, chat.id)
    assert (await house.reading.list_chats(ME)).items == []
    assert rows(database_url, "messages") == rows(database_url, "runs") == 0
    assert await house.log.metas([old.task_id, accepted.task_id]) == [None, None]
    assert await house.journal.kept(chat.id) == []
    for verb in (house.intake.send(ME, chat.id, "hello"), house.intake.delete_chat(ME, chat.id)):
        with pytest.raises(NotFound):
            await verb


async def test_deleting_a_chat_removes_what_only_the_journal_had(house: House, database_url: str) -> None:
    await house.syncer.stop()
    chat = await house.intake.create_chat(ME)
    await house.intake.send(ME, chat.id, "hello")
    await house.intake.delete_chat(ME, chat.id)
    assert (await house.reading.list_chats(ME)).items == []
    assert await house.journal.kept(chat.id) == []
    await house.syncer.sync()
    assert rows(database_url, "messages") == rows(database_url, "runs") == 0
    assert (await house.reading.list_chats(ME)).items == []
    assert await house.reading.active_tasks(ME) == []


# --- lists ---------------------------------------------------------------------------------------


async def test_a_list_shows_each_chat_once_though_some_are_not_stored_yet(house: House) -> None:
    stored = [await house.intake.create_chat(ME, title=f"chat {number}") for number in range(5)]
    await synced(house)
    await house.syncer.stop()
    fresh = await house.intake.create_chat(ME, title="fresh")
    # Newer in the journal than in its row.
    moved = replace(stored[0], updated_at=fresh.updated_at + 1, version=2)
    await house.journal.add([Record.of(moved)])
    seen: list[Chat] = []
    after: str | None = None
    while True:
        page = await house.reading.list_chats(ME, after=after, limit=2)
        seen += page.items
        after = page.next
        if after is None:
            break
    assert [chat.id for chat in seen] == [moved.id, fresh.id, *(chat.id for chat in reversed(stored[1:]))]


async def test_a_task_shows_what_its_log_says(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    accepted = await house.intake.send(ME, chat.id, "hello")
    run = house.queue.pop()
    await house.log.claim(run, "elsewhere")
    view = await house.reading.run_view(ME, accepted.task_id)
    assert (view.state, view.attempt) == (RunState.RUNNING, 1)
    stored = await house.store.runs.get(accepted.task_id)
    assert stored is not None
    assert stored.state is RunState.QUEUED


async def test_a_refused_record_does_not_hold_up_the_chat(house: House) -> None:
    chat = await house.intake.create_chat(ME)
    await synced(house)
    await house.syncer.stop()
    bad = Message(new_id(), chat.id, ME.owner_id, Role.USER, "a\0b", 1)
    await house.journal.add([Record.of(bad)])
    accepted = await house.intake.send(ME, chat.id, "hello")
    assert isinstance(await house.store.runs.get(accepted.task_id), Run)
