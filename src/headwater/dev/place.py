"""The data folder of one `headwater up`: held by one at a time, and a note in it for the other commands.

The lock is the kernel's (`flock`), so it ends with the process however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import IO

from headwater.errors import HeadwaterError
from headwater.note import LOCK, NOTE, Note


class PlaceTaken(HeadwaterError):
    """The data folder cannot be used: another `headwater up` has it, or it cannot be written."""

    code = "place_taken"


class Place:
    """A data folder that we hold."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def hold(cls, folder: Path) -> Place:
        """Make the folder and take its lock. Raises PlaceTaken with the holder's pid."""
        try:
            if not folder.exists():
                # Chats are in it, and other users of the machine must not read them.
                folder.mkdir(parents=True, mode=0o700)
            lock = _locked(folder / LOCK)
        except OSError as error:
            raise PlaceTaken(
                f"The data folder {folder} cannot be written by {getpass.getuser()} ({error.strerror}). "
                "Choose another: --data-dir or HEADWATER_DATA_DIR."
            ) from None
        if lock is None:
            raise PlaceTaken(
                f"Another `headwater up` ({_holder(folder)}) uses the data folder {folder}. "
                "Stop it first, or choose another folder: --data-dir or HEADWATER_DATA_DIR."
            )
        return cls(folder, lock)

    def write_note(self, note: Note) -> None:
        path = self.folder / NOTE
        # The URLs carry the embedded Redis's password.
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(note), file)

    def secret(self, name: str) -> str:
        """A random word that stays the same from start to start, kept in a file only we can read."""
        path = self.folder / f".{name}"
        with (
            contextlib.suppress(FileExistsError),
            os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
        ):
            file.write(secrets.token_hex(24))
        return path.read_text().strip()

    def release(self) -> None:
        """Give the folder back; nothing of the hold stays behind."""
        for name in (NOTE, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        self._lock.close()


def _locked(path: Path) -> IO[str] | None:
    while True:
        lock = path.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        # The holder before us may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                return lock
        lock.close()


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError):
        pid = (folder / LOCK).read_text().strip()
        if pid:
            return f"process {pid}"
    return "a process that is just starting"
