"""Records into rows: a whole batch in a handful of statements, each row only over a lower version.

A batch travels as one JSON parameter per table, so the statements never change with its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from headwater.errors import RecordRefused
from headwater.ids import is_id
from headwater.messages import Chat, Message
from headwater.records import Record, RecordKind
from headwater.runs import Run
from headwater.store.database import Statement

# Every batch takes the locks of its existing chats first and in the order of their ids, then
# inserts in the order of ids: two batches that overlap wait for each other instead of
# deadlocking, and the records of one chat are applied one batch at a time. The lock also keeps a
# deletion from slipping in between the look at the tombstone and the insert.
_LOCK_CHATS: Final = """
    SELECT id FROM chats WHERE id = ANY(CAST(%(ids)s AS uuid[])) ORDER BY id FOR NO KEY UPDATE
"""

# The title is filled once and then left alone: a person's rename, which happens here and not by
# record, must win over the title that was made from the first message.
_CHATS: Final = """
    INSERT INTO chats (id, owner_id, title, created_at, updated_at, version)
    SELECT id, owner_id, title, to_timestamp(created_at / 1000.0), to_timestamp(updated_at / 1000.0), version
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS r
        (id uuid, owner_id text, title text, created_at float8, updated_at float8, version int)
    ORDER BY id
    ON CONFLICT (id) DO UPDATE SET
        title = coalesce(chats.title, excluded.title),
        updated_at = greatest(chats.updated_at, excluded.updated_at),
        version = excluded.version
    WHERE excluded.version > chats.version AND chats.deleted_at IS NULL AND chats.owner_id = excluded.owner_id
"""

_MESSAGES: Final = """
    INSERT INTO messages (id, chat_id, owner_id, role, content, reasoning, status, parent_id, run_id, model,
        usage, error, created_at, version)
    SELECT id, chat_id, owner_id, role, content, reasoning, status, parent_id, run_id, model,
        usage, error, to_timestamp(created_at / 1000.0), version
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS r
        (id uuid, chat_id uuid, owner_id text, role text, content text, reasoning text, status text,
        parent_id uuid, run_id uuid, model text, usage jsonb, error jsonb, created_at float8, version int)
    WHERE NOT EXISTS (SELECT 1 FROM chats WHERE chats.id = r.chat_id AND chats.deleted_at IS NOT NULL)
    ORDER BY id
    ON CONFLICT (id) DO UPDATE SET
        content = excluded.content, reasoning = excluded.reasoning, status = excluded.status,
        parent_id = excluded.parent_id, run_id = excluded.run_id, model = excluded.model,
        usage = excluded.usage, error = excluded.error, version = excluded.version
    WHERE excluded.version > messages.version AND messages.owner_id = excluded.owner_id
"""

_RUNS: Final = """
    INSERT INTO runs (id, kind, owner_id, chat_id, message_id, input, state, stage, progress, attempt,
        error, usage, idempotency_key, fingerprint, created_at, started_at, ended_at, version, priority, waits_for)
    SELECT id, kind, owner_id, chat_id, message_id, input, state, stage, progress, attempt,
        error, usage, idempotency_key, fingerprint, to_timestamp(created_at / 1000.0),
        to_timestamp(started_at / 1000.0), to_timestamp(ended_at / 1000.0), version, priority, waits_for
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS r
        (id uuid, kind text, owner_id text, chat_id uuid, message_id uuid, input jsonb, state text, stage text,
        progress float8, attempt int, error jsonb, usage jsonb, idempotency_key text, fingerprint text,
        created_at float8, started_at float8, ended_at float8, version int, priority text, waits_for jsonb)
    WHERE NOT EXISTS (SELECT 1 FROM chats WHERE chats.id = r.chat_id AND chats.deleted_at IS NOT NULL)
    ORDER BY id
    ON CONFLICT (id) DO UPDATE SET
        state = excluded.state, stage = excluded.stage, progress = excluded.progress, attempt = excluded.attempt,
        error = excluded.error, usage = excluded.usage, started_at = excluded.started_at,
        ended_at = excluded.ended_at, version = excluded.version
    WHERE excluded.version > runs.version AND runs.owner_id = excluded.owner_id
"""

# A chat is as recent as its newest message. Its version stays: this is no change of the chat's own
# fields, and a record with the next version must still find its way in.
_TOUCH: Final = """
    UPDATE chats SET updated_at = r.at
    FROM (
        SELECT chat_id, owner_id, to_timestamp(max(created_at) / 1000.0) AS at
        FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS m (chat_id uuid, owner_id text, created_at float8)
        GROUP BY chat_id, owner_id
    ) AS r
    WHERE chats.id = r.chat_id AND chats.owner_id = r.owner_id AND chats.deleted_at IS NULL
        AND chats.updated_at < r.at
"""

Row = Mapping[str, Any]


def writing(records: Sequence[Record], *, locked: bool = False) -> list[Statement]:
    """What writes the records that are newer than their rows, and leaves out those of deleted chats.

    `locked`: the rows of their chats are locked already. Raises RecordRefused when a record is not what it says it is.
    """
    rows = _newest(records)
    chats, messages, runs = (rows[kind] for kind in (RecordKind.CHAT, RecordKind.MESSAGE, RecordKind.RUN))
    chat_ids = sorted(set(chats) | {row["chat_id"] for row in (*messages.values(), *runs.values()) if row["chat_id"]})
    statements = [Statement(_LOCK_CHATS, {"ids": chat_ids})] if chat_ids and not locked else []
    if chats:
        statements.append(Statement(_CHATS, {"rows": _json(chats.values())}))
    if messages:
        said = {"rows": _json(messages.values())}
        statements += [Statement(_MESSAGES, said), Statement(_TOUCH, said)]
    if runs:
        statements.append(Statement(_RUNS, {"rows": _json(runs.values())}))
    return statements


def _newest(records: Sequence[Record]) -> dict[RecordKind, dict[str, Row]]:
    """The highest version of each id, by kind: one statement may touch a row only once."""
    newest: dict[RecordKind, dict[str, Row]] = {kind: {} for kind in RecordKind}
    for record in records:
        row = _row(record)
        known = newest[record.kind].get(record.id)
        if known is None or row["version"] > known["version"]:
            newest[record.kind][record.id] = row
    return newest


def _row(record: Record) -> Row:
    try:
        # Through the real thing, so that a record with missing or odd members is refused here.
        thing: Chat | Message | Run = record.thing()
        row = {**thing.to_json(), "version": record.version}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordRefused(f"The {record.kind} record {record.id} cannot be read: {error!r}.") from error
    chat_id = row.get("chat_id")
    if row["id"] != record.id or row["owner_id"] != record.owner_id or not _ids(record.id, chat_id):
        raise RecordRefused(f"The {record.kind} record {record.id} and its data do not fit together.")
    return row


def _ids(row_id: Any, chat_id: Any) -> bool:
    return all(isinstance(value, str) and is_id(value) for value in (row_id, chat_id) if value is not None)


def _json(rows: Iterable[Row]) -> str:
    try:
        return orjson.dumps(list(rows)).decode()
    except TypeError as error:
        raise RecordRefused(f"The data cannot be written as JSON: {error}.") from error
