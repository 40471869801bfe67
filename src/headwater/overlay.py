"""Overlay: what the journal holds already and PostgreSQL does not yet, laid over the store's rows.

A record may be durable in the journal and seconds away from its row, or hours while PostgreSQL is
away. Whoever reads asks both, and the higher version wins, as it will in the store.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from headwater.errors import RecordRefused, StoreUnavailable
from headwater.journal import Field, Journal
from headwater.messages import Chat, Message
from headwater.records import Record
from headwater.runs import Run
from headwater.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Facts:
    """The newest of every row among some records, by id."""

    chats: dict[str, Chat] = field(default_factory=dict)
    messages: dict[str, Message] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Facts:
        facts = cls()
        for record in records:
            facts.add(record.thing())
        facts._touch()
        return facts

    def add(self, thing: Chat | Message | Run) -> None:
        """Take in a row, unless a newer one of its id is here."""
        match thing:
            case Chat():
                self.chats[thing.id] = newer_chat(thing, self.chats.get(thing.id))
            case Message():
                self.messages[thing.id] = newer_message(thing, self.messages.get(thing.id))
            case Run():
                self.runs[thing.id] = newer_run(thing, self.runs.get(thing.id))

    def chat(self, chat_id: str) -> Chat | None:
        """A chat; one of version 0 and without a title when only what was said in it is known."""
        if chat_id in self.chats:
            return self.chats[chat_id]
        said = [message for message in self.messages.values() if message.chat_id == chat_id]
        if not said:
            return None
        times = [message.created_at for message in said]
        return Chat(chat_id, said[0].owner_id, min(times), max(times), version=0)

    def newest_first(self) -> list[Chat]:
        return sorted(self.chats.values(), key=lambda chat: (chat.updated_at, chat.id), reverse=True)

    def in_order(self) -> list[Message]:
        """Messages, oldest first, as the store orders them."""
        return in_order(self.messages.values())

    def _touch(self) -> None:
        # A chat is as recent as its newest message; no record says so, the store works it out as well.
        for message in self.messages.values():
            chat = self.chats.get(message.chat_id)
            if chat is not None and chat.updated_at < message.created_at:
                self.chats[chat.id] = replace(chat, updated_at=message.created_at)


def in_order(messages: Iterable[Message]) -> list[Message]:
    """Oldest first; equal times in the order of their ids, as the store orders them."""
    return sorted(messages, key=lambda message: (message.created_at, message.id))


def newer_chat(one: Chat, other: Chat | None) -> Chat:
    """The higher version; a title once given stays, and so does the later time."""
    if other is None:
        return one
    newest, older = (one, other) if one.version >= other.version else (other, one)
    return replace(newest, title=newest.title or older.title, updated_at=max(newest.updated_at, older.updated_at))


def newer_message(one: Message, other: Message | None) -> Message:
    return other if other is not None and other.version > one.version else one


def newer_run(one: Run, other: Run | None) -> Run:
    return other if other is not None and other.version > one.version else one


class Overlay:
    """Rows as they will be once the syncer is through. Whoever shows one to a caller checks its owner."""

    def __init__(self, store: Store, journal: Journal) -> None:
        self._store = store
        self._journal = journal

    async def facts(self, field: Field, value: str) -> Facts:
        """What only the journal has, for an owner, a chat or one row."""
        return Facts.of(await self._journal.overlay(field, value))

    async def kept(self, chat_id: str) -> Facts:
        """All that this host's journal still has of a chat: what to go by while PostgreSQL is away.

        Of a chat that is older than the journal keeps records, or that other hosts write as well, it is a part.
        """
        return Facts.of(await self._journal.kept(chat_id))

    async def kept_chats(self, owner_id: str) -> list[Chat]:
        """The chats of an owner that this host's journal still has, the latest updated first."""
        return Facts.of(await self._journal.kept_chats(owner_id)).newest_first()

    async def run(self, run_id: str) -> Run | None:
        """Raises StoreUnavailable when only PostgreSQL could know it and is away."""
        ahead = (await self.facts("id", run_id)).runs.get(run_id)
        try:
            row = await self._store.runs.get(run_id)
        except StoreUnavailable:
            if ahead is None:
                raise
            return ahead
        return row if ahead is None else newer_run(ahead, row)

    async def unfinished(self, skip: int = 0, *, older_than: float, limit: int) -> Sequence[Run]:
        """At most `limit` runs that are queued or running for longer than `older_than` seconds, past the first `skip`.

        While PostgreSQL is away, those of them that this host took since: they need not wait for its
        return. Raises StoreUnavailable when there is none.
        """
        try:
            return await self._store.runs.unfinished(skip, older_than=older_than, limit=limit)
        except StoreUnavailable:
            records = await self._journal.unfinished(skip, older_than=older_than, limit=limit)
            if not records:
                raise
            return list(Facts.of(records).runs.values())

    async def message(self, message_id: str) -> Message | None:
        """Raises StoreUnavailable when only PostgreSQL could know it and is away."""
        ahead = (await self.facts("id", message_id)).messages.get(message_id)
        try:
            row = await self._store.chats.message(message_id)
        except StoreUnavailable:
            if ahead is None:
                raise
            return ahead
        return row if ahead is None else newer_message(ahead, row)

    async def carry_over(self, chat_id: str) -> None:
        """Bring the store up to date with a chat now, ahead of the syncer. Raises StoreUnavailable."""
        records = await self._journal.overlay("chat_id", chat_id)
        if not records:
            return
        try:
            await self._store.apply(records)
        except RecordRefused:
            await self._apply_singly(records)

    async def _apply_singly(self, records: Sequence[Record]) -> None:
        for record in records:
            try:
                await self._store.apply([record])
            except RecordRefused as error:
                # The syncer sets it aside and reports it; here it must only not hold up the others.
                logger.warning("the %s record %s is refused: %s", record.kind, record.id, error)
