"""Salvage: what can still be read of a damaged journal goes into a new file; the damaged one is kept beside it.

Row by row, by position: a row on a damaged page is lost, the rows on every other page are not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import apsw

from headwater.journal import wal
from headwater.journal.file import JournalFile, damaged, explained, unavailable

_READ: Final = ("", "-wal")
_FILES: Final = ("", "-wal", "-shm")
_COLUMNS: Final = "position, kind, id, version, owner_id, chat_id, data, at, tries, synced_at, poison"
_PUT: Final = {
    "records": f"INSERT INTO records ({_COLUMNS}) VALUES ({', '.join('?' * 11)})",  # noqa: S608 - fixed words
    "keys": "INSERT OR IGNORE INTO keys (owner_id, key, fingerprint, run_id, message_id, at) VALUES (?, ?, ?, ?, ?, ?)",
    "cancels": "INSERT OR IGNORE INTO cancels (run_id, at) VALUES (?, ?)",
    "wishes": "INSERT OR IGNORE INTO wishes (run_id, owner_id, at) VALUES (?, ?, ?)",
}


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What became of a damaged journal."""

    records: int
    #: Of these PostgreSQL does not have yet.
    waiting: int
    #: Positions that hold no readable row; some of them may have been pruned long ago.
    missing: int
    #: Of these, positions whose row is there but not whole, such as one without an id.
    broken: Sequence[int]
    #: Where the damaged file is now.
    aside: Path


def salvage(path: Path, stamp: str) -> Salvaged:
    """Copy, then exchange the files. `stamp` names the damaged one. Nothing else may use the journal meanwhile.

    Raises JournalUnavailable when another process has it open, or when nothing can be read; then
    everything is as it was.
    """
    if not path.exists():
        raise unavailable(f"There is no journal {path}.", "journal_unwritable")
    if path.stat().st_size:
        # Of an empty file SQLite would delete the write-ahead log, which may hold everything.
        _must_be_alone(path)
    fresh = path.with_name(f"{path.name}.salvaged")
    # The damaged file is read from a copy: even opening it may change it.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        copy = Path(folder) / path.name
        for side in _READ:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{side}", f"{copy}{side}")
        if not copy.stat().st_size:
            # With a page, of whatever, SQLite reads the log beside it.
            os.truncate(copy, 4096)
        log = Path(f"{copy}-wal")
        if wal.damage(log):
            wal.fold_in(copy, log)
        _remove(fresh)
        try:
            with explained(path):
                copied = _copy_rows(copy, fresh)
            _must_hold_something(path, copied[0])
        except BaseException:
            _remove(fresh)
            raise
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    # At no moment is there no journal: a start then would begin an empty one.
    os.link(path, aside)
    for side in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{side}").rename(f"{aside}{side}")
    fresh.replace(path)
    return Salvaged(*copied, aside)


def _must_hold_something(path: Path, records: int) -> None:
    if not records:
        raise damaged(path, "no record in it can be read")


def _remove(path: Path) -> None:
    for side in _FILES:
        Path(f"{path}{side}").unlink(missing_ok=True)


def _must_be_alone(path: Path) -> None:
    with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
        # Closing it must not write what the log beside it holds into the damaged file.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("ROLLBACK")
        except (apsw.BusyError, apsw.LockedError) as error:
            raise unavailable(
                f"The journal {path} is in use. Stop every server and worker on it, then salvage it.", "journal_busy"
            ) from error
        except apsw.Error:
            # Too damaged to be locked, so nobody works with it.
            return


def _copy_rows(copy: Path, fresh: Path) -> tuple[int, int, int, list[int]]:
    target = JournalFile(fresh)
    target.prepare()
    with contextlib.closing(apsw.Connection(str(copy))) as source, contextlib.closing(target.connect()) as into:
        last = _last_position(source)
        records, waiting = 0, 0
        broken: list[int] = []
        with into:
            for row in _by_position(source, last):
                try:
                    into.execute(_PUT["records"], row)
                except apsw.ConstraintError:
                    broken.append(row[0])
                    continue
                records += 1
                waiting += row[9] is None
            for table, read in _OTHERS.items():
                for row in read(source):
                    into.execute(_PUT[table], row)
            # Of the positions that were lost none is given again.
            into.execute("DELETE FROM sqlite_sequence WHERE name = 'records'")
            into.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('records', ?)", (last,))
        into.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    return records, waiting, last - records, broken


def _last_position(source: apsw.Connection) -> int:
    """The highest of what the counter, the table and its index say, as far as they can be read."""
    found = [0]
    for ask in (
        "SELECT seq FROM sqlite_sequence WHERE name = 'records'",
        "SELECT max(position) FROM records",
        "SELECT max(position) FROM records INDEXED BY records_unsynced WHERE synced_at IS NULL",
    ):
        with contextlib.suppress(apsw.CorruptError):
            found += [value for (value,) in source.execute(ask) if isinstance(value, int)]
    return max(found)


def _by_position(source: apsw.Connection, last: int) -> Iterator[tuple[Any, ...]]:
    ask = f"SELECT {_COLUMNS} FROM records WHERE position = ?"  # noqa: S608 - fixed words
    for position in range(1, last + 1):
        with contextlib.suppress(apsw.CorruptError):
            yield from source.execute(ask, (position,)).fetchall()


def _until_damage(ask: str) -> Callable[[apsw.Connection], Iterator[tuple[Any, ...]]]:
    def read(source: apsw.Connection) -> Iterator[tuple[Any, ...]]:
        with contextlib.suppress(apsw.CorruptError, apsw.SQLError):
            # The table itself may be missing: layout 1 has no cancels, layout 2 no wishes.
            yield from source.execute(ask)

    return read


_OTHERS: Final = {
    "keys": _until_damage("SELECT owner_id, key, fingerprint, run_id, message_id, at FROM keys"),
    "cancels": _until_damage("SELECT run_id, at FROM cancels"),
    "wishes": _until_damage("SELECT run_id, owner_id, at FROM wishes"),
}
