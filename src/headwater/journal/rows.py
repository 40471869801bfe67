"""The journal's statements: what one job does with the connection of its thread."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import apsw
import orjson

from headwater.errors import RecordRefused
from headwater.records import Record, RecordKind

#: Bytes of data after which `waiting` stops, whatever its limit, to bound memory and transactions.
BATCH_BYTES: Final = 2 * 1024 * 1024
#: Rows deleted, and pages given back, in one step of a prune; others may write in between.
STEP: Final = 1000
#: Bytes that must find room again after a write that found none.
ROOM: Final = 64 * 1024

#: What records are asked for by.
Field = Literal["id", "chat_id", "owner_id"]
#: A run, and who wants it cancelled without having been found to own it.
Wish = tuple[str, str]

_ENTRIES: Final = "SELECT position, kind, id, version, owner_id, chat_id, data, at, tries, poison FROM records"
_INSERT: Final = "INSERT INTO records (kind, id, version, owner_id, chat_id, data, at) VALUES (?, ?, ?, ?, ?, ?, ?)"
_FIND_KEY: Final = "SELECT owner_id, key, fingerprint, run_id, message_id FROM keys WHERE owner_id = ? AND key = ?"
_INSERT_KEY: Final = "INSERT INTO keys (owner_id, key, fingerprint, run_id, message_id, at) VALUES (?, ?, ?, ?, ?, ?)"
_MARK: Final = "UPDATE records SET synced_at = ?, poison = NULL WHERE position = ? AND synced_at IS NULL"
_SET_ASIDE: Final = "UPDATE records SET poison = ?, tries = tries + 1 WHERE position = ? AND synced_at IS NULL"
_PUT_BACK: Final = "UPDATE records SET poison = NULL WHERE poison IS NOT NULL AND synced_at IS NULL AND tries < ?"
_WAITING: Final = f"{_ENTRIES} WHERE synced_at IS NULL AND poison IS NULL ORDER BY position LIMIT ?"
_ASIDE: Final = f"{_ENTRIES} WHERE poison IS NOT NULL ORDER BY position LIMIT ?"
_UNSYNCED: Final = {
    field: f"{_ENTRIES} WHERE synced_at IS NULL AND {field} = ? ORDER BY position"
    for field in ("id", "chat_id", "owner_id")
}
_KEPT: Final = f"{_ENTRIES} WHERE chat_id = ? ORDER BY position"
_KEPT_CHATS: Final = f"{_ENTRIES} WHERE owner_id = ? AND kind = 'chat' ORDER BY position"
_TAKE_BACK: Final = "DELETE FROM records WHERE position = ?"
_NEWEST: Final = "SELECT max(position) FROM records WHERE chat_id = ?"
# Version 0: queued for the first time. What an earlier run still says about itself is no new one.
_BEGUN: Final = """
    SELECT id FROM records WHERE chat_id = ? AND position > ? AND kind = 'run' AND version = 0 ORDER BY position LIMIT 1
"""
# Queued and running are the lowest two ranks of an attempt.
_UNFINISHED: Final = f"""
    {_ENTRIES} AS newest
    WHERE synced_at IS NULL AND kind = 'run' AND at < ? AND version % 4 < 2 AND NOT EXISTS (
        SELECT 1 FROM records AS newer
        WHERE newer.id = newest.id AND newer.synced_at IS NULL
        AND (newer.version, newer.position) > (newest.version, newest.position)
    )
    ORDER BY position LIMIT ? OFFSET ?
"""  # noqa: S608 - fixed words
_NOTE_CANCEL: Final = "INSERT OR IGNORE INTO cancels (run_id, at) VALUES (?, ?)"
_CANCELS: Final = "SELECT run_id FROM cancels WHERE run_id > ? ORDER BY run_id LIMIT ?"
_DROP_CANCEL: Final = "DELETE FROM cancels WHERE run_id = ?"
_DELETE_CANCELS: Final = "DELETE FROM cancels WHERE at < ?"
_NOTE_WISH: Final = "INSERT OR IGNORE INTO wishes (run_id, owner_id, at) VALUES (?, ?, ?)"
_WISHES: Final = """
    SELECT run_id, owner_id FROM wishes WHERE (run_id, owner_id) > (?, ?) ORDER BY run_id, owner_id LIMIT ?
"""
# By the runs that were asked about, so that it costs nothing how many others there are.
_CANCELLED: Final = """
    SELECT noted.run_id FROM json_each(?) AS held JOIN cancels AS noted ON noted.run_id = held.key
    UNION
    SELECT wished.run_id FROM json_each(?) AS held
    JOIN wishes AS wished ON (wished.run_id, wished.owner_id) = (held.key, held.value)
"""
_DROP_WISH: Final = "DELETE FROM wishes WHERE run_id = ? AND owner_id = ?"
_DELETE_WISHES: Final = "DELETE FROM wishes WHERE at < ?"
_FORGET: Final = "DELETE FROM records WHERE chat_id = ?"
_COUNT: Final = """
    SELECT count(*), min(position) FROM records INDEXED BY records_unsynced
    WHERE synced_at IS NULL AND poison IS NULL
"""
_AT: Final = "SELECT at FROM records WHERE position = ?"
_COUNT_POISON: Final = "SELECT count(*) FROM records WHERE poison IS NOT NULL"
_DELETE: Final = """
    DELETE FROM records WHERE position IN (SELECT position FROM records WHERE synced_at < ? LIMIT ?)
"""
# A key outlives its time while its run is here only: nobody else could tell of it.
_DELETE_KEYS: Final = """
    DELETE FROM keys WHERE (owner_id, key) IN (
        SELECT owner_id, key FROM keys WHERE at < ? AND NOT EXISTS (
            SELECT 1 FROM records WHERE records.id = keys.run_id AND records.synced_at IS NULL
        ) LIMIT ?
    )
"""


@dataclass(frozen=True, slots=True)
class Key:
    """An Idempotency-Key and what it stands for."""

    owner_id: str
    key: str
    #: Of the request's body: the same key with another body is a mistake of the caller.
    fingerprint: str
    run_id: str
    message_id: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A journalled record that is not in the store yet."""

    #: Grows with every record; the order in which records are applied.
    position: int
    record: Record
    #: Unix milliseconds of the append.
    at: int
    #: How often it was set aside.
    tries: int
    #: Why it is set aside; None for a record that waits.
    poison: str | None = None


@dataclass(frozen=True, slots=True)
class Alone:
    """A chat as somebody looked at it, to append only while no further run has begun there."""

    chat_id: str
    #: The chat's newest position before the look; 0 for none.
    seen: int


@dataclass(frozen=True, slots=True)
class Added:
    """What an append did: the earlier key and no positions, or the positions of the records."""

    earlier: Key | None
    positions: Sequence[int]
    #: A run that began in the chat since it was looked at; then nothing was written.
    busy: str | None = None


def encoded(record: Record, at: int) -> tuple[Any, ...]:
    """A record as the values of a row. Raises RecordRefused."""
    try:
        data = record.encode()
    except TypeError as error:
        raise RecordRefused(f"The {record.kind} record {record.id} cannot be written as JSON: {error}.") from error
    return record.kind.value, record.id, record.version, record.owner_id, record.chat_id, data, at


def read(rows: Sequence[Any]) -> tuple[list[Entry], list[tuple[int, str]]]:
    """Rows as entries, and the positions of those that are none: written by a later version, or changed by hand."""
    entries: list[Entry] = []
    unreadable: list[tuple[int, str]] = []
    for position, kind, row_id, version, owner_id, chat_id, data, at, tries, poison in rows:
        try:
            record = Record(RecordKind(kind), row_id, version, owner_id, chat_id, orjson.loads(data))
        except ValueError as error:
            unreadable.append((position, f"cannot be read: {error}"))
        else:
            entries.append(Entry(position, record, at, tries, poison))
    return entries, unreadable


def add(
    connection: apsw.Connection,
    rows: Sequence[tuple[Any, ...]],
    key: Key | None,
    at: int,
    alone: Alone | None = None,
    cancels: Sequence[str] = (),
) -> Added:
    """Insert the rows and cancels unless the key was used before, or a run began since `alone` was looked at."""
    if key is not None:
        earlier = find_key(connection, key.owner_id, key.key)
        if earlier is not None:
            return Added(earlier, ())
    if alone is not None:
        begun = connection.execute(_BEGUN, (alone.chat_id, alone.seen)).fetchone()
        if begun is not None:
            return Added(None, (), begun[0])
    if key is not None:
        connection.execute(_INSERT_KEY, (key.owner_id, key.key, key.fingerprint, key.run_id, key.message_id, at))
    positions = []
    for row in rows:
        connection.execute(_INSERT, row)
        positions.append(connection.last_insert_rowid())
    for run_id in cancels:
        note_cancel(connection, run_id, at)
    return Added(None, positions)


def find_key(connection: apsw.Connection, owner_id: str, key: str) -> Key | None:
    row = connection.execute(_FIND_KEY, (owner_id, key)).fetchone()
    return None if row is None else Key(*row)


def mark(connection: apsw.Connection, positions: Sequence[int], at: int) -> None:
    connection.executemany(_MARK, [(at, position) for position in positions])


def set_aside(connection: apsw.Connection, position: int, reason: str) -> None:
    connection.execute(_SET_ASIDE, (reason, position))


def put_back(connection: apsw.Connection, tries: int) -> int:
    connection.execute(_PUT_BACK, (tries,))
    return connection.changes()


def waiting(connection: apsw.Connection, limit: int) -> list[Any]:
    """The oldest rows that wait, until `limit` rows or BATCH_BYTES."""
    rows: list[Any] = []
    size = 0
    with contextlib.closing(connection.cursor()) as cursor:
        for row in cursor.execute(_WAITING, (limit,)):
            rows.append(row)
            size += len(row[6])
            if size >= BATCH_BYTES:
                break
    return rows


def aside(connection: apsw.Connection, limit: int) -> list[Any]:
    return connection.execute(_ASIDE, (limit,)).fetchall()


def unsynced_of(connection: apsw.Connection, field: Field, value: str) -> list[Any]:
    return connection.execute(_UNSYNCED[field], (value,)).fetchall()


def kept(connection: apsw.Connection, chat_id: str) -> list[Any]:
    """All rows of a chat, synced or not."""
    return connection.execute(_KEPT, (chat_id,)).fetchall()


def kept_chats(connection: apsw.Connection, owner_id: str) -> list[Any]:
    """The chat rows of an owner, synced or not."""
    return connection.execute(_KEPT_CHATS, (owner_id,)).fetchall()


def newest(connection: apsw.Connection, chat_id: str) -> int:
    """The position of a chat's newest row; 0 for none."""
    return _first(connection, _NEWEST, chat_id)[0] or 0


def unfinished(connection: apsw.Connection, before: int, limit: int, skip: int) -> list[Any]:
    """The newest row of each run that waits for the store and has not ended."""
    return connection.execute(_UNFINISHED, (before, limit, skip)).fetchall()


def note_cancel(connection: apsw.Connection, run_id: str, at: int) -> None:
    connection.execute(_NOTE_CANCEL, (run_id, at))


def cancels(connection: apsw.Connection, after: str, limit: int) -> list[str]:
    return [str(row[0]) for row in connection.execute(_CANCELS, (after, limit)).fetchall()]


def drop_cancels(connection: apsw.Connection, run_ids: Sequence[str]) -> None:
    connection.executemany(_DROP_CANCEL, [(run_id,) for run_id in run_ids])


def cancelled(connection: apsw.Connection, owners: Mapping[str, str]) -> set[str]:
    held = orjson.dumps(owners).decode()
    return {str(row[0]) for row in connection.execute(_CANCELLED, (held, held)).fetchall()}


def note_wish(connection: apsw.Connection, wish: Wish, at: int) -> None:
    connection.execute(_NOTE_WISH, (*wish, at))


def wishes(connection: apsw.Connection, after: Wish, limit: int) -> list[Wish]:
    return [(str(row[0]), str(row[1])) for row in connection.execute(_WISHES, (*after, limit)).fetchall()]


def settle_wishes(connection: apsw.Connection, granted: Sequence[Wish], refused: Sequence[Wish], at: int) -> None:
    connection.executemany(_NOTE_CANCEL, [(run_id, at) for run_id, _ in granted])
    connection.executemany(_DROP_WISH, [*granted, *refused])


def try_room(connection: apsw.Connection) -> None:
    """Write as much as a long message takes, and leave nothing."""
    connection.execute(_INSERT, ("", "", 0, "", None, bytes(ROOM), 0))
    connection.execute(_TAKE_BACK, (connection.last_insert_rowid(),))


def forget(connection: apsw.Connection, chat_id: str) -> int:
    connection.execute(_FORGET, (chat_id,))
    return connection.changes()


def clear(connection: apsw.Connection) -> int:
    """Delete everything. Positions go on: none is given twice. Returns the number of records."""
    connection.execute("DELETE FROM records")
    deleted = connection.changes()
    connection.execute("DELETE FROM keys")
    connection.execute("DELETE FROM cancels")
    connection.execute("DELETE FROM wishes")
    return deleted


def count(connection: apsw.Connection) -> tuple[int, int | None, int]:
    """How many wait, when the first of them was appended, how many are set aside."""
    waiting_rows, oldest = _first(connection, _COUNT)
    at = connection.execute(_AT, (oldest,)).fetchone()
    return waiting_rows, at[0] if at else None, _first(connection, _COUNT_POISON)[0]


def _first(connection: apsw.Connection, statement: str, *values: Any) -> Any:
    return next(iter(connection.execute(statement, values)))


def delete(connection: apsw.Connection, before: int) -> int:
    """One step of pruning records; fewer than STEP when none is left."""
    connection.execute(_DELETE, (before, STEP))
    return connection.changes()


def delete_keys(connection: apsw.Connection, before: int) -> int:
    """One step of pruning keys, and cancels of runs that nobody has ended; fewer than STEP when none is left."""
    connection.execute(_DELETE_CANCELS, (before,))
    connection.execute(_DELETE_WISHES, (before,))
    connection.execute(_DELETE_KEYS, (before, STEP))
    return connection.changes()


def shrink(connection: apsw.Connection) -> bool:
    """Give some free pages back; whether there are more. After the last step the file itself is cut."""
    # The statement gives back one page a step, so it is read to its end.
    connection.execute(f"PRAGMA incremental_vacuum({STEP})").fetchall()
    if connection.pragma("freelist_count"):
        return True
    with contextlib.suppress(apsw.BusyError, apsw.LockedError):
        # Another process is reading: an automatic checkpoint will cut the file later.
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    return False
