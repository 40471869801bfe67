"""The journal: what was accepted is on the local disk before anybody hears so.

Records wait here until the syncer has brought them to PostgreSQL; Idempotency-Keys live here
because they must win or lose in the same transaction as what they stand for. SQLite in WAL mode
with a full sync at every commit; several processes may use one file.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.clock import Clock
from headwater.errors import ChatBusy, JournalUnavailable
from headwater.journal import rows
from headwater.journal.file import JournalFile
from headwater.journal.lane import Lane, Work
from headwater.journal.rows import STEP, Added, Alone, Entry, Field, Key, Wish
from headwater.records import Record
from headwater.telemetry import Telemetry

__all__ = ["Added", "Alone", "Backlog", "Entry", "Field", "Journal", "Key", "Wish"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits for the store."""

    count: int
    #: Age of the oldest in milliseconds; None when nothing waits.
    oldest_ms: int | None
    #: Records set aside; they are not in `count`.
    poison: int


class Journal:
    """One journal file. Open it in the process that uses it, after any fork.

    Every call raises JournalUnavailable when the file cannot be used; `code` tells why.
    """

    def __init__(self, path: Path, *, clock: Clock, telemetry: Telemetry) -> None:
        self.path = path
        self._clock = clock
        self._telemetry = telemetry
        self._file = JournalFile(path)
        self._writer = Lane("journal-writer", self._file, writer=True, committed=self._on_commit)
        self._reader = Lane("journal-reader", self._file, writer=False)

    async def open(self) -> None:
        """Make or check the file and start the threads.

        Raises JournalUnavailable: `journal_unwritable`, `journal_damaged`, `journal_newer`,
        `journal_foreign`, `journal_sqlite`. A damaged file is left untouched.
        """
        await asyncio.to_thread(self._file.prepare)
        try:
            await self._writer.open()
            await self._reader.open()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish what is queued and close the file. Harmless when it is not open."""
        await self._reader.close()
        await self._writer.close()

    # --- writing ---------------------------------------------------------------------------------

    async def add(
        self,
        records: Sequence[Record],
        key: Key | None = None,
        alone: Alone | None = None,
        cancels: Sequence[str] = (),
    ) -> Added:
        """Make the records durable, all or none, and in the same step the cancels of these runs.

        When it returns they survive a power cut. If the owner used `key` before, nothing is written and the earlier
        Key is returned. With `alone` it looks once more, in the transaction that writes: when a run has begun in the
        chat since, in whatever process, it writes nothing and raises ChatBusy. Raises JournalUnavailable
        (`storage_full` when the disk is) and RecordRefused.
        """
        at = self._clock.now_ms()
        # Encoded here: what cannot be encoded must not reach the group that others share.
        values = [rows.encoded(record, at) for record in records]
        added = await self._writer.submit(lambda connection: rows.add(connection, values, key, at, alone, cancels))
        if added.busy is not None:
            raise ChatBusy(added.busy)
        if added.positions:
            self._telemetry.count("headwater_journal_records_total", len(added.positions))
        return added

    async def mark_synced(self, positions: Sequence[int]) -> None:
        """The store has these; they stay for reference until `prune`."""
        at = self._clock.now_ms()
        await self._writer.submit(lambda connection: rows.mark(connection, positions, at))

    def mark_soon(self, positions: Sequence[int]) -> None:
        """`mark_synced` for nobody to wait for: what is not marked is only stored once more, which changes nothing."""
        at = self._clock.now_ms()
        try:
            marking = self._writer.post(lambda connection: rows.mark(connection, positions, at))
        except JournalUnavailable as error:
            _not_marked(error)
        else:
            marking.add_done_callback(_marked)

    async def set_aside(self, position: int, reason: str) -> None:
        """The store does not take this record: keep it out of the way, with the reason."""
        text = reason.encode(errors="replace").decode()
        await self._writer.submit(lambda connection: rows.set_aside(connection, position, text))

    async def note_cancel(self, run_id: str) -> None:
        """Keep the wish to cancel a run until `drop_cancels`. Durable at return."""
        at = self._clock.now_ms()
        await self._writer.submit(lambda connection: rows.note_cancel(connection, run_id, at))

    async def drop_cancels(self, run_ids: Sequence[str]) -> None:
        """These runs have ended."""
        await self._writer.submit(lambda connection: rows.drop_cancels(connection, run_ids))

    async def note_wish(self, run_id: str, owner_id: str) -> None:
        """Keep the wish to cancel a run of which nobody can tell now whether it is `owner_id`'s. Durable at return."""
        at = self._clock.now_ms()
        await self._writer.submit(lambda connection: rows.note_wish(connection, (run_id, owner_id), at))

    async def settle_wishes(self, granted: Sequence[Wish], refused: Sequence[Wish]) -> None:
        """Make promised cancels of these wishes, drop those."""
        at = self._clock.now_ms()
        await self._writer.submit(lambda connection: rows.settle_wishes(connection, granted, refused, at))

    async def forget(self, chat_id: str) -> int:
        """Delete every record of a chat, synced or not: the chat was deleted, and so is what it said. Their number."""
        return await self._writer.submit(lambda connection: rows.forget(connection, chat_id))

    async def clear(self) -> int:
        """Delete every record, key and cancel, and give the space back to the disk. The number of records."""
        deleted = await self._writer.submit(rows.clear)
        while await self._writer.submit(rows.shrink, alone=True):
            pass
        return deleted

    async def put_back(self, tries: int = sys.maxsize) -> int:
        """Let every record that was set aside fewer than `tries` times be tried again. Returns their number."""
        return await self._writer.submit(lambda connection: rows.put_back(connection, tries))

    async def prune(self, older_than_ms: int) -> int:
        """Delete what was synced before that Unix time in ms, and old keys; give the space back to the disk.

        Returns the number of records. Done in steps, so that nobody who writes has to wait for all of it.
        """
        deleted = await self._in_steps(lambda connection: rows.delete(connection, older_than_ms))
        await self._in_steps(lambda connection: rows.delete_keys(connection, older_than_ms))
        while await self._writer.submit(rows.shrink, alone=True):
            pass
        return deleted

    async def _in_steps(self, step: Work[int]) -> int:
        total = 0
        while True:
            deleted = await self._writer.submit(step)
            total += deleted
            if deleted < STEP:
                return total

    # --- reading ---------------------------------------------------------------------------------

    async def find_key(self, owner_id: str, key: str) -> Key | None:
        """What an owner's Idempotency-Key stands for."""
        return await self._reader.submit(lambda connection: rows.find_key(connection, owner_id, key))

    async def unsynced(self, limit: int) -> list[Entry]:
        """Records that wait for the store, oldest first, without those set aside; at most `limit`, fewer when large."""
        while True:
            found = await self._reader.submit(lambda connection: rows.waiting(connection, limit))
            entries, unreadable = rows.read(found)
            for position, reason in unreadable:
                logger.error("Record %d of the journal is set aside: it %s", position, reason)
                await self.set_aside(position, reason)
            if entries or not unreadable:
                return entries

    async def aside(self, limit: int) -> list[Entry]:
        """Records that were set aside, with the reasons, oldest first. Those that cannot be read are left out."""
        return rows.read(await self._reader.submit(lambda connection: rows.aside(connection, limit)))[0]

    async def overlay(self, field: Field, value: str) -> list[Record]:
        """Records that are not in the store, also those set aside, oldest first: what a reader lays over its rows."""
        found = await self._reader.submit(lambda connection: rows.unsynced_of(connection, field, value))
        return [entry.record for entry in rows.read(found)[0]]

    async def look(self, chat_id: str) -> Alone:
        """For `add`. Asked for before the look at the chat, so that nothing that comes during it is overlooked."""
        return Alone(chat_id, await self._reader.submit(lambda connection: rows.newest(connection, chat_id)))

    async def unfinished(self, skip: int = 0, *, older_than: float, limit: int) -> list[Record]:
        """The newest records of runs that have not ended as far as this file knows and that the store has not got.

        Journalled more than `older_than` seconds ago; at most `limit`, past the first `skip`.
        """
        before = self._clock.now_ms() - round(older_than * 1000)
        found = await self._reader.submit(lambda connection: rows.unfinished(connection, before, limit, skip))
        return [entry.record for entry in rows.read(found)[0]]

    async def cancels(self, limit: int, after: str = "") -> list[str]:
        """Runs whose cancel was noted, by id, behind `after`."""
        return await self._reader.submit(lambda connection: rows.cancels(connection, after, limit))

    async def cancelled(self, owners: Mapping[str, str]) -> set[str]:
        """Of these runs, each with its owner, those whose cancel was noted, or wished for by the owner."""
        return await self._reader.submit(lambda connection: rows.cancelled(connection, owners))

    async def wishes(self, limit: int, after: Wish = ("", "")) -> list[Wish]:
        """Wishes to cancel that nobody has judged yet, by run, behind `after`."""
        return await self._reader.submit(lambda connection: rows.wishes(connection, after, limit))

    async def kept(self, chat_id: str) -> list[Record]:
        """Every record of a chat in the file, synced or not, oldest first: what to read without PostgreSQL."""
        found = await self._reader.submit(lambda connection: rows.kept(connection, chat_id))
        return [entry.record for entry in rows.read(found)[0]]

    async def kept_chats(self, owner_id: str) -> list[Record]:
        """The chats of an owner that are still in the file, synced or not, oldest first; no messages, no runs."""
        found = await self._reader.submit(lambda connection: rows.kept_chats(connection, owner_id))
        return [entry.record for entry in rows.read(found)[0]]

    async def backlog(self) -> Backlog:
        """How much waits for the store, and for how long."""
        count, oldest, poison = await self._reader.submit(rows.count)
        return Backlog(count, None if oldest is None else max(0, self._clock.now_ms() - oldest), poison)

    async def check(self) -> None:
        """Whether it takes what is new: after a write that failed, another is tried. Raises JournalUnavailable."""
        if self._writer.failed:
            await self._writer.submit(rows.try_room)

    def _on_commit(self, seconds: float) -> None:
        self._telemetry.observe("headwater_journal_commit_seconds", seconds)


def _marked(outcome: asyncio.Future[None]) -> None:
    if not outcome.cancelled() and (error := outcome.exception()) is not None:
        _not_marked(error)


def _not_marked(error: BaseException) -> None:
    logger.warning("Records are stored, which the journal cannot note: %s", error)
