"""Identifiers. Every chat, message and run has a UUIDv7: sortable by time, never a secret.

Only a chat that was made with an Idempotency-Key has a UUIDv8, which is made from the key and tells no time.
"""

from __future__ import annotations

import re
from typing import Final

import uuid_utils

#: The canonical text form, in lower case. Routes accept nothing else.
ID_PATTERN: Final = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
_ID = re.compile(ID_PATTERN)


def new_id() -> str:
    """A fresh UUIDv7 in canonical text form."""
    return str(uuid_utils.uuid7())


def is_id(text: str) -> bool:
    """Whether `text` has the canonical form of an id."""
    return _ID.fullmatch(text) is not None


def made_at(text: str) -> int | None:
    """When an id was made, in Unix milliseconds; None when it does not tell. RFC 9562, 5.7."""
    return int(text[:8] + text[9:13], 16) if text[14] == "7" else None


def is_of_key(text: str) -> bool:
    """Whether an id was made from an Idempotency-Key."""
    return text[14] == "8"
