"""The journal's file: how it is made, opened and checked, and what SQLite's errors mean.

A file that exists is never made again: it may hold the only copy of something that was accepted.
Whatever is wrong with it is said, with what to do, and left to a person.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import apsw

from headwater.errors import (
    HeadwaterError,
    JournalBusy,
    JournalDamaged,
    JournalFull,
    JournalUnavailable,
    RecordRefused,
)
from headwater.journal import wal

#: SQLite up to 3.51.2 can lose committed transactions in WAL mode with several connections.
OLDEST_SQLITE: Final = (3, 51, 3)
#: Marks the file as ours ("hwjr"), and the layout of its tables.
APPLICATION_ID: Final = 0x68776A72
LAYOUT: Final = 3
#: Seconds a writer waits for another process's commit.
BUSY_WAIT: Final = 5.0
#: Bytes to which the write-ahead log is cut back after a checkpoint.
WAL_LIMIT: Final = 16 * 1024 * 1024

#: Since layout 2 the cancels that were promised and are not through yet; since layout 3 the wishes for one that came
#: while nobody could tell whose the run is. A stranger's wish must not displace the owner's, hence the key of two.
_CANCELS: Final = """
CREATE TABLE IF NOT EXISTS cancels (run_id TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS wishes (
    run_id TEXT NOT NULL,
    owner_id TEXT NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (run_id, owner_id)
) WITHOUT ROWID;
"""

_SCHEMA: Final = f"""
CREATE TABLE records (
    -- AUTOINCREMENT: a position is never given twice, also when the newest rows were pruned.
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    version INTEGER NOT NULL,
    owner_id TEXT NOT NULL,
    chat_id TEXT,
    data BLOB NOT NULL,
    at INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    synced_at INTEGER,
    poison TEXT
);
CREATE INDEX records_unsynced ON records (position, poison) WHERE synced_at IS NULL;
CREATE INDEX records_by_id ON records (id) WHERE synced_at IS NULL;
-- Also of what is synced: until it is pruned, it is what can be read while PostgreSQL is away.
CREATE INDEX records_by_chat ON records (chat_id);
CREATE INDEX records_chats ON records (owner_id) WHERE kind = 'chat';
CREATE INDEX records_poison ON records (position) WHERE poison IS NOT NULL;
CREATE INDEX records_synced ON records (synced_at) WHERE synced_at IS NOT NULL;
CREATE TABLE keys (
    owner_id TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    run_id TEXT NOT NULL,
    message_id TEXT,
    at INTEGER NOT NULL,
    PRIMARY KEY (owner_id, key)
) WITHOUT ROWID;
CREATE INDEX keys_by_age ON keys (at);
{_CANCELS}
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {LAYOUT};
"""


class JournalFile:
    """One SQLite file, which several processes may have open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: int | None = None

    def prepare(self) -> None:
        """Make the file unless it exists, and check it when it does. Raises JournalUnavailable."""
        if apsw_version() < OLDEST_SQLITE:
            raise unavailable(
                f"The journal needs SQLite {_dotted(OLDEST_SQLITE)} or later; "
                f"apsw brings {apsw.sqlite_lib_version()}. Install a later apsw.",
                "journal_sqlite",
            )
        try:
            with explained(self.path), self._alone():
                self._make_or_check()
                self._inode = self.path.stat().st_ino
        except OSError as error:
            raise unavailable(
                f"The journal's folder {self.path.parent} cannot be written: {error.strerror}. "
                "Make it writable or set HEADWATER_JOURNAL_PATH.",
                "journal_unwritable",
            ) from error

    def connect(self) -> apsw.Connection:
        """A connection for the thread that calls."""
        return self._connect(self.path)

    def _connect(self, path: Path) -> apsw.Connection:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        connection.set_busy_handler(_wait_briefly())
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")
        # What is deleted is overwritten: a chat that was taken back must not be found on the disk.
        connection.execute("PRAGMA secure_delete = ON")
        return connection

    def check_in_place(self) -> None:
        """Raise JournalUnavailable when the file was moved away: what is written to it then is lost at the end."""
        try:
            if self.path.stat().st_ino == self._inode:
                return
        except FileNotFoundError:
            pass
        raise unavailable(f"The journal {self.path} was moved while in use. Start headwater again.", "journal_moved")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time makes or checks the file. The lock is on the folder and leaves nothing behind.

        Not on the file: closing any descriptor of it would drop the locks that SQLite holds in this process.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _make_or_check(self) -> None:
        if not self.path.exists():
            self._make()
        elif not self.path.is_file():
            raise unavailable(
                f"The journal {self.path} is no file. Move it away or set HEADWATER_JOURNAL_PATH.", "journal_unwritable"
            )
        elif not os.access(self.path, os.W_OK):
            raise unavailable(
                f"The journal {self.path} cannot be written. Check its owner and mode.", "journal_unwritable"
            )
        # Before SQLite sees it: it deletes the write-ahead log of an empty file, and ignores what it cannot read.
        if self.path.stat().st_size == 0:
            raise damaged(self.path, "the file is empty")
        if wrong := wal.damage(self.path.with_name(f"{self.path.name}-wal")):
            raise damaged(self.path, wrong)
        connection = self.connect()
        try:
            self._check(connection)
        finally:
            connection.close()

    def _make(self) -> None:
        """Made beside and moved into place, so that an empty file is never a journal that was only begun."""
        fresh = self.path.with_name(f"{self.path.name}.new")
        for side in ("", "-wal", "-shm"):
            fresh.with_name(f"{fresh.name}{side}").unlink(missing_ok=True)
        # SQLite gives its side files the mode of the file.
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        connection = self._connect(fresh)
        try:
            # Before the first table; later it would take a rewrite of the whole file.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            with connection:
                connection.execute(_SCHEMA)
        finally:
            connection.close()
        fresh.replace(self.path)

    def _check(self, connection: apsw.Connection) -> None:
        # Reading the header comes first: nothing may be written to a file that is not ours.
        if connection.pragma("application_id") != APPLICATION_ID:
            raise unavailable(
                f"{self.path} is a database of another program. Set HEADWATER_JOURNAL_PATH to another file.",
                "journal_foreign",
            )
        if connection.pragma("user_version") > LAYOUT:
            raise unavailable(
                f"The journal {self.path} was made by a later version of headwater. Install that version.",
                "journal_newer",
            )
        for (verdict,) in connection.execute("PRAGMA quick_check(1)"):
            if verdict != "ok":
                raise damaged(self.path, str(verdict).strip().splitlines()[-1])
        if connection.pragma("user_version") < LAYOUT:
            with connection:
                connection.execute(f"{_CANCELS} PRAGMA user_version = {LAYOUT};")


def apsw_version() -> tuple[int, ...]:
    """The version of the SQLite inside apsw."""
    return tuple(int(part) for part in apsw.sqlite_lib_version().split(".")[:3])


def unavailable(message: str, code: str) -> JournalUnavailable:
    kinds = {kind.code: kind for kind in (JournalFull, JournalBusy, JournalDamaged)}
    error = kinds.get(code, JournalUnavailable)(message)
    error.code = code
    return error


def damaged(path: Path, reason: str) -> JournalUnavailable:
    return unavailable(
        f"The journal {path} is damaged ({reason}). It may hold messages that are not in PostgreSQL yet, so it is "
        f"left as it is. Stop what uses it and run `headwater journal salvage`, which copies what can be read into a "
        f"new file and keeps this one. To go on without it, move {path.name} and the files {path.name}-wal and "
        f"{path.name}-shm aside together, and keep them.",
        "journal_damaged",
    )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except (apsw.Error, UnicodeError, OverflowError) as error:
        raise explain(error, path) from error


def explain(error: Exception, path: Path) -> Exception:
    """What an exception of a statement means to the caller. Ours and unknown ones stay as they are."""
    match error:
        case HeadwaterError():
            return error
        case apsw.FullError() | apsw.IOError():
            return unavailable(f"The journal {path} cannot grow: {error}. Free space on its disk.", "storage_full")
        case apsw.CorruptError() | apsw.NotADBError():
            return damaged(path, str(error))
        case apsw.BusyError() | apsw.LockedError():
            return unavailable(f"Another process has held the journal {path} for {BUSY_WAIT:.0f} s.", "journal_busy")
        case apsw.CantOpenError() | apsw.ReadOnlyError() | apsw.PermissionsError():
            return unavailable(f"The journal {path} cannot be written: {error}. Check its mode.", "journal_unwritable")
        case apsw.TooBigError() | UnicodeError() | OverflowError():
            return RecordRefused(f"The journal cannot hold this data: {error}.")
        case OSError():
            text = f"The journal {path} cannot be reached: {error.strerror}. Check its folder and the disk."
            return unavailable(text, "journal_unwritable")
        case apsw.Error():
            return unavailable(f"The journal {path} cannot be used: {error}.", "journal_failed")
    return error


def _wait_briefly() -> Callable[[int], bool]:
    """A busy handler that looks again soon: another process's commit takes about a millisecond.

    SQLite's own waits up to 100 ms between two looks.
    """
    begun = 0.0

    def wait(times: int) -> bool:
        nonlocal begun
        now = time.monotonic()
        if times == 0:
            begun = now
        time.sleep(0.0005 if times < 20 else 0.005)
        return now - begun < BUSY_WAIT

    return wait


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
