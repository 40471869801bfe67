"""Ids that were made at another time."""

from __future__ import annotations

from headwater.clock import Clock, SystemClock
from headwater.ids import new_id


def id_made(seconds_ago: float, clock: Clock | None = None) -> str:
    """An id as it was made then; of the future, when it is negative."""
    made = (clock or SystemClock()).now_ms() - round(seconds_ago * 1000)
    return f"{made >> 16:08x}-{made & 0xFFFF:04x}{new_id()[13:]}"


def old_id() -> str:
    """An id of a day ago: what has it and is known to nobody, does not exist."""
    return id_made(86_400)


def alien_id() -> str:
    """A random UUID (version 4), as nobody here makes one: it never names anything."""
    return f"{new_id()[:14]}4{new_id()[15:]}"
