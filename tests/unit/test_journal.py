"""The journal: durable, all or nothing, one winner per key, and honest about its file."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
import pytest_asyncio

from headwater.clock import FrozenClock
from headwater.errors import ChatBusy, JournalBusy, JournalDamaged, JournalUnavailable, RecordRefused
from headwater.ids import new_id
from headwater.journal import Added, Journal, Key, wal
from headwater.journal import file as journal_file
from headwater.journal.salvage import salvage
from headwater.messages import Chat, Message, Role
from headwater.records import Record
from headwater.runs import RunState
from headwater.telemetry import Telemetry
from support.runs import new_run

CHAT = new_id()


def said(text: str = "hello", chat_id: str = CHAT, owner_id: str = "local") -> Record:
    return Record.of(Message(new_id(), chat_id, owner_id, Role.USER, text, 1))


def key(name: str = "k", run_id: str = "run-1", owner_id: str = "local") -> Key:
    return Key(owner_id, name, f"fingerprint of {name}", run_id, "message-1")


def ids(records: Sequence[Record]) -> list[str]:
    return [record.id for record in records]


class Case:
    """A journal with what it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FrozenClock()
        self.telemetry = Telemetry()
        self.journal = self.another()

    def another(self) -> Journal:
        return Journal(self.path, clock=self.clock, telemetry=self.telemetry)

    async def waiting(self) -> list[str]:
        return [entry.record.id for entry in await self.journal.unsynced(10_000)]

    async def limit(self, pages: int) -> None:
        """Make the writer's connection meet a full disk at so many pages."""
        await self.journal._writer.submit(lambda connection: connection.pragma("max_page_count", pages), alone=True)

    def content(self) -> bytes:
        return self.path.read_bytes()

    def alter(self, statement: str, *values: Any) -> None:
        """Change the file as another program would."""
        connection = apsw.Connection(str(self.path))
        connection.execute(statement, values)
        connection.close()


@pytest_asyncio.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    case = Case(tmp_path / "data" / "journal.db")
    await case.journal.open()
    yield case
    await case.journal.close()


async def test_records_come_back_in_the_order_they_were_appended(case: Case) -> None:
    records = [said(str(number)) for number in range(5)]
    await case.journal.add(records[:2])
    case.clock.advance(1)
    await case.journal.add(records[2:])

    entries = await case.journal.unsynced(10)

    assert [entry.record for entry in entries] == records
    assert [entry.at - entries[0].at for entry in entries] == [0, 0, 1000, 1000, 1000]
    assert [entry.position for entry in entries] == sorted({entry.position for entry in entries})
    assert [entry.record.id for entry in await case.journal.unsynced(2)] == ids(records[:2])


async def test_a_large_backlog_is_handed_out_in_pieces_of_bounded_size(case: Case) -> None:
    await case.journal.add([said("x" * 1_000_000) for _ in range(5)])

    assert len(await case.journal.unsynced(500)) == 3


async def test_what_is_marked_synced_leaves_the_backlog(case: Case) -> None:
    await case.journal.add([said(), said(), said()])
    entries = await case.journal.unsynced(10)
    await case.journal.mark_synced([entries[0].position, entries[2].position])

    assert await case.waiting() == [entries[1].record.id]
    assert ids(await case.journal.overlay("chat_id", CHAT)) == [entries[1].record.id]


async def test_a_mark_that_nobody_waits_for_comes_before_the_journal_is_closed(case: Case) -> None:
    await case.journal.add([said(), said()])
    first, second = await case.journal.unsynced(10)
    case.journal.mark_soon([first.position])
    await case.journal.close()
    # Too late for a mark: what it was for is stored nevertheless.
    case.journal.mark_soon([second.position])
    await case.journal.open()

    assert await case.waiting() == [second.record.id]


async def test_the_backlog_tells_count_age_and_poison(case: Case) -> None:
    empty = await case.journal.backlog()
    assert (empty.count, empty.oldest_ms, empty.poison) == (0, None, 0)
    await case.journal.add([said(), said()])
    case.clock.advance(7)
    await case.journal.add([said()])
    case.clock.advance(1)
    first = (await case.journal.unsynced(1))[0]

    backlog = await case.journal.backlog()
    assert (backlog.count, backlog.oldest_ms, backlog.poison) == (3, 8000, 0)
    await case.journal.set_aside(first.position, "no")
    backlog = await case.journal.backlog()
    assert (backlog.count, backlog.oldest_ms, backlog.poison) == (2, 8000, 1)


async def test_a_record_set_aside_is_out_of_the_way_but_neither_lost_nor_hidden(case: Case) -> None:
    poison, good = said("bad"), said("good")
    await case.journal.add([poison, good])
    position = (await case.journal.unsynced(1))[0].position
    await case.journal.set_aside(position, "has a \ud800 in it")

    assert await case.waiting() == [good.id]
    assert await case.journal.overlay("chat_id", CHAT) == [poison, good]
    (entry,) = await case.journal.aside(10)
    assert (entry.record, entry.poison, entry.tries) == (poison, "has a ? in it", 1)

    assert await case.journal.put_back() == 1
    assert await case.waiting() == [poison.id, good.id]
    assert await case.journal.aside(10) == []


async def test_a_row_that_cannot_be_read_is_set_aside_and_blocks_nothing(case: Case) -> None:
    first, second, third = said(), said(), said()
    await case.journal.add([first, second, third])
    case.alter("UPDATE records SET data = '{' WHERE id = ?", first.id)
    case.alter("UPDATE records SET kind = 'hologram' WHERE id = ?", second.id)

    assert await case.waiting() == [third.id]
    assert (await case.journal.backlog()).poison == 2


async def test_the_overlay_is_of_an_owner_a_chat_or_a_row(case: Case) -> None:
    other = new_id()
    chat = Record.of(Chat(other, "somebody", 1, 1))
    mine, theirs = said(), said(chat_id=other, owner_id="somebody")
    await case.journal.add([mine, chat, theirs])

    assert await case.journal.overlay("owner_id", "somebody") == [chat, theirs]
    assert await case.journal.overlay("chat_id", other) == [chat, theirs]
    assert await case.journal.overlay("id", mine.id) == [mine]


async def test_a_chat_stays_readable_when_it_is_synced_until_it_is_forgotten(case: Case) -> None:
    chat, text, other = Record.of(Chat(CHAT, "local", 1, 1)), said("a secret sentence"), said(chat_id=new_id())
    await case.journal.add([chat, text, other])
    await case.journal.mark_synced([entry.position for entry in await case.journal.unsynced(10)])

    assert await case.journal.kept(CHAT) == [chat, text]
    assert await case.journal.kept_chats("local") == [chat]

    assert await case.journal.forget(CHAT) == 2
    assert await case.journal.kept(CHAT) == []
    assert await case.journal.kept_chats("local") == []
    await case.journal.close()
    assert b"a secret sentence" not in case.content()
    await case.journal.open()


# --- keys ---------------------------------------------------------------------------------------


async def test_a_key_that_was_used_writes_nothing_and_gives_the_earlier_one(case: Case) -> None:
    first, second = said(), said()
    assert (await case.journal.add([first], key(run_id="run-1"))).earlier is None
    assert (await case.journal.add([second], key(run_id="run-2"))).earlier == key(run_id="run-1")

    assert await case.waiting() == [first.id]
    assert await case.journal.find_key("local", "k") == key(run_id="run-1")


async def test_keys_belong_to_their_owner(case: Case) -> None:
    assert (await case.journal.add([said()], key(owner_id="one"))).earlier is None
    assert (await case.journal.add([said()], key(owner_id="two"))).earlier is None
    assert await case.journal.find_key("three", "k") is None


async def test_of_many_appends_with_one_key_exactly_one_wins(case: Case) -> None:
    others = [case.another() for _ in range(3)]
    for other in others:
        await other.open()
    try:
        journals = [case.journal, *others]
        races = [journals[number % 4].add([said()], key(run_id=f"run-{number}")) for number in range(40)]
        results = [added.earlier for added in await asyncio.gather(*races)]
    finally:
        for other in others:
            await other.close()

    winner = await case.journal.find_key("local", "k")
    assert winner is not None
    assert results.count(None) == 1
    assert [result for result in results if result is not None] == [winner] * 39
    assert winner.run_id == f"run-{results.index(None)}"
    assert len(await case.waiting()) == 1


_RACER = """
import asyncio, sys
from pathlib import Path
from headwater.clock import SystemClock
from headwater.journal import Journal, Key
from headwater.messages import Message, Role
from headwater.ids import new_id
from headwater.records import Record
from headwater.telemetry import Telemetry

async def main(path, name, count):
    journal = Journal(Path(path), clock=SystemClock(), telemetry=Telemetry())
    await journal.open()
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(count):
        record = Record.of(Message(new_id(), new_id(), "local", Role.USER, f"{name} {number}", 1))
        earlier = (await journal.add([record], Key("local", f"k{number}", "f", name))).earlier
        print(number, name if earlier is None else earlier.run_id, record.id, flush=True)
    await journal.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def racer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RACER, str(path), name, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


async def test_two_processes_agree_who_won_each_key(case: Case) -> None:
    racers = [racer(case.path, name, 100) for name in ("one", "two")]
    for process in racers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.communicate(timeout=60)[0].splitlines() for process in racers]

    winners = [[line.split()[:2] for line in lines] for lines in outcomes]
    assert len(winners[0]) == 100
    assert winners[0] == winners[1]
    kept = {
        line.split()[2] for name, lines in zip(("one", "two"), outcomes, strict=True) for line in lines if name in line
    }
    assert set(await case.waiting()) == kept
    assert len(kept) == 100


async def test_of_two_processes_that_looked_at_a_chat_one_begins_a_run(case: Case) -> None:
    other = case.another()
    await other.open()
    try:
        for _ in range(20):
            chat_id = new_id()
            journals = (case.journal, other)
            looks = [await journal.look(chat_id) for journal in journals]
            runs = [new_run(chat_id=chat_id) for _ in journals]
            adds = [
                journal.add([said(chat_id=chat_id), Record.of(run)], key(run.id, run.id), look)
                for journal, run, look in zip(journals, runs, looks, strict=True)
            ]
            one, two = await asyncio.gather(*adds, return_exceptions=True)
            busy, winner = (one, runs[1]) if isinstance(one, BaseException) else (two, runs[0])
            assert isinstance(busy, ChatBusy)
            assert busy.extra == {"task_id": winner.id}
            kept = await other.kept(chat_id)
            assert [record.id for record in kept if record.kind == "run"] == [winner.id]
            assert len(kept) == 2, "nothing of the loser is left"
            loser = runs[0] if winner is runs[1] else runs[1]
            assert await other.find_key("local", loser.id) is None
    finally:
        await other.close()


async def test_what_an_earlier_run_still_says_is_no_new_one(case: Case) -> None:
    run = new_run(chat_id=CHAT)
    await case.journal.add([Record.of(run)])
    look = await case.journal.look(CHAT)
    await case.journal.add([Record.of(run.started(1, 2)), said(), Record.of(new_run())])
    assert (await case.journal.add([said()], None, look)).positions


async def test_the_same_key_is_told_before_the_chat_is_busy(case: Case) -> None:
    look = await case.journal.look(CHAT)
    run = new_run(chat_id=CHAT)
    assert (await case.journal.add([Record.of(run)], key(run_id=run.id))).earlier is None
    earlier = (await case.journal.add([Record.of(new_run(chat_id=CHAT))], key(), look)).earlier
    assert earlier is not None
    assert earlier.run_id == run.id


async def test_unfinished_runs_are_those_whose_newest_record_has_no_end(case: Case) -> None:
    queued, running, ended = new_run(), new_run(), new_run()
    await case.journal.add([Record.of(run) for run in (queued, running, ended)])
    again = ended.started(1, 2)
    await case.journal.add([Record.of(running.started(1, 2)), Record.of(again)])
    await case.journal.add([Record.of(again.ended(RunState.DONE, 3))])
    # Journalled a second time, as after a store that went away: one run all the same.
    await case.journal.add([Record.of(queued)])
    assert await case.journal.unfinished(older_than=60, limit=10) == []
    case.clock.advance(61)
    found = await case.journal.unfinished(older_than=60, limit=10)
    assert sorted((record.id, record.version) for record in found) == sorted([(queued.id, 0), (running.id, 5)])
    assert await case.journal.unfinished(1, older_than=60, limit=10) == found[1:]
    await case.journal.mark_synced([entry.position for entry in await case.journal.unsynced(100)])
    assert await case.journal.unfinished(older_than=60, limit=10) == []


async def test_a_noted_cancel_stays_until_it_is_dropped_also_across_processes(case: Case) -> None:
    for run_id in ("one", "two", "one"):
        await case.journal.note_cancel(run_id)
        case.clock.advance(1)
    await case.journal.close()
    again = case.another()
    await again.open()
    try:
        assert await again.cancels(10) == ["one", "two"]
        assert await again.cancels(1) == ["one"]
        assert await again.cancels(1, "one") == ["two"]
        await again.drop_cancels(["one"])
        assert await again.cancels(10) == ["two"]
        case.clock.advance(10)
        await again.prune(case.clock.now_ms())
        assert await again.cancels(10) == []
    finally:
        await again.close()


async def test_wishes_are_read_by_run_become_promises_or_go_and_do_not_outlive_their_time(case: Case) -> None:
    wishes = [(f"run-{number}", owner) for number in range(3) for owner in ("me", "you")]
    for wish in [*reversed(wishes), wishes[0]]:
        await case.journal.note_wish(*wish)
    assert await case.journal.wishes(4) == wishes[:4]
    assert await case.journal.wishes(4, wishes[3]) == wishes[4:]
    held = {"run-0": "me", "run-1": "nobody", "run-3": "me"}
    assert await case.journal.cancelled(held) == {"run-0"}
    await case.journal.note_cancel("run-1")
    assert await case.journal.cancelled(held) == {"run-0", "run-1"}
    assert await case.journal.cancelled({}) == set()
    await case.journal.settle_wishes([wishes[0], wishes[3]], [wishes[1]])
    assert await case.journal.wishes(10) == [wishes[2], *wishes[4:]]
    assert sorted(await case.journal.cancels(10)) == ["run-0", "run-1"]
    case.clock.advance(10)
    await case.journal.prune(case.clock.now_ms())
    assert await case.journal.wishes(10) == []


async def test_a_file_of_the_first_layout_is_taken_over(case: Case) -> None:
    record = said()
    await case.journal.add([record])
    await case.journal.close()
    case.alter("DROP TABLE cancels")
    case.alter("DROP TABLE wishes")
    case.alter("PRAGMA user_version = 1")
    later = case.another()
    await later.open()
    try:
        await later.note_cancel("run")
        assert await later.cancels(10) == ["run"]
        await later.note_wish("run", "me")
        assert await later.wishes(10) == [("run", "me")]
        assert ids(await later.overlay("id", record.id)) == [record.id]
    finally:
        await later.close()


async def test_what_was_acknowledged_is_there_after_a_kill(case: Case) -> None:
    process = racer(case.path, "victim", 1_000_000)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    acknowledged = [process.stdout.readline().split()[2] for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    acknowledged += [line.split()[2] for line in rest.splitlines() if len(line.split()) == 3]

    journal = case.another()
    await journal.open()
    try:
        kept = {entry.record.id for entry in await journal.unsynced(10_000_000)}
    finally:
        await journal.close()
    assert len(acknowledged) >= 200
    assert set(acknowledged) - kept == set()


# --- groups -------------------------------------------------------------------------------------


async def test_appends_that_wait_together_share_commits(case: Case) -> None:
    commits: list[float] = []
    records: list[float] = []
    case.telemetry.listen(
        lambda name, value, _: (
            commits.append(value)
            if name == "headwater_journal_commit_seconds"
            else records.append(value)
            if name == "headwater_journal_records_total"
            else None
        )
    )
    await asyncio.gather(*(case.journal.add([said(), said()]) for _ in range(200)))

    assert sum(records) == 400
    assert len(commits) < 100
    assert len(await case.waiting()) == 400


async def test_one_bad_append_of_a_group_fails_alone_and_whole(case: Case) -> None:
    good = [said(str(number)) for number in range(20)]
    # Its second record cannot be bound: the number is too large for SQLite.
    record = said()
    half = said("half of the bad one")
    bad = Record(record.kind, record.id, 2**70, record.owner_id, record.chat_id, record.data)

    results = await asyncio.gather(
        *(case.journal.add([one]) for one in good[:10]),
        case.journal.add([half, bad], key()),
        *(case.journal.add([one]) for one in good[10:]),
        return_exceptions=True,
    )

    assert [type(result) for result in results if not isinstance(result, Added)] == [RecordRefused]
    assert sorted(await case.waiting()) == sorted(ids(good))
    assert await case.journal.find_key("local", "k") is None


async def test_data_that_is_no_json_is_refused_before_it_is_queued(case: Case) -> None:
    record = said()
    with pytest.raises(RecordRefused, match="cannot be written as JSON"):
        await case.journal.add([Record(record.kind, record.id, 0, "local", CHAT, {"content": object()})])
    with pytest.raises(RecordRefused, match="cannot be written as JSON"):
        await case.journal.add([said("half a pair: \ud800")])
    assert await case.waiting() == []


async def test_text_that_postgresql_refuses_is_kept_all_the_same(case: Case) -> None:
    record = said("nul: \0")
    await case.journal.add([record])
    assert (await case.journal.unsynced(1))[0].record == record


# --- the disk -----------------------------------------------------------------------------------


async def test_a_full_disk_is_said_keeps_what_was_there_and_heals(case: Case) -> None:
    kept = said("kept")
    await case.journal.add([kept])
    await case.limit(1)

    with pytest.raises(JournalUnavailable, match="Free space") as caught:
        await case.journal.add([said("x" * 100_000)], key())
    assert caught.value.code == "storage_full"
    assert await case.waiting() == [kept.id]
    assert await case.journal.find_key("local", "k") is None
    for _ in range(2):
        with pytest.raises(JournalUnavailable, match="Free space"):
            await case.journal.check()

    await case.limit(1_000_000)
    await case.journal.check()
    assert await case.waiting() == [kept.id]
    later = said("x" * 100_000)
    assert (await case.journal.add([later], key())).earlier is None
    assert await case.waiting() == [kept.id, later.id]


async def test_prune_deletes_what_was_synced_long_ago_and_shrinks_the_file(case: Case) -> None:
    await case.journal.add([said("x" * 2000) for _ in range(2500)], key("old"))
    while entries := await case.journal.unsynced(1000):
        await case.journal.mark_synced([entry.position for entry in entries])
    case.clock.advance(100)
    recent, waiting = said("recent"), said("waiting")
    await case.journal.add([recent], key("new"))
    await case.journal.mark_synced([entry.position for entry in await case.journal.unsynced(10)])
    await case.journal.add([waiting])
    # The write-ahead log goes into the file, so that its size tells something.
    await case.journal._writer.submit(lambda c: c.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE), alone=True)
    before = case.path.stat().st_size

    assert await case.journal.prune(case.clock.now_ms() - 50_000) == 2500

    assert before > 5_000_000
    assert case.path.stat().st_size < 200_000
    assert await case.waiting() == [waiting.id]
    assert await case.journal.kept(CHAT) == [recent, waiting]
    assert await case.journal.find_key("local", "old") is None
    assert await case.journal.find_key("local", "new") is not None


async def test_prune_keeps_the_key_of_a_run_that_is_nowhere_else(case: Case) -> None:
    record = said()
    await case.journal.add([record], key(run_id=record.id))
    case.clock.advance(100)

    assert await case.journal.prune(case.clock.now_ms()) == 0
    assert await case.journal.find_key("local", "k") is not None
    assert await case.waiting() == [record.id]


async def test_positions_are_not_given_twice_after_a_prune(case: Case) -> None:
    await case.journal.add([said()])
    (entry,) = await case.journal.unsynced(1)
    await case.journal.mark_synced([entry.position])
    await case.journal.prune(case.clock.now_ms() + 1)

    assert (await case.journal.add([said()])).positions[0] > entry.position


async def test_the_write_ahead_log_stays_bounded(case: Case) -> None:
    for _ in range(60):
        await case.journal.add([said("x" * 10_000) for _ in range(100)])
    assert case.path.with_name("journal.db-wal").stat().st_size < 32 * 1024 * 1024


# --- the file -----------------------------------------------------------------------------------


async def test_folder_and_files_are_for_their_owner_only(case: Case) -> None:
    await case.journal.add([said()])
    assert stat.S_IMODE(case.path.parent.stat().st_mode) == 0o700
    files = list(case.path.parent.iterdir())
    assert {file.name for file in files} == {"journal.db", "journal.db-wal", "journal.db-shm"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_commits_are_synced_to_the_disk(case: Case) -> None:
    modes = await case.journal._writer.submit(lambda c: (c.pragma("journal_mode"), c.pragma("synchronous")), alone=True)
    assert modes == ("wal", 2)


async def test_a_journal_that_is_opened_again_has_what_it_had(case: Case) -> None:
    record = said()
    await case.journal.add([record], key())
    await case.journal.close()
    await case.journal.close()
    await case.journal.open()

    assert await case.waiting() == [record.id]
    assert await case.journal.find_key("local", "k") == key()


async def test_a_journal_that_is_not_open_says_so(tmp_path: Path) -> None:
    case = Case(tmp_path / "journal.db")
    with pytest.raises(JournalUnavailable, match="not open") as caught:
        await case.journal.add([said()])
    assert caught.value.code == "journal_closed"


async def refused(case: Case) -> JournalUnavailable:
    """How opening the file fails, and that it is not touched by it."""
    before = case.content()
    with pytest.raises(JournalUnavailable) as caught:
        await case.another().open()
    assert case.content() == before
    return caught.value


async def filled(case: Case) -> Path:
    await case.journal.add([said("x" * 2000) for _ in range(100)])
    await case.journal.close()
    return case.path


async def test_a_file_that_is_no_database_is_refused_and_left_alone(case: Case) -> None:
    path = await filled(case)
    path.write_bytes(b"not a database at all" * 500)

    error = await refused(case)
    assert error.code == "journal_damaged"
    assert "headwater journal salvage" in str(error)
    assert "aside" in str(error)


async def test_a_file_with_a_damaged_page_is_refused_and_left_alone(case: Case) -> None:
    path = await filled(case)
    with path.open("r+b") as file:
        for page in range(3, 12):
            file.seek(page * 4096)
            file.write(b"\xff" * 64)

    assert (await refused(case)).code == "journal_damaged"


async def test_what_can_be_read_of_a_damaged_file_is_salvaged_and_the_file_is_kept(case: Case) -> None:
    records = [said(f"number {number} " + "x" * 3000) for number in range(60)]
    for number, record in enumerate(records):
        await case.journal.add([record], key(str(number)))
    await case.journal.note_cancel("run")
    await case.journal.note_wish("run", "me")
    await case.journal.mark_synced([1, 2])
    await case.journal.close()
    # A page in the middle, which holds rows.
    at = case.content().index(b"number 30 ")
    content = bytearray(case.content())
    content[at // 4096 * 4096 : at // 4096 * 4096 + 4096] = b"\xff" * 4096
    case.path.write_bytes(content)
    assert (await refused(case)).code == "journal_damaged"

    done = salvage(case.path, "now")

    assert done.aside.read_bytes() == bytes(content)
    assert done.aside.name == "journal.db.damaged-now"
    assert {path.name for path in case.path.parent.iterdir() if path.stat().st_size} == {
        case.path.name,
        done.aside.name,
    }
    later = case.another()
    await later.open()
    try:
        kept = [entry.record.id for entry in await later.unsynced(100)]
        lost = [record.id for record in records[2:] if record.id not in kept]
        assert records[30].id in lost
        assert 1 <= len(lost) <= 3
        assert kept == [record.id for record in records[2:] if record.id in kept], "in order"
        assert (done.records, done.waiting, done.missing) == (60 - len(lost), 58 - len(lost), len(lost))
        assert await later.find_key("local", "59") is not None
        assert await later.cancels(10) == ["run"]
        assert await later.wishes(10) == [("run", "me")]
        assert (await later.add([said()])).positions == [61]
    finally:
        await later.close()


async def test_a_row_that_is_not_whole_is_left_out_of_what_is_salvaged_and_named(case: Case) -> None:
    records = [said() for _ in range(5)]
    await case.journal.add(records)
    await case.journal.close()
    # What damage in a row's header looks like, which says of each column whether it is NULL.
    schema = (
        "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, '{}', '{}') WHERE name = 'records'"
    )
    case.alter(schema.format(" id TEXT NOT NULL", " id TEXT"))
    case.alter("UPDATE records SET id = NULL WHERE position = 3")
    case.alter(schema.format(" id TEXT", " id TEXT NOT NULL"))
    assert "NULL value in records.id" in str(await refused(case))

    done = salvage(case.path, "now")

    assert (done.records, done.waiting, done.missing, done.broken) == (4, 4, 1, [3])
    later = case.another()
    await later.open()
    kept = ids([entry.record for entry in await later.unsynced(100)])
    await later.close()
    assert kept == ids([*records[:2], *records[3:]])


@pytest.mark.parametrize(
    ("code", "status", "title", "retryable"),
    [
        ("storage_full", 507, "There is no room to keep the message", True),
        ("journal_busy", 503, "The journal is held by another process", True),
        ("journal_damaged", 503, "The journal is damaged", False),
        ("journal_unwritable", 503, "The journal cannot be used", True),
        ("journal_moved", 503, "The journal cannot be used", True),
    ],
)
def test_each_trouble_says_what_it_is(code: str, status: int, title: str, retryable: bool) -> None:
    error = journal_file.unavailable("why", code)
    assert isinstance(error, JournalUnavailable)
    assert (error.code, error.status, error.title, error.retryable) == (code, status, title, retryable)


async def test_a_cleared_journal_knows_nothing_and_gives_no_position_twice(case: Case) -> None:
    await case.journal.add([said("waits")], key("1"))
    positions = (await case.journal.add([said("is synced")])).positions
    await case.journal.mark_synced(positions)
    await case.journal.note_cancel("run")
    assert await case.journal.clear() == 2
    assert await case.journal.unsynced(10) == []
    assert await case.journal.kept_chats("local") == []
    assert await case.journal.find_key("local", "1") is None
    assert await case.journal.cancels(10) == []
    assert b"waits" not in case.content()
    assert (await case.journal.add([said()])).positions == [3]


async def test_a_journal_in_use_is_not_salvaged(case: Case) -> None:
    await case.journal.add([said()])
    before = sorted(path.name for path in case.path.parent.iterdir())
    with pytest.raises(JournalBusy, match="Stop every server"):
        await asyncio.to_thread(salvage, case.path, "now")
    assert sorted(path.name for path in case.path.parent.iterdir()) == before
    await case.journal.add([said()])


async def test_a_file_of_which_nothing_can_be_read_stays_where_it_is(case: Case) -> None:
    await case.journal.close()
    case.path.write_bytes(b"no database" * 1000)
    with pytest.raises(JournalDamaged):
        salvage(case.path, "now")
    assert case.content() == b"no database" * 1000
    assert [path.name for path in case.path.parent.iterdir() if path.stat().st_size] == ["journal.db"]


async def test_a_truncated_file_is_refused_and_left_alone(case: Case) -> None:
    path = await filled(case)
    os.truncate(path, path.stat().st_size // 2)

    assert (await refused(case)).code == "journal_damaged"


async def test_an_emptied_file_is_refused_and_salvaged_from_its_write_ahead_log(case: Case) -> None:
    records = [said(str(number)) for number in range(20)]
    await case.journal.add(records)
    # As they are while it is open: once it is closed, the log is in the file.
    log = case.path.with_name("journal.db-wal").read_bytes()
    await case.journal.close()
    case.path.write_bytes(b"")
    case.path.with_name("journal.db-wal").write_bytes(log)
    assert (await refused(case)).code == "journal_damaged"
    assert case.path.with_name("journal.db-wal").read_bytes() == log

    assert salvage(case.path, "now").waiting == 20
    assert case.path.with_name("journal.db.damaged-now-wal").read_bytes() == log
    later = case.another()
    await later.open()
    assert [entry.record.id for entry in await later.unsynced(100)] == [record.id for record in records]
    await later.close()


async def test_an_empty_file_is_no_new_journal(case: Case) -> None:
    path = await filled(case)
    path.write_bytes(b"")
    error = await refused(case)
    assert (error.code, "the file is empty" in str(error)) == ("journal_damaged", True)
    with pytest.raises(JournalUnavailable, match="damaged"):
        salvage(path, "now")
    assert path.read_bytes() == b""


async def test_a_write_ahead_log_that_cannot_be_read_is_not_ignored(case: Case) -> None:
    await case.journal.add([said()])
    log = bytearray(case.path.with_name("journal.db-wal").read_bytes())
    await case.journal.close()
    log[:32] = b"\xff" * 32
    case.path.with_name("journal.db-wal").write_bytes(log)
    error = await refused(case)
    assert (error.code, "write-ahead log cannot be read" in str(error)) == ("journal_damaged", True)
    assert case.path.with_name("journal.db-wal").read_bytes() == log


async def cut_off(case: Case, records: Sequence[Record]) -> bytes:
    """The journal as a power failure leaves it, each record with a commit of its own. Gives the write-ahead log."""
    for record in records:
        await case.journal.add([record])
    file, log = case.content(), case.path.with_name("journal.db-wal").read_bytes()
    await case.journal.close()
    case.path.write_bytes(file)
    return log


#: Bytes of a frame of the write-ahead log.
FRAME = 24 + 4096


def commits(log: bytes) -> list[int]:
    """The numbers of the frames that end a commit, from 0."""
    heads = range(32, len(log), FRAME)
    return [number for number, at in enumerate(heads) if log[at + 4 : at + 8] != bytes(4)]


def spoilt(log: bytes, frame: int, at: int = 2000) -> bytes:
    changed = bytearray(log)
    changed[32 + frame * FRAME + at] ^= 1
    return bytes(changed)


async def test_a_write_ahead_log_is_damaged_where_commits_follow_what_is_wrong(case: Case) -> None:
    log = await cut_off(case, [said("x" * 3000) for _ in range(5)])
    path, ends = case.path.with_name("spoilt"), commits(log)
    assert (len(log) - 32) // FRAME == ends[-1] + 1
    for frame in range(ends[-1] + 1):
        path.write_bytes(spoilt(log, frame))
        # The last commit may have been cut off: nobody can tell.
        assert bool(wal.damage(path)) is (frame <= ends[-2])
        # Where what is wrong hides that a commit ended there, it takes one more behind it.
        path.write_bytes(spoilt(log, frame, 9))
        assert bool(wal.damage(path)) is (frame <= ends[-2] and frame != ends[-2])
        path.write_bytes(log[: 32 + frame * FRAME + 2000])
        assert not wal.damage(path)


async def test_a_write_ahead_log_that_is_damaged_in_the_middle_is_refused_and_salvaged(case: Case) -> None:
    records = [said(f"number {number}") for number in range(30)]
    log = await cut_off(case, records)
    damaged = spoilt(log, commits(log)[12])
    beside = case.path.with_name("journal.db-wal")
    beside.write_bytes(damaged)
    error = await refused(case)
    assert (error.code, "of its write-ahead log is wrong" in str(error)) == ("journal_damaged", True)
    assert beside.read_bytes() == damaged

    assert salvage(case.path, "now").records >= 29
    assert case.path.with_name("journal.db.damaged-now-wal").read_bytes() == damaged
    later = case.another()
    await later.open()
    kept = ids([entry.record for entry in await later.unsynced(100)])
    await later.close()
    assert kept[-15:] == ids(records[-15:])


async def test_a_commit_that_was_cut_off_is_no_damage(case: Case) -> None:
    records = [said() for _ in range(5)]
    log = await cut_off(case, records)
    case.path.with_name("journal.db-wal").write_bytes(log[:-100])
    later = case.another()
    await later.open()
    assert ids([entry.record for entry in await later.unsynced(100)]) == ids(records[:-1])
    await later.close()


async def test_a_write_ahead_log_that_was_read_while_it_was_written_is_looked_at_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await cut_off(case, [said() for _ in range(5)])
    # The writer was in the middle of a frame when it was read, and two commits further before the end was.
    for frame in range(3):
        reads = iter([spoilt(log, frame), spoilt(log, frame + 1), log])
        monkeypatch.setattr(wal, "_content", lambda path, reads=reads: next(reads))
        assert not wal.damage(case.path)


async def test_a_file_whose_first_page_is_lost_is_refused_and_stays_where_it_is(case: Case) -> None:
    path = await filled(case)
    with path.open("r+b") as file:
        file.write(b"\0" * 4096)
    assert (await refused(case)).code == "journal_damaged"
    before = path.read_bytes()
    with pytest.raises(JournalUnavailable, match="aside together"):
        salvage(path, "now")
    assert path.read_bytes() == before


async def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    case = Case(tmp_path / "journal.db")
    case.path.mkdir()
    with pytest.raises(JournalUnavailable, match="is no file") as caught:
        await case.journal.open()
    assert caught.value.code == "journal_unwritable"


async def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()

    assert (await refused(Case(path))).code == "journal_foreign"


async def test_a_journal_of_a_later_version_is_refused(case: Case) -> None:
    await filled(case)
    case.alter(f"PRAGMA user_version = {journal_file.LAYOUT + 1}")

    assert (await refused(case)).code == "journal_newer"


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JournalUnavailable, match="HEADWATER_JOURNAL_PATH") as caught:
        await Case(tmp_path / "file" / "journal.db").journal.open()
    assert caught.value.code == "journal_unwritable"


async def test_an_sqlite_with_the_lost_commit_fault_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "apsw_version", lambda: (3, 51, 2))
    with pytest.raises(JournalUnavailable, match=r"3\.51\.3") as caught:
        await Case(tmp_path / "journal.db").journal.open()
    assert caught.value.code == "journal_sqlite"


async def test_a_folder_that_is_gone_is_said_and_heals(case: Case) -> None:
    folder = case.path.parent
    away = folder.rename(folder.with_name("away"))
    # As with a disk that is not mounted any more, not even the name can be looked up.
    folder.write_text("")

    with pytest.raises(JournalUnavailable, match="Not a directory") as caught:
        await case.journal.add([said()])
    assert caught.value.code == "journal_unwritable"

    folder.unlink()
    away.rename(folder)
    assert (await case.journal.add([said()])).positions


async def test_nothing_is_acknowledged_into_a_file_that_was_moved_away(case: Case) -> None:
    await case.journal.add([said()])
    case.path.rename(case.path.with_name("aside.db"))

    with pytest.raises(JournalUnavailable) as caught:
        await case.journal.add([said()])
    assert caught.value.code == "journal_moved"


async def test_a_process_that_holds_the_file_for_too_long_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "BUSY_WAIT", 0.05)
    holder = apsw.Connection(str(case.path))
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(JournalUnavailable, match="Another process") as caught:
        await case.journal.add([said()])
    assert caught.value.code == "journal_busy"

    holder.execute("ROLLBACK")
    holder.close()
    record = said()
    await case.journal.add([record])
    assert await case.waiting() == [record.id]


async def test_a_child_after_a_fork_is_told_to_open_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="before a fork"):
        await case.journal.add([said()])


async def test_an_append_whose_caller_gave_up_disturbs_nobody(case: Case) -> None:
    given_up, waited_for = said(), said()
    task = asyncio.create_task(case.journal.add([given_up]))
    await asyncio.sleep(0)
    task.cancel()
    await case.journal.add([waited_for])

    assert task.cancelled() or task.cancelling()
    assert await case.waiting() == [given_up.id, waited_for.id]
