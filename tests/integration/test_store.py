"""The store over a real PostgreSQL: versions, tombstones, turns, pages, and trouble that has a name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest
import pytest_asyncio

from headwater.clock import SystemClock
from headwater.dev.services import Postgres
from headwater.errors import BadCursor, NotFound, RecordRefused, StoreUnavailable
from headwater.ids import new_id
from headwater.messages import Chat, Message, MessageStatus, Role
from headwater.records import Record
from headwater.runs import Priority, Run, RunState
from headwater.store import Store
from support.own_postgres import OwnPostgres
from support.wait import eventually

AT = 1_767_225_600_123


def a_chat(at: int = AT, title: str | None = None, owner_id: str = "local") -> Chat:
    return Chat(new_id(), owner_id, at, at, title)


def a_message(chat: Chat, content: str = "hello", at: int = AT, **more: Any) -> Message:
    return Message(new_id(), chat.id, chat.owner_id, more.pop("role", Role.USER), content, at, **more)


def a_run(chat: Chat | None = None, at: int = AT, **more: Any) -> Run:
    chat_id = chat.id if chat else None
    return Run(new_id(), "chat", "local", {"prompt": "hello", "list": [1, None]}, at, chat_id=chat_id, **more)


def make_store(url: str, *, pool_size: int = 3, wait: float = 5.0) -> Store:
    return Store(url, pool_size=pool_size, wait=wait, clock=SystemClock())


async def put(store: Store, *things: Chat | Message | Run) -> None:
    await store.apply([Record.of(thing) for thing in things])


@pytest.fixture(scope="module")
def one_database(postgres_server: Postgres, template_database: str) -> Iterator[str]:
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "store" TEMPLATE "{template_database}"'.encode())
        yield postgres_server.url("store")
        connection.execute('DROP DATABASE "store" WITH (FORCE)')


@pytest.fixture
def database_url(one_database: str) -> str:
    """One database for all tests here, emptied: making one for each takes longer than the tests."""
    with psycopg.connect(one_database) as connection:
        connection.execute("TRUNCATE chats, messages, runs")
    return one_database


@pytest_asyncio.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    store = make_store(database_url)
    yield store
    await store.close()


# --- rows ---------------------------------------------------------------------------------------


async def test_what_is_applied_is_read_back_as_it_was(store: Store) -> None:
    chat = a_chat(title="A title")
    question = a_message(chat, "question ✓ \\ ' \" \u2028")
    run = replace(
        a_run(chat, message_id=new_id(), idempotency_key="key", fingerprint="print").started(2, AT + 1),
        stage="draw",
        progress=0.25,
    ).ended(RunState.FAILED, AT + 2, error={"code": "deadline"}, usage={"total_tokens": 3})
    answer = a_message(
        chat,
        "answer",
        AT + 5,
        role=Role.ASSISTANT,
        status=MessageStatus.FAILED,
        parent_id=question.id,
        reasoning="because",
        run_id=run.id,
        model="a model",
        usage={"total_tokens": 3, "estimated": True},
        error={"code": "deadline", "message": "too long"},
        version=run.version,
    )
    await put(store, chat, question, answer, run)

    assert await store.chats.get("local", chat.id) == replace(chat, updated_at=AT + 5)
    assert await store.chats.messages("local", chat.id) == [question, answer]
    assert await store.chats.message(answer.id) == answer
    assert await store.runs.get(run.id) == run


async def test_applying_nothing_or_the_same_again_changes_nothing(store: Store) -> None:
    chat, run = a_chat(), a_run()
    message = a_message(chat)
    await store.apply([])
    for _ in range(2):
        await put(store, chat, message, run, run, message)
    assert await store.chats.messages("local", chat.id) == [message]
    assert await store.runs.get(run.id) == run


async def test_a_higher_version_wins_in_whatever_order_it_comes(store: Store) -> None:
    chat = a_chat()
    queued = a_run(chat)
    first = queued.started(1, AT + 1)
    zombie = first.ended(RunState.DONE, AT + 9)
    second = first.started(2, AT + 5)

    await put(store, chat, queued, second)
    await put(store, zombie)
    await put(store, first, queued)
    assert await store.runs.get(queued.id) == second

    ended = second.ended(RunState.CANCELLED, AT + 7)
    # Several versions of one row in one batch.
    await put(store, second, ended, zombie, queued)
    assert await store.runs.get(queued.id) == ended


async def test_a_zombies_answer_changes_nothing(store: Store) -> None:
    chat = a_chat()
    open_answer = a_message(chat, "", role=Role.ASSISTANT, status=MessageStatus.PROCESSING)
    final = replace(open_answer, content="of attempt 2", status=MessageStatus.DONE, version=10)
    late = replace(open_answer, content="of attempt 1", status=MessageStatus.FAILED, version=6)
    await put(store, chat, open_answer)
    await put(store, final)
    await put(store, late)
    await put(store, open_answer)
    assert await store.chats.message(final.id) == final


async def test_a_row_is_never_taken_over_by_another_owner(store: Store) -> None:
    chat, run = a_chat(), a_run()
    message = a_message(chat)
    await put(store, chat, message, run)
    await put(
        store,
        replace(chat, owner_id="thief", title="mine", version=9),
        replace(message, owner_id="thief", content="mine", version=9),
        replace(run, owner_id="thief").started(3, AT),
    )
    assert await store.chats.get("local", chat.id) == chat
    assert await store.chats.message(message.id) == message
    assert await store.runs.get(run.id) == run


async def test_records_may_come_before_their_chat(store: Store) -> None:
    chat = a_chat()
    message, run = a_message(chat, at=AT + 1), a_run(chat)
    await put(store, run, message)
    await put(store, chat)
    assert await store.chats.messages("local", chat.id) == [message]
    assert await store.runs.active_in(chat.id) == [run]


async def test_a_message_makes_its_chat_recent_without_touching_its_version(store: Store) -> None:
    chat = a_chat()
    await put(store, chat)
    await put(store, a_message(chat, at=AT + 500), a_message(chat, at=AT + 100))
    await put(store, a_message(chat, at=AT + 200))
    assert await store.chats.get("local", chat.id) == replace(chat, updated_at=AT + 500)


async def test_a_title_is_filled_once_and_a_rename_wins(store: Store) -> None:
    untitled, renamed = a_chat(), a_chat()
    await put(store, untitled, renamed)
    await store.chats.rename("local", renamed.id, "Mine", AT + 1)
    for chat in (untitled, renamed):
        await put(store, replace(chat, title="From the first message", version=2))

    assert (await store.chats.get("local", untitled.id)).title == "From the first message"
    assert (await store.chats.get("local", renamed.id)).title == "Mine"

    again = await store.chats.rename("local", untitled.id, "Mine too", AT + 2)
    assert (again.title, again.version, again.updated_at) == ("Mine too", 3, AT + 2)
    await put(store, replace(untitled, title="Late", version=9))
    assert (await store.chats.get("local", untitled.id)).title == "Mine too"


async def test_a_rename_never_makes_a_chat_older(store: Store) -> None:
    chat = a_chat()
    await put(store, chat)
    assert (await store.chats.rename("local", chat.id, "New", AT - 1000)).updated_at == AT


async def test_batches_that_overlap_do_not_block_each_other_for_ever(store: Store) -> None:
    chats = [a_chat() for _ in range(20)]
    things: list[Chat | Message | Run] = [*chats]
    for chat in chats:
        things += [a_message(chat), a_run(chat)]
    orders = [things, things[::-1], things[30:] + things[:30], things[10:50] + things[:10]]
    await asyncio.gather(*(put(store, *order) for order in orders for _ in range(5)))
    listed, _ = await store.chats.list("local", after=None, limit=100)
    assert len(listed) == 20


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: replace(record, data={**record.data, "content": "nul \0"}),
        lambda record: replace(record, data={**record.data, "content": "half \ud800"}),
        lambda record: replace(record, data={**record.data, "usage": {"nul": "\0"}}),
        lambda record: replace(record, data={**record.data, "created_at": 10**18}),
        lambda record: replace(record, data={**record.data, "parent_id": "not an id"}),
        lambda record: replace(record, data={**record.data, "role": "hologram"}),
        lambda record: replace(record, data={**record.data, "content": None}),
        lambda record: replace(record, data={**record.data, "owner_id": "other"}),
        lambda record: replace(record, data={**record.data, "chat_id": "not an id"}),
        lambda record: replace(record, data={**record.data, "chat_id": 7}),
        lambda record: replace(record, data={**record.data, "usage": object()}),
        lambda record: replace(record, data={}),
        lambda record: replace(record, data=[]),
        lambda record: replace(record, version=2**40),
        lambda record: replace(record, id="not an id"),
    ],
)
async def test_data_that_can_never_be_stored_is_refused_whole(store: Store, spoil: Any) -> None:
    chat = a_chat()
    good, bad = a_message(chat), a_message(chat)
    await put(store, chat)
    with pytest.raises(RecordRefused):
        await store.apply([Record.of(good), spoil(Record.of(bad))])

    assert await store.chats.messages("local", chat.id) == []
    await put(store, good)
    assert await store.chats.messages("local", chat.id) == [good]


async def test_a_schema_that_is_not_there_is_no_reason_to_refuse_data(postgres_server: Postgres) -> None:
    store = make_store(postgres_server.url("postgres"))
    try:
        with pytest.raises(StoreUnavailable, match="headwater db upgrade"):
            await put(store, a_chat())
    finally:
        await store.close()


# --- chats --------------------------------------------------------------------------------------


async def test_what_belongs_to_another_owner_is_not_found(store: Store) -> None:
    chat = a_chat(owner_id="somebody")
    await put(store, chat, a_message(chat))

    for owner_id, chat_id in (("local", chat.id), ("somebody", new_id()), ("somebody", "no id"), ("a\0b", chat.id)):
        with pytest.raises((NotFound, RecordRefused)):
            await store.chats.get(owner_id, chat_id)
    with pytest.raises(NotFound):
        await store.chats.rename("local", chat.id, "mine", AT)
    with pytest.raises(NotFound):
        await store.chats.delete("local", chat.id, AT)
    with pytest.raises(NotFound):
        async with store.turn("local", chat.id):
            pytest.fail("a turn in another's chat")
    assert await store.chats.messages("local", chat.id) == []
    assert await store.chats.list("local", after=None, limit=10) == ([], None)
    assert len(await store.chats.messages("somebody", chat.id)) == 1


async def test_ids_that_are_none_find_nothing(store: Store) -> None:
    assert await store.chats.message("no id") is None
    assert await store.chats.messages("local", "no id") == []
    assert await store.runs.get("no id") is None
    assert await store.runs.active_in("no id") == []
    for call in (store.chats.rename("local", "x", "t", AT), store.chats.delete("local", "x", AT)):
        with pytest.raises(NotFound):
            await call


async def test_pages_give_every_chat_once_also_when_times_are_equal(store: Store) -> None:
    chats = [a_chat(at=AT + number // 4) for number in range(18)]
    await put(store, *chats)
    expected = sorted(chats, key=lambda chat: (chat.updated_at, chat.id), reverse=True)

    for limit in (1, 4, 5, 18, 19):
        seen: list[Chat] = []
        after: str | None = None
        while True:
            page, after = await store.chats.list("local", after=after, limit=limit)
            assert len(page) == min(limit, 18 - len(seen))
            seen += page
            if after is None:
                break
        assert seen == expected


async def test_a_chat_that_becomes_recent_between_pages_hides_no_other(store: Store) -> None:
    chats = [a_chat(at=AT + number) for number in range(6)]
    await put(store, *chats)
    first, after = await store.chats.list("local", after=None, limit=3)
    await put(store, a_message(chats[0], at=AT + 99))
    second, _ = await store.chats.list("local", after=after, limit=3)
    assert {chat.id for chat in first + second} == {chat.id for chat in chats[1:]}


@pytest.mark.parametrize("token", ["", "x", "!!!", "MTIz", "YWJjLmRlZg", "é", "9" * 400])
async def test_a_token_that_no_list_gave_is_a_bad_cursor(store: Store, token: str) -> None:
    with pytest.raises(BadCursor):
        await store.chats.list("local", after=token, limit=3)


async def test_the_search_takes_every_character_as_itself(store: Store) -> None:
    titles = ["100% sure", "under_score", "back\\slash", "a/b", "Großes ÄPFEL", "plain"]
    await put(store, *(a_chat(title=title) for title in titles), a_chat(title=None))

    async def found(query: str) -> set[str | None]:
        return {chat.title for chat in (await store.chats.list("local", after=None, limit=50, query=query))[0]}

    assert await found("%") == {"100% sure"}
    assert await found("_") == {"under_score"}
    assert await found("\\") == {"back\\slash"}
    assert await found("/") == {"a/b"}
    assert await found("äpfel") == {"Großes ÄPFEL"}
    assert await found("PLAIN") == {"plain"}
    assert await found("nothing like it") == set()
    assert await found("nul \0") == set()
    assert await found("half \ud800") == set()
    assert await found("") == {*titles, None}


async def test_a_search_has_pages_too(store: Store) -> None:
    await put(store, *(a_chat(at=AT + number, title=f"{'even' if number % 2 == 0 else 'odd'}") for number in range(10)))
    page, after = await store.chats.list("local", after=None, limit=3, query="even")
    rest, end = await store.chats.list("local", after=after, limit=3, query="even")
    assert [chat.title for chat in page + rest] == ["even"] * 5
    assert end is None


async def test_messages_are_in_the_order_of_time_and_then_of_ids(store: Store) -> None:
    chat = a_chat()
    same = [a_message(chat, str(number)) for number in range(5)]
    early = a_message(chat, "early", at=AT - 1)
    await put(store, chat, *same[::-1], early)
    assert await store.chats.messages("local", chat.id) == [early, *same]


# --- deletion -----------------------------------------------------------------------------------


async def test_a_deleted_chat_is_gone_and_late_records_stay_out(store: Store, database_url: str) -> None:
    chat, other = a_chat(title="a secret"), a_chat()
    message, run = a_message(chat), a_run(chat)
    await put(store, chat, message, run, other, a_message(other), a_run(other))
    await store.chats.delete("local", chat.id, AT + 1)

    late = a_message(chat, "late")
    await put(
        store,
        replace(chat, title="again", version=99),
        replace(message, version=99),
        late,
        run.started(5, AT),
        a_run(chat),
        a_message(other, "of the other one"),
    )

    with pytest.raises(NotFound):
        await store.chats.get("local", chat.id)
    with pytest.raises(NotFound):
        await store.chats.rename("local", chat.id, "again", AT)
    with pytest.raises(NotFound):
        await store.chats.delete("local", chat.id, AT)
    assert await store.chats.message(message.id) is None
    assert await store.chats.message(late.id) is None
    assert await store.runs.get(run.id) is None
    assert await store.runs.active_in(chat.id) == []
    listed, _ = await store.chats.list("local", after=None, limit=10)
    assert [one.id for one in listed] == [other.id]
    assert len(await store.chats.messages("local", other.id)) == 2
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT owner_id, title, deleted_at IS NOT NULL FROM chats WHERE id = %s", [chat.id])
        assert row.fetchone() == ("local", None, True)


async def test_a_deletion_and_late_records_at_the_same_time_leave_no_orphans(store: Store, database_url: str) -> None:
    chats = [a_chat() for _ in range(30)]
    await put(store, *chats)
    await asyncio.gather(
        *(store.chats.delete("local", chat.id, AT) for chat in chats),
        *(put(store, a_message(chat), a_run(chat)) for chat in chats),
    )
    with psycopg.connect(database_url) as connection:
        counted = connection.execute("SELECT (SELECT count(*) FROM messages), (SELECT count(*) FROM runs)")
        assert counted.fetchone() == (0, 0)


# --- runs ---------------------------------------------------------------------------------------


async def test_the_active_runs_of_a_chat_are_those_that_have_not_ended_oldest_first(store: Store) -> None:
    chat = a_chat()
    ended = a_run(chat).started(1, AT).ended(RunState.DONE, AT)
    await put(store, chat, ended)
    assert await store.runs.active_in(chat.id) == []
    running = a_run(chat, at=AT + 1).started(1, AT + 2)
    queued = replace(a_run(chat, at=AT + 2), waits_for=(ended.id, running.id), priority=Priority.BACKGROUND)
    await put(store, queued, running)
    assert await store.runs.active_in(chat.id) == [running, queued]


async def test_the_active_runs_of_an_owner_are_of_all_chats_and_jobs(store: Store) -> None:
    one, job = a_run(a_chat(), at=AT + 1), a_run(at=AT)
    foreign = replace(a_run(), owner_id="somebody")
    await put(store, one, job, foreign, a_run().ended(RunState.CANCELLED, AT))
    assert await store.runs.active_of("local") == [job, one]


async def test_a_key_finds_the_earliest_run_of_its_owner(store: Store) -> None:
    later = a_run(at=AT + 1, idempotency_key="key")
    earlier = a_run(at=AT, idempotency_key="key")
    foreign = replace(a_run(at=AT - 1, idempotency_key="key"), owner_id="somebody")
    # Two hosts may have accepted the same key: both are kept.
    chat = a_chat()
    await put(store, chat, later, earlier, foreign)
    async with store.turn("local", chat.id, "key") as turn:
        assert turn.of_key == earlier
    assert await store.runs.get(later.id) == later
    async with store.turn("local", chat.id, "other") as turn:
        assert turn.of_key is None


async def test_unfinished_runs_are_told_by_their_age_oldest_first(store: Store, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SELECT (extract(epoch FROM now()) * 1000)::bigint").fetchone()
    assert row is not None
    now = int(row[0])
    old, older, young = (a_run(at=now - age * 1000) for age in (60, 120, 0))
    ended = a_run(at=now - 300_000).ended(RunState.CANCELLED, now)
    running = a_run(at=now - 90_000).started(1, now)
    await put(store, old, older, young, ended, running)

    assert await store.runs.unfinished(older_than=30, limit=10) == [older, running, old]
    assert await store.runs.unfinished(older_than=30, limit=2) == [older, running]
    assert await store.runs.unfinished(1, older_than=30, limit=1) == [running]
    assert await store.runs.unfinished(older_than=100.5, limit=10) == [older]


# --- turns --------------------------------------------------------------------------------------


async def test_a_turn_sees_the_chat_and_commits_at_its_end(store: Store) -> None:
    chat = a_chat()
    first, second, run = a_message(chat), a_message(chat, at=AT + 1), a_run(chat)
    await put(store, chat, first)
    async with store.turn("local", chat.id) as turn:
        assert turn.chat == chat
        assert turn.active == []
        assert turn.messages == [first]
        assert await store.chats.messages("local", chat.id) == [first]
        await turn.end([Record.of(second), Record.of(run)])
    assert await store.chats.messages("local", chat.id) == [first, second]
    assert await store.runs.active_in(chat.id) == [run]


class Trips:
    """Stands between a store and PostgreSQL, and counts how often one of them waits for the other."""

    def __init__(self, url: str, folder: Path) -> None:
        base, _, there = url.partition("?host=")
        self._there = f"{there}/.s.PGSQL.5432"
        self._here = folder / ".s.PGSQL.5432"
        self.url = f"{base}?host={folder}"
        self.count = 0
        self._asked = False

    @asynccontextmanager
    async def counting(self) -> AsyncIterator[Self]:
        async with await asyncio.start_unix_server(self._between, self._here):
            yield self

    async def _between(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_unix_connection(self._there)
        await asyncio.gather(self._pass(reader, forth, asks=True), self._pass(back, writer, asks=False))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool) -> None:
        while data := await reader.read(65_536):
            self.count += asks and not self._asked
            self._asked = asks
            writer.write(data)
        writer.close()


async def test_a_turn_is_two_round_trips_and_everything_else_one(database_url: str, tmp_path: Path) -> None:
    chat, key = a_chat(), "key"
    async with Trips(database_url, tmp_path).counting() as trips:
        store = make_store(trips.url)
        await put(store, chat)

        async def cost(work: Awaitable[object]) -> int:
            before = trips.count
            await work
            return trips.count - before

        async def turn() -> None:
            async with store.turn("local", chat.id, key) as turn:
                assert turn.messages == []
                await turn.end([Record.of(thing) for thing in (replace(chat, version=2), a_run(chat))])

        assert await cost(turn()) == 2
        assert await cost(put(store, a_chat(), a_message(chat), a_run(chat))) == 1
        assert await cost(store.chats.get("local", chat.id)) == 1
        assert await cost(store.chats.delete("local", chat.id, AT)) == 1
        await store.close()


async def test_a_turn_that_fails_leaves_nothing(store: Store) -> None:
    chat = a_chat()
    await put(store, chat)

    async def fail() -> None:
        async with store.turn("local", chat.id) as turn:
            with pytest.raises(RecordRefused):
                await turn.end([Record.of(a_message(chat)), Record.of(a_message(chat, "nul \0"))])
            raise LookupError("a fault")

    with pytest.raises(LookupError, match="a fault"):
        await fail()
    assert await store.chats.messages("local", chat.id) == []


async def test_a_turn_that_is_cancelled_lets_go(store: Store) -> None:
    chat = a_chat()
    await put(store, chat)
    inside = asyncio.Event()

    async def hang() -> None:
        async with store.turn("local", chat.id):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with store.turn("local", chat.id) as turn:
        assert turn.messages == []


async def test_a_second_turn_waits_and_then_sees_what_the_first_did(database_url: str) -> None:
    one, two = make_store(database_url), make_store(database_url)
    chat = a_chat()
    run = a_run(chat)
    await put(one, chat)

    async def second() -> Sequence[Run]:
        async with two.turn("local", chat.id) as turn:
            return turn.active

    try:
        async with one.turn("local", chat.id) as turn:
            waiting = asyncio.create_task(second())
            await eventually(lambda: blocked(database_url))
            assert not waiting.done()
            await turn.end([Record.of(run)])
        assert await waiting == [run]
    finally:
        await one.close()
        await two.close()


def blocked(url: str) -> bool:
    """Whether a session of this database waits for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with psycopg.connect(url) as connection:
        row = connection.execute(query).fetchone()
    return row is not None and row[0] > 0


async def test_of_many_turns_at_once_only_one_finds_the_chat_free(store: Store) -> None:
    chat = a_chat()
    await put(store, chat)

    async def ask() -> bool:
        async with store.turn("local", chat.id) as turn:
            if turn.active:
                return False
            await turn.end([Record.of(a_run(chat))])
            return True

    outcomes = await asyncio.gather(*(ask() for _ in range(12)))
    assert outcomes.count(True) == 1


async def test_a_turn_that_is_held_for_too_long_is_away_not_a_hang(database_url: str) -> None:
    patient, hasty = make_store(database_url), make_store(database_url, wait=1.0)
    chat, other = a_chat(), a_chat()
    await put(patient, chat, other)
    try:
        async with patient.turn("local", chat.id):
            with pytest.raises(StoreUnavailable):
                async with hasty.turn("local", chat.id):
                    pytest.fail("two turns at once")
            with pytest.raises(StoreUnavailable):
                await put(hasty, a_message(chat))
            # The trouble is with that chat alone.
            await put(hasty, a_message(other))
        await put(hasty, a_message(chat))
    finally:
        await patient.close()
        await hasty.close()


# --- trouble ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnPostgres]:
    with OwnPostgres.running() as server:
        yield server


@pytest_asyncio.fixture
async def own_store(own_server: OwnPostgres) -> AsyncIterator[Store]:
    store = make_store(own_server.url(), wait=2.0)
    yield store
    await store.close()


async def away(store: Store, chat: Chat) -> None:
    """Every kind of call says so instead of hanging; far beyond the wait the guard fails the test."""
    calls = [
        store.ping(),
        put(store, a_message(chat)),
        store.chats.get("local", chat.id),
        store.runs.active_of("local"),
        store.turn("local", chat.id).__aenter__(),
        store.chats.delete("local", chat.id, AT),
    ]
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * len(calls)


async def test_a_frozen_server_is_away_within_the_wait_and_heals(own_server: OwnPostgres, own_store: Store) -> None:
    chat = a_chat()
    await put(own_store, chat)
    # Several pooled connections, all of which freeze.
    await asyncio.gather(*(own_store.ping() for _ in range(3)))
    loop = asyncio.get_running_loop()
    with own_server.frozen():
        for _ in range(2):
            begun = loop.time()
            with pytest.raises(StoreUnavailable, match="in time"):
                await own_store.ping()
            # The contract is the wait of two seconds; psycopg left to itself takes five and more.
            assert loop.time() - begun < 4.5
        await away(own_store, chat)

    message = a_message(chat)

    async def healed() -> bool:
        try:
            await put(own_store, message)
        except StoreUnavailable:
            return False
        return True

    await eventually(healed)
    assert message in await own_store.chats.messages("local", chat.id)


async def test_a_turn_over_a_freeze_ends_with_an_error_and_lets_go(own_server: OwnPostgres, own_store: Store) -> None:
    chat = a_chat()
    await put(own_store, chat)
    message = a_message(chat)

    async def freeze_before_the_end() -> None:
        with ExitStack() as stack:
            async with own_store.turn("local", chat.id) as turn:
                stack.enter_context(own_server.frozen())
                await turn.end([Record.of(message)])

    async def left() -> tuple[Message, ...] | None:
        try:
            async with own_store.turn("local", chat.id) as turn:
                return (*turn.messages, message)
        except StoreUnavailable:
            return None

    async with asyncio.timeout(60):
        with pytest.raises(StoreUnavailable):
            await freeze_before_the_end()
        # Whether it got through cannot be known, but all of it or nothing did, and the chat is free again.
        assert await eventually(left) in ((message,), (message, message))


@pytest.mark.parametrize(
    "call", [lambda store: store.ping(), lambda store: put(store, a_chat())], ids=["look", "write"]
)
async def test_a_call_that_is_cancelled_while_the_server_is_frozen_ends_at_once(
    own_server: OwnPostgres, own_store: Store, call: Callable[[Store], Coroutine[Any, Any, Any]]
) -> None:
    await own_store.ping()
    with own_server.frozen():
        task = asyncio.create_task(call(own_store))
        # Far enough to wait for the answer, and far from the time limit.
        await asyncio.sleep(0.05)
        task.cancel()
        async with asyncio.timeout(4.5):
            with pytest.raises(asyncio.CancelledError):
                await task
            await own_store.close()


async def test_a_restart_of_the_server_costs_no_call(own_server: OwnPostgres, own_store: Store) -> None:
    chat = a_chat()
    await put(own_store, chat)
    await asyncio.gather(*(own_store.ping() for _ in range(3)))
    own_server.stop()
    await away(own_store, chat)
    own_server.start()
    for _ in range(5):
        assert await own_store.chats.get("local", chat.id) == chat

    # And when nobody called in between, so that every pooled connection is dead without our knowing.
    await asyncio.gather(*(own_store.ping() for _ in range(3)))
    own_server.stop()
    own_server.start()
    for _ in range(5):
        assert await own_store.chats.get("local", chat.id) == chat


async def test_sessions_ended_by_an_administrator_poison_nothing(own_server: OwnPostgres, own_store: Store) -> None:
    await asyncio.gather(*(own_store.ping() for _ in range(3)))
    with psycopg.connect(own_server.url("postgres"), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = 'headwater'")
    for _ in range(5):
        await own_store.ping()


async def test_a_read_only_server_is_away_for_writes_and_refuses_no_data(
    own_server: OwnPostgres, own_store: Store
) -> None:
    chat = a_chat()
    await put(own_store, chat)
    admin = psycopg.connect(own_server.url("postgres"), autocommit=True)
    admin.execute("ALTER DATABASE headwater SET default_transaction_read_only = on")
    read_only = make_store(own_server.url(), wait=2.0)
    try:
        with pytest.raises(StoreUnavailable):
            await put(read_only, a_message(chat))
        assert await read_only.chats.get("local", chat.id) == chat
    finally:
        admin.execute("ALTER DATABASE headwater RESET default_transaction_read_only")
        admin.close()
        await read_only.close()


async def test_a_pool_that_is_exhausted_is_away_not_a_hang(database_url: str) -> None:
    store = make_store(database_url, pool_size=1, wait=1.0)
    chat, other = a_chat(), a_chat()
    await put(store, chat, other)
    try:
        async with store.turn("local", chat.id):
            with pytest.raises(StoreUnavailable):
                await store.chats.get("local", other.id)
        assert await store.chats.get("local", other.id) == other
    finally:
        await store.close()


async def test_a_statement_that_takes_too_long_is_ended_on_both_sides(database_url: str) -> None:
    store = make_store(database_url, wait=1.0)
    chat = a_chat()
    await put(store, chat)
    with psycopg.connect(database_url) as locker:
        locker.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnavailable):
            await store.chats.messages("local", chat.id)
    assert await store.chats.messages("local", chat.id) == []
    await store.close()


async def test_a_server_that_was_never_there_is_away() -> None:
    store = make_store("postgresql://postgres@/x?host=/nowhere", wait=0.5)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    await store.close()


async def test_a_ping_says_whether_postgresql_answers(database_url: str) -> None:
    here = Store(database_url, pool_size=1, wait=5, clock=SystemClock())
    away = Store("postgresql://postgres@/x?host=/nowhere", pool_size=1, wait=1, clock=SystemClock())
    try:
        await here.ping()
        with pytest.raises(StoreUnavailable):
            await away.ping()
    finally:
        await here.close()
        await away.close()
