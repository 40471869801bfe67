"""Chat and Message: what people and models say. Messages of a chat form a tree by `parent_id`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

#: Characters of a title.
TITLE_LENGTH: Final = 60


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class MessageStatus(StrEnum):
    """Where a message is. A user's message is `done` from the start."""

    #: The answer is being made; follow `run_id`.
    PROCESSING = "processing"
    DONE = "done"
    #: The run failed; `content` holds what there was.
    FAILED = "failed"
    #: Somebody stopped it; `content` holds what there was.
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation of one owner."""

    id: str
    owner_id: str
    #: Unix milliseconds.
    created_at: int
    updated_at: int
    #: None until the first message.
    title: str | None = None
    #: Grows with every change.
    version: int = 1

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Chat:
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    `version` is 0 for an answer that is still being made and its run's version once it ended, so
    that the highest attempt wins; a user's message has 0 for ever.
    """

    id: str
    chat_id: str
    owner_id: str
    role: Role
    content: str
    #: Unix milliseconds.
    created_at: int
    status: MessageStatus = MessageStatus.DONE
    #: The message it follows; None for the first of a branch at the root.
    parent_id: str | None = None
    reasoning: str | None = None
    #: The run that makes or made it; None for a user's message.
    run_id: str | None = None
    model: str | None = None
    usage: Mapping[str, Any] | None = None
    #: `{code, message}` of a failed answer.
    error: Mapping[str, Any] | None = None
    version: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Message:
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{**known, "role": Role(known["role"]), "status": MessageStatus(known["status"])})


def flaw_of(text: str) -> str | None:
    """Why a text cannot be stored, as the rest of a sentence about it; None when it can."""
    if "\0" in text:
        return "contains the character NUL, which cannot be stored"
    # Half of a surrogate pair is no character; it comes from a string cut in the middle.
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "contains half of a surrogate pair, which is no valid Unicode"
    return None


def mended(text: str) -> str:
    """Text that JSON, PostgreSQL and every reader can hold: no lone surrogates, no NUL."""
    if "\0" in text:
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            # Joins halves that belong together and replaces those that stand alone.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def title_of(question: str) -> str:
    """A title from the first question: its first line, cut at a word, at most TITLE_LENGTH characters."""
    line = next((line.strip() for line in question.splitlines() if line.strip()), "")
    line = " ".join(line.lstrip("#>*- ").split())
    if len(line) <= TITLE_LENGTH:
        return line or "New chat"
    cut = line[:TITLE_LENGTH]
    return cut.rsplit(" ", 1)[0].rstrip(",.;:") + "…" if " " in cut else cut + "…"


def branch(messages: Mapping[str, Message], leaf_id: str | None) -> list[Message]:
    """The path from the root to `leaf_id`, oldest first. Stops where a parent is missing."""
    path: list[Message] = []
    seen: set[str] = set()
    while leaf_id is not None and leaf_id in messages and leaf_id not in seen:
        seen.add(leaf_id)
        path.append(messages[leaf_id])
        leaf_id = messages[leaf_id].parent_id
    return path[::-1]
