"""The tables of the store. A migration makes them; a test holds the two together.

Neither messages nor runs have a foreign key to chats. Records come from the journals of several
hosts, each in its own order: the answer that one host wrote may arrive before the chat that
another host made. A foreign key would refuse the answer; the records carry owner and chat anyway,
and a deleted chat leaves a tombstone that keeps late records out.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, DateTime, Float, Index, Integer, MetaData, Table, Text, Uuid, text
from sqlalchemy.dialects.postgresql import JSONB

metadata: Final = MetaData(naming_convention={"pk": "%(table_name)s_pkey", "ix": "%(table_name)s_%(column_0_N_name)s"})

#: The states of a run that has not ended, as the partial indices and the queries spell them.
ACTIVE: Final = "state IN ('queued', 'running')"

chats: Final = Table(
    "chats",
    metadata,
    Column("id", Uuid(as_uuid=False), primary_key=True),
    Column("owner_id", Text, nullable=False),
    Column("title", Text),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column("version", Integer, nullable=False),
    # A tombstone: the row stays so that records on their way from a journal find out.
    Column("deleted_at", DateTime(timezone=True)),
)

messages: Final = Table(
    "messages",
    metadata,
    Column("id", Uuid(as_uuid=False), primary_key=True),
    Column("chat_id", Uuid(as_uuid=False), nullable=False),
    Column("owner_id", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("reasoning", Text),
    Column("status", Text, nullable=False),
    Column("parent_id", Uuid(as_uuid=False)),
    Column("run_id", Uuid(as_uuid=False)),
    Column("model", Text),
    Column("usage", JSONB),
    Column("error", JSONB),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("version", Integer, nullable=False),
)

runs: Final = Table(
    "runs",
    metadata,
    Column("id", Uuid(as_uuid=False), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("owner_id", Text, nullable=False),
    Column("chat_id", Uuid(as_uuid=False)),
    Column("message_id", Uuid(as_uuid=False)),
    Column("input", JSONB, nullable=False),
    Column("state", Text, nullable=False),
    Column("stage", Text),
    Column("progress", Float, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("error", JSONB),
    Column("usage", JSONB),
    Column("idempotency_key", Text),
    Column("fingerprint", Text),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("started_at", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True)),
    Column("version", Integer, nullable=False),
    # With defaults, so that a process of an earlier version can still write beside a newer one.
    Column("priority", Text, nullable=False, server_default=text("'normal'")),
    Column("waits_for", JSONB, nullable=False, server_default=text("'[]'::jsonb")),
)

Index(
    "chats_by_owner",
    chats.c.owner_id,
    chats.c.updated_at.desc(),
    chats.c.id.desc(),
    postgresql_where=text("deleted_at IS NULL"),
)
Index("messages_by_chat", messages.c.chat_id, messages.c.created_at, messages.c.id)
Index("runs_by_chat", runs.c.chat_id)
Index("runs_active_by_chat", runs.c.chat_id, postgresql_where=text(ACTIVE))
Index("runs_active_by_age", runs.c.created_at, postgresql_where=text(ACTIVE))
# Not unique on purpose. The journal is what makes a key win once per host; should two hosts have
# accepted the same key, both runs were promised an answer, and a unique index would turn the
# second one into a record that can never be stored. A look-up takes the earliest.
Index(
    "runs_by_key",
    runs.c.owner_id,
    runs.c.idempotency_key,
    runs.c.created_at,
    postgresql_where=text("idempotency_key IS NOT NULL"),
)
