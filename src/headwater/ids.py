"""Identifiers. Every chat, message and run has a UUIDv7: sortable by time, never a secret."""

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
