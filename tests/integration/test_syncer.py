"""The syncer over a real journal and a real PostgreSQL: what is saved arrives, once, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from headwater.clock import SystemClock
from headwater.dev.services import Postgres
from headwater.errors import JournalUnavailable, RecordRefused, StoreUnavailable
from headwater.ids import new_id
from headwater.journal import Journal, Key
from headwater.messages import Chat, Message, Role
from headwater.records import Record
from headwater.runs import Run
from headwater.service import running
from headwater.store import Store
from headwater.syncer import ALONE, Syncer
from headwater.telemetry import Telemetry
from support.own_postgres import OwnPostgres
from support.wait import eventually

AT = 1_767_225_600_000
CHAT = new_id()


def said(text: str = "hello", chat_id: str = CHAT) -> Record:
    return Record.of(Message(new_id(), chat_id, "local", Role.USER, text, AT))


class Recorder(Store):
    """The real store, which also notes what it was asked to apply."""

    def __init__(self, url: str, wait: float) -> None:
        super().__init__(url, pool_size=3, wait=wait, clock=SystemClock())
        self.batches: list[list[str]] = []

    async def apply(self, records: Sequence[Record]) -> None:
        await super().apply(records)
        self.batches.append([record.id for record in records])

    @property
    def applied(self) -> list[str]:
        return [one for batch in self.batches for one in batch]


class Case:
    """A journal, a store and a syncer between them."""

    def __init__(self, url: str, path: Path, wait: float) -> None:
        self.url = url
        self.telemetry = Telemetry()
        self.clock = SystemClock()
        self.journal = Journal(path, clock=self.clock, telemetry=self.telemetry)
        self.store = Recorder(url, wait)
        self.syncer = self.another()
        self.gauges: dict[str, float] = {}
        self.telemetry.listen(lambda name, value, _: self.gauges.update({name: value}))

    def another(self) -> Syncer:
        return Syncer(self.journal, self.store, telemetry=self.telemetry, clock=self.clock)

    def rows(self) -> set[str]:
        with psycopg.connect(self.url) as connection:
            found = connection.execute("SELECT id::text FROM messages").fetchall()
        return {row[0] for row in found}

    async def empty(self) -> bool:
        return (await self.journal.backlog()).count == 0


@asynccontextmanager
async def case_of(url: str, path: Path, wait: float = 30.0) -> AsyncIterator[Case]:
    """One that waits `wait` seconds for PostgreSQL: as long as a busy machine may take, unless it is to be away."""
    case = Case(url, path, wait)
    await case.journal.open()
    try:
        yield case
    finally:
        await case.syncer.stop()
        await case.store.close()
        await case.journal.close()


@pytest.fixture(scope="module")
def one_database(postgres_server: Postgres, template_database: str) -> Iterator[str]:
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "syncer" TEMPLATE "{template_database}"'.encode())
        yield postgres_server.url("syncer")
        connection.execute('DROP DATABASE "syncer" WITH (FORCE)')


@pytest.fixture
def database_url(one_database: str) -> str:
    """One database for all tests here, emptied: making one for each takes longer than the tests."""
    with psycopg.connect(one_database) as connection:
        connection.execute("TRUNCATE chats, messages, runs")
    return one_database


@pytest_asyncio.fixture
async def case(database_url: str, tmp_path: Path) -> AsyncIterator[Case]:
    async with case_of(database_url, tmp_path / "journal.db") as case:
        yield case


@pytest_asyncio.fixture
async def impatient(database_url: str, tmp_path: Path) -> AsyncIterator[Case]:
    async with case_of(database_url, tmp_path / "journal.db", wait=1.0) as case:
        yield case


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnPostgres]:
    with OwnPostgres.running() as server:
        yield server


@pytest_asyncio.fixture
async def own_case(own_server: OwnPostgres, tmp_path: Path) -> AsyncIterator[Case]:
    with psycopg.connect(own_server.url()) as connection:
        connection.execute("TRUNCATE chats, messages, runs")
    async with case_of(own_server.url(), tmp_path / "journal.db", wait=1.0) as case:
        yield case


# --- the usual ----------------------------------------------------------------------------------


async def test_a_save_returns_when_its_records_are_in_postgresql(case: Case) -> None:
    async with running(case.syncer):
        for _ in range(5):
            record = said()
            assert await case.syncer.save([record], wait=60) is None
            assert record.id in case.rows()
    assert case.syncer.away is False


async def test_saves_at_the_same_time_share_batches_and_all_arrive(case: Case) -> None:
    records = [[said(), said()] for _ in range(100)]
    async with running(case.syncer):
        await asyncio.gather(*(case.syncer.save(pair, wait=60) for pair in records))
        assert case.rows() == {record.id for pair in records for record in pair}
    assert len(case.store.batches) < 100


async def test_a_save_that_does_not_wait_is_in_the_journal_and_arrives_by_itself(case: Case) -> None:
    record = said()
    async with running(case.syncer):
        await case.syncer.save([record], wait=0)
        assert record.id in {one.id for one in await case.journal.kept(CHAT)}
        await eventually(lambda: record.id in case.rows())


async def test_what_an_earlier_process_left_is_applied_at_the_start(case: Case) -> None:
    left = [said() for _ in range(3)]
    await case.journal.add(left)
    async with running(case.syncer):
        await eventually(case.empty)
    assert case.rows() == {record.id for record in left}


async def test_a_key_that_was_used_saves_nothing_and_does_not_wait(case: Case) -> None:
    key = Key("local", "key", "print", "run-1")
    first, second = said(), said()
    async with running(case.syncer):
        assert await case.syncer.save([first], key=key, wait=60) is None
        again = await case.syncer.save([second], key=replace(key, run_id="run-2"), wait=60)
    assert again == key
    assert case.rows() == {first.id}


async def test_records_are_applied_in_the_order_of_the_journal(case: Case) -> None:
    chat = Chat(CHAT, "local", AT, AT)
    run = Run(new_id(), "chat", "local", {}, AT, chat_id=CHAT)
    records = [Record.of(thing) for thing in (chat, run, run.started(1, AT), run.started(2, AT))]
    mixed = [record for number in range(300) for record in (said(str(number)), said(str(number), new_id()))]
    await case.journal.add(records + mixed)

    assert await case.syncer.sync() == 604
    assert case.store.applied == [record.id for record in records + mixed]
    assert len(case.store.batches) == 2
    assert await case.store.runs.get(run.id) == run.started(2, AT)


async def test_a_sync_of_nothing_is_nothing(case: Case) -> None:
    assert await case.syncer.sync() == 0
    assert case.store.batches == []


async def test_a_save_without_a_running_syncer_does_not_wait(case: Case) -> None:
    async with asyncio.timeout(50):
        await case.syncer.save([said()], wait=60)
    assert (await case.journal.backlog()).count == 1


async def test_a_stop_lets_those_who_wait_go(case: Case) -> None:
    await case.syncer.start()
    # A turn holds the chat, so the record cannot be applied yet.
    await case.store.apply([Record.of(Chat(CHAT, "local", AT, AT))])
    async with case.store.turn("local", CHAT):
        save = asyncio.create_task(case.syncer.save([said()], wait=60))
        await eventually(lambda: bool(case.syncer._waiting))
        async with asyncio.timeout(50):
            await case.syncer.stop()
            await save


async def test_a_save_gives_up_waiting_but_not_the_record(case: Case) -> None:
    record = said()
    await case.store.apply([Record.of(Chat(CHAT, "local", AT, AT))])
    async with running(case.syncer):
        async with case.store.turn("local", CHAT):
            await case.syncer.save([record], wait=0.05)
            assert record.id not in case.rows()
        await eventually(lambda: record.id in case.rows())


async def test_the_gauges_tell_the_backlog_its_age_and_the_poison(case: Case) -> None:
    await case.journal.add([said(), said("nul \0")])
    await case.syncer.sync()
    assert case.gauges["headwater_journal_backlog"] == 0
    assert case.gauges["headwater_journal_backlog_age_seconds"] == 0
    assert case.gauges["headwater_journal_poison"] == 1
    assert case.gauges["headwater_synced_total"] == 1


# --- poison -------------------------------------------------------------------------------------


async def test_poison_is_set_aside_and_everything_else_arrives(case: Case) -> None:
    good = [said(str(number)) for number in range(40)]
    bad = [said("nul \0"), said("another \0")]
    await case.journal.add([*good[:13], bad[0], *good[13:30], bad[1], *good[30:]])

    assert await case.syncer.sync() == 40
    assert case.rows() == {record.id for record in good}
    assert case.store.applied == [record.id for record in good]
    aside = await case.journal.aside(10)
    assert [entry.record.id for entry in aside] == [record.id for record in bad]
    assert all("PostgreSQL" in (entry.poison or "") for entry in aside)
    assert await case.syncer.sync() == 0


async def test_a_save_of_poison_ends_and_blocks_no_later_one(case: Case) -> None:
    good = said()
    async with running(case.syncer):
        async with asyncio.timeout(50):
            await case.syncer.save([said("nul \0")], wait=60)
            await case.syncer.save([good], wait=60)
    assert case.rows() == {good.id}
    assert (await case.journal.backlog()).poison == 1


async def test_data_that_is_no_json_is_refused_before_anything_is_saved(case: Case) -> None:
    with pytest.raises(RecordRefused):
        await case.syncer.save([said(), said("half \ud800")])
    assert await case.empty()


async def test_a_journal_that_cannot_be_written_fails_the_save(case: Case) -> None:
    async with running(case.syncer):
        await case.journal._writer.submit(lambda connection: connection.pragma("max_page_count", 1), alone=True)
        with pytest.raises(JournalUnavailable):
            await case.syncer.save([said("x" * 100_000)])


async def test_what_happened_is_kept_when_neither_journal_nor_postgresql_could_take_it(impatient: Case) -> None:
    async with running(impatient.syncer):
        await impatient.journal._writer.submit(lambda connection: connection.pragma("max_page_count", 1), alone=True)
        answer = said("x" * 100_000)
        with psycopg.connect(impatient.url) as connection:
            connection.execute("LOCK TABLE messages")
            with pytest.raises(StoreUnavailable):
                await impatient.syncer.keep([answer])
        await eventually(lambda: answer.id in impatient.rows(), 30)


@pytest.mark.parametrize("fault", ["pg_sleep(60)", "pg_terminate_backend(pg_backend_pid())"])
async def test_a_record_that_postgresql_never_answers_to_is_set_aside_and_comes_back(
    impatient: Case, fault: str
) -> None:
    records = [said(str(number), new_id()) for number in range(30)]
    bad = records[7]
    with trigger(impatient.url, f"IF NEW.id = '{bad.id}' THEN PERFORM {fault}; END IF;"):
        await impatient.journal.add(records)
        async with running(impatient.syncer):
            await eventually(impatient.empty, 120)
            assert impatient.rows() == {record.id for record in records} - {bad.id}
            (entry,) = await impatient.journal.aside(10)
            assert (entry.record.id, entry.tries) == (bad.id, 1)
            assert "PostgreSQL answers, but not to this" in str(entry.poison)
            await eventually(lambda: not impatient.syncer.away)
            # Found out once, it holds nobody up any more.
            later = said()
            await impatient.journal.add([later])
            await impatient.syncer.sync(again=True)
            assert later.id in impatient.rows()
            (entry,) = await impatient.journal.aside(10)
            assert (entry.record.id, entry.tries) == (bad.id, 2)
    assert await impatient.syncer.sync() == 0
    assert await impatient.syncer.sync(again=True) == 1
    assert bad.id in impatient.rows()
    assert await impatient.journal.aside(10) == []


async def test_nothing_is_set_aside_while_postgresql_answers_but_takes_nothing(impatient: Case) -> None:
    records = [said(str(number), new_id()) for number in range(2)]
    # It passes, and says nothing of messages.
    chat = Record.of(Chat(new_id(), "local", AT, AT))
    with psycopg.connect(impatient.url) as connection:
        connection.execute("LOCK TABLE messages")
        await impatient.journal.add([records[0], chat, records[1]])
        for _ in range(ALONE + 1):
            with pytest.raises(StoreUnavailable):
                await impatient.syncer.sync()
    assert await impatient.journal.aside(10) == []
    await impatient.syncer.sync()
    assert impatient.rows() == {record.id for record in records}


async def test_a_record_that_passes_once_others_do_is_not_set_aside(impatient: Case) -> None:
    records = [said(str(number), new_id()) for number in range(2)]
    late = records[0].id
    with psycopg.connect(impatient.url, autocommit=True) as connection:
        connection.execute("CREATE SEQUENCE tries")
        try:
            # Once with the other one and thrice by itself; a sequence counts also what is rolled back.
            with trigger(
                impatient.url, f"IF NEW.id = '{late}' AND nextval('tries') < 5 THEN PERFORM pg_sleep(60); END IF;"
            ):
                await impatient.journal.add(records)
                for _ in range(ALONE - 1):
                    with pytest.raises(StoreUnavailable):
                        await impatient.syncer.sync()
                await impatient.syncer.sync()
            assert connection.execute("SELECT last_value FROM tries").fetchone() == (5,)
        finally:
            connection.execute("DROP SEQUENCE tries")
    assert await impatient.journal.aside(10) == []
    assert impatient.rows() == {record.id for record in records}


async def test_what_was_set_aside_is_tried_again_soon_without_a_periodic_sync(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.syncer.PERIOD", 0.1)
    bad = said()
    async with running(case.syncer):
        with trigger(case.url, f"IF NEW.id = '{bad.id}' THEN RAISE data_exception; END IF;"):
            await case.journal.add([bad])
            await case.syncer.sync()
            # It may just be tried again.
            await eventually(lambda: _aside(case, bad.id))
        await eventually(lambda: bad.id in case.rows())


async def _aside(case: Case, record_id: str) -> bool:
    return [entry.record.id for entry in await case.journal.aside(10)] == [record_id]


@contextmanager
def trigger(url: str, body: str) -> Iterator[None]:
    """PL/pgSQL that runs before a message is inserted."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$".encode()
        )
        connection.execute("CREATE TRIGGER odd BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION odd()")
        try:
            yield
        finally:
            connection.execute("DROP FUNCTION odd CASCADE")


# --- several ------------------------------------------------------------------------------------


async def test_two_syncers_on_one_journal_are_harmless(database_url: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    async with case_of(database_url, path) as one, case_of(database_url, path) as two:
        records = [said(str(number)) for number in range(300)]
        async with running(one.syncer, two.syncer):
            cases = [one, two]
            saves = [cases[number % 2].syncer.save([record], wait=100) for number, record in enumerate(records)]
            async with asyncio.timeout(120):
                await asyncio.gather(*saves)
            assert one.rows() == {record.id for record in records}
        assert await one.empty()
        assert (await one.journal.backlog()).poison == 0


async def test_a_save_is_answered_also_when_another_syncer_applied_its_records(
    database_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "journal.db"
    async with case_of(database_url, path) as one, case_of(database_url, path) as two:
        await one.syncer.start()
        await eventually(lambda: "headwater_journal_backlog" in one.gauges)
        # It has just looked; the other one is faster with what comes next.
        async with one.syncer._one_at_a_time:
            save = asyncio.create_task(one.syncer.save([said()], wait=60))
            await eventually(lambda: bool(one.syncer._waiting))
            assert await two.syncer.sync() == 1
        async with asyncio.timeout(50):
            await save
        assert one.store.batches == []


# --- PostgreSQL away ----------------------------------------------------------------------------


async def test_while_postgresql_is_stopped_saves_return_at_once_and_all_arrive_later(
    own_server: OwnPostgres, own_case: Case
) -> None:
    syncer, store = own_case.syncer, own_case.store
    chat, before = Record.of(Chat(CHAT, "local", AT, AT)), said("before")
    async with running(syncer):
        await syncer.save([chat, before], wait=60)
        own_server.stop()
        try:
            records = [said(str(number)) for number in range(50)]
            async with asyncio.timeout(50):
                # The first one finds out, the others need not wait at all.
                await syncer.save(records[:1], wait=60)
                assert syncer.away
                for record in records[1:]:
                    await syncer.save([record], wait=60)
            assert (await own_case.journal.backlog()).count == 50
            with pytest.raises(StoreUnavailable):
                await syncer.sync()
            assert own_case.gauges["headwater_journal_backlog"] == 50
        finally:
            own_server.start()
        await eventually(own_case.empty, timeout=60)
        await eventually(lambda: not syncer.away)
        assert own_case.rows() == {before.id, *(record.id for record in records)}
        assert store.applied == [chat.id, before.id, *(record.id for record in records)]

        later = said("later")
        await syncer.save([later], wait=60)
        assert later.id in own_case.rows()


async def test_a_frozen_postgresql_holds_up_one_save_at_most_and_heals(own_server: OwnPostgres, own_case: Case) -> None:
    syncer = own_case.syncer
    async with running(syncer):
        await syncer.save([said()], wait=60)
        with own_server.frozen():
            # Were each of them held up, it would be for a second.
            records = [said(str(number)) for number in range(60)]
            async with asyncio.timeout(45):
                for record in records:
                    await syncer.save([record], wait=60)
            assert syncer.away
        await eventually(own_case.empty, timeout=60)
    assert {record.id for record in records} <= own_case.rows()


async def test_a_batch_that_is_too_much_for_the_time_limit_gets_smaller(case: Case) -> None:
    """Over a slow server a full batch may never fit into the wait: it must still arrive, in smaller ones."""
    await case.journal.add([said(str(number)) for number in range(64)])
    limit = 5
    sizes: list[int] = []
    apply = case.store.apply

    async def slow(records: Sequence[Record]) -> None:
        sizes.append(len(records))
        if len(records) > limit:
            raise StoreUnavailable("PostgreSQL did not answer in time.")
        await apply(records)

    case.store.apply = slow  # type: ignore[method-assign]
    done = 0
    for _ in range(200):
        try:
            done += await case.syncer.sync()
            break
        except StoreUnavailable:
            continue
    assert await case.empty()
    assert len(case.rows()) == 64
    assert sizes[0] == 64


async def test_the_syncer_waits_longer_each_time_while_postgresql_is_away(tmp_path: Path) -> None:
    async with case_of("postgresql://postgres@/x?host=/nowhere", tmp_path / "journal.db") as case:
        async with running(case.syncer):
            await case.syncer.save([said()], wait=60)
            assert case.syncer.away
            tries: list[float] = []
            case.telemetry.listen(
                lambda name, value, _: tries.append(value) if name == "headwater_journal_backlog" else None
            )
            # A hundred calls are no reason to knock a hundred times.
            for _ in range(100):
                await case.syncer.save([said()], wait=60)
            assert len(tries) < 20
        assert (await case.journal.backlog()).count == 101
