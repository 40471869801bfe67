"""What is taken and what is refused, without any effect. Pure functions."""

from __future__ import annotations

import hashlib
import re
import uuid
from enum import Enum
from typing import Final

import orjson

from headwater.errors import InvalidInput, KeyReused, NotFound
from headwater.ids import is_id, new_id
from headwater.messages import flaw_of

#: Characters of a title that a person sets.
TITLE_LIMIT: Final = 200
#: An Idempotency-Key: what a client makes, usually a UUID.
KEY_PATTERN: Final = r"^[\x21-\x7e]{1,255}$"


class Unset(Enum):
    """Tells a parent that was not given from one that is None, the root."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


def checked_text(text: str, limit: int) -> str:
    """A message's text as it is. Raises InvalidInput for what is blank, too long or cannot be stored."""
    _storable("content", text)
    if not text.strip():
        raise InvalidInput("content is empty. Write something first.")
    if len(text) > limit:
        raise InvalidInput(f"content has {len(text)} characters; at most {limit} are taken.")
    return text


def checked_title(title: str) -> str:
    """A title on one line. Raises InvalidInput."""
    _storable("title", title)
    line = " ".join(title.split())
    if not line:
        raise InvalidInput("title is empty.")
    if len(line) > TITLE_LIMIT:
        raise InvalidInput(f"title has {len(line)} characters; at most {TITLE_LIMIT} are taken.")
    return line


def checked_key(key: str | None) -> str | None:
    """An Idempotency-Key. Raises InvalidInput."""
    if key is None:
        return None
    # fullmatch: to Python's `$` a line break at the end is none.
    if not re.fullmatch(KEY_PATTERN[1:-1], key):
        raise InvalidInput("Idempotency-Key is not 1 to 255 visible ASCII characters.")
    return key


def checked_id(text: str, what: str) -> str:
    """The id of something that must exist. Raises NotFound: a malformed id names nothing."""
    if not is_id(text):
        raise NotFound(f"There is no such {what}.")
    return text


def fingerprint(verb: str, **fields: str | None) -> str:
    """What a request asks for, as a digest: equal for equal requests."""
    canonical = orjson.dumps({"verb": verb, **fields}, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()


def key_reused() -> KeyReused:
    return KeyReused("This Idempotency-Key came with another request before. Use a new key for a new request.")


def id_of_key(owner_id: str, key: str) -> str:
    """An id that is the same for the same key of the same owner."""
    digest = hashlib.sha256(orjson.dumps([owner_id, key])).digest()
    # Version 8 of RFC 9562 is the one whose bits are ours to choose.
    bits = int.from_bytes(digest[:16]) & ~(0xF << 76) & ~(0x3 << 62)
    return str(uuid.UUID(int=bits | (8 << 76) | (2 << 62)))


def id_pair() -> tuple[str, str]:
    """Ids for a question and its answer, which differ in the last bit only.

    The question sorts right before its answer, though both are made in the same millisecond; and
    whoever knows the answer's id knows the question's, without looking it up in a database that
    may be away.
    """
    stem, last = _split(new_id())
    return f"{stem}{last & ~1:x}", f"{stem}{last | 1:x}"


def question_of(answer_id: str) -> str:
    """The first of an `id_pair`, from the second."""
    stem, last = _split(answer_id)
    return f"{stem}{last & ~1:x}"


def _split(text: str) -> tuple[str, int]:
    return text[:-1], int(text[-1], 16)


def _storable(field: str, text: str) -> None:
    flaw = flaw_of(text)
    if flaw is not None:
        raise InvalidInput(f"{field} {flaw}.")
