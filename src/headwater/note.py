"""Where a running `headwater up` answers: its note in the data folder, for every other command of this machine."""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from headwater.settings import Settings, load_settings

LOCK: Final = "up.lock"
NOTE: Final = "up.json"


@dataclass(frozen=True, slots=True)
class Note:
    """Where the parts of a running `headwater up` answer. Other commands read it, so they need no settings."""

    pid: int
    url: str
    redis_url: str
    database_url: str


def read_note(folder: Path) -> Note | None:
    """What the `headwater up` that holds this folder wrote; None when none runs."""
    try:
        note = Note(**json.loads((folder / NOTE).read_text()))
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return note
    except (OSError, ValueError, TypeError):
        return None
    # Nobody holds the lock: the note is from a start that was killed.
    return None


def settings_of_running(**changes: Any) -> Settings:
    """The settings; what they leave unset of the servers is taken from the `headwater up` on the same data folder.

    Changes that are None do not count. Raises SettingsError.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = load_settings(**changes)
    if settings.redis_url and settings.database_url:
        return settings
    note = read_note(settings.data_dir)
    if note is None:
        return settings
    found = {"redis_url": settings.redis_url or note.redis_url}
    if settings.database_url is None:
        found["database_url"] = note.database_url
    return load_settings(**changes, **found)
