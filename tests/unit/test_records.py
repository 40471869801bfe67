"""Records: what travels from the journal to the store."""

from __future__ import annotations

import orjson
import pytest

from headwater.messages import Chat, Message, Role
from headwater.records import Record, RecordKind
from headwater.runs import Run

CHAT = Chat("chat", "local", 1, 2, "A title", 3)
MESSAGE = Message("message", "chat", "local", Role.USER, "text \0 with anything ✓", 5, version=6)
RUN = Run("run", "chat", "local", {"prompt": "hello"}, 1, chat_id="chat", attempt=2)
JOB = Run("job", "shorts", "local", {}, 1)


@pytest.mark.parametrize("thing", [CHAT, MESSAGE, RUN, JOB], ids=lambda thing: thing.id)
def test_a_record_gives_back_what_it_was_made_of(thing: Chat | Message | Run) -> None:
    record = Record.of(thing)
    assert record.thing() == thing
    stored = Record(
        record.kind, record.id, record.version, record.owner_id, record.chat_id, orjson.loads(record.encode())
    )
    assert stored.thing() == thing
    assert stored == record


@pytest.mark.parametrize(
    ("thing", "kind", "chat_id", "version"),
    [
        (CHAT, RecordKind.CHAT, "chat", 3),
        (MESSAGE, RecordKind.MESSAGE, "chat", 6),
        (RUN, RecordKind.RUN, "chat", RUN.version),
        (JOB, RecordKind.RUN, None, 0),
    ],
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_a_record_carries_its_place_beside_its_data(
    thing: Chat | Message | Run, kind: RecordKind, chat_id: str | None, version: int
) -> None:
    record = Record.of(thing)
    assert (record.kind, record.id, record.owner_id) == (kind, thing.id, "local")
    assert (record.chat_id, record.version) == (chat_id, version)
