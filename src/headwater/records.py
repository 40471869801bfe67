"""Record: one fact on its way from the journal to the store.

A record is a whole row with a version. Applying it is idempotent and order-free per id: it is
written only over a lower version. So a record may be applied twice, by two syncers, or late, and
the store ends the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from headwater.messages import Chat, Message
from headwater.runs import Run


class RecordKind(StrEnum):
    CHAT = "chat"
    MESSAGE = "message"
    RUN = "run"


@dataclass(frozen=True, slots=True)
class Record:
    """A row as JSON values."""

    kind: RecordKind
    #: The row's id.
    id: str
    version: int
    owner_id: str
    #: The chat it belongs to; records of one chat are applied in the order they were journalled.
    chat_id: str | None
    data: Mapping[str, Any]

    @classmethod
    def of(cls, thing: Chat | Message | Run) -> Record:
        """The record of a chat, a message or a run as it stands."""
        if isinstance(thing, Chat):
            return cls(RecordKind.CHAT, thing.id, thing.version, thing.owner_id, thing.id, thing.to_json())
        kind = RecordKind.RUN if isinstance(thing, Run) else RecordKind.MESSAGE
        return cls(kind, thing.id, thing.version, thing.owner_id, thing.chat_id, thing.to_json())

    def thing(self) -> Chat | Message | Run:
        """What `of` was given."""
        match self.kind:
            case RecordKind.CHAT:
                return Chat.from_json(self.data)
            case RecordKind.MESSAGE:
                return Message.from_json(self.data)
            case RecordKind.RUN:
                return Run.from_json(self.data)

    def encode(self) -> bytes:
        """The row's data as JSON bytes, for the journal."""
        return orjson.dumps(self.data)
