"""Chats and their messages, as they are read and as a person changes them."""

from __future__ import annotations

import base64
import binascii
import builtins
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, and_, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from headwater.clock import to_datetime, to_ms
from headwater.errors import BadCursor, NotFound
from headwater.ids import is_id
from headwater.messages import Chat, Message, MessageStatus, Role
from headwater.records import Record
from headwater.runs import Run
from headwater.store.apply import apply
from headwater.store.database import Database
from headwater.store.runs import active_runs
from headwater.store.tables import chats, messages, runs

#: The end of 9999 in Unix milliseconds: what a datetime can hold.
_LAST_MS: Final = 253_402_300_799_000


class Chats:
    """Every call takes the owner; what belongs to another owner is not found."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(
        self, owner_id: str, *, after: str | None, limit: int, query: str | None = None
    ) -> tuple[list[Chat], str | None]:
        """A page of an owner's chats, the latest updated first, and the token of the next page.

        `query` is looked for in the titles, in any case of letters. Raises BadCursor.
        """
        statement = select(chats).where(chats.c.owner_id == owner_id, chats.c.deleted_at.is_(None))
        if after is not None:
            at, chat_id = _parse_token(after)
            earlier = or_(chats.c.updated_at < at, and_(chats.c.updated_at == at, chats.c.id < chat_id))
            # The first half is implied by the second; it lets the index find the place.
            statement = statement.where(chats.c.updated_at <= at, earlier)
        if query:
            if not _storable(query):
                return [], None
            statement = statement.where(chats.c.title.icontains(query, autoescape=True))
        # One more than asked for tells whether a further page exists.
        statement = statement.order_by(chats.c.updated_at.desc(), chats.c.id.desc()).limit(limit + 1)
        rows = await self._database.run(lambda connection: _all(connection, statement))
        found = [_chat(row) for row in rows[:limit]]
        return found, _token(rows[limit - 1]) if len(rows) > limit else None

    async def get(self, owner_id: str, chat_id: str) -> Chat:
        """One chat. Raises NotFound."""
        if not is_id(chat_id):
            raise _not_found()
        statement = select(chats).where(_is(owner_id, chat_id))
        rows = await self._database.run(lambda connection: _all(connection, statement))
        if not rows:
            raise _not_found()
        return _chat(rows[0])

    async def exists(self, chat_id: str) -> bool:
        """Whether there is or was such a chat, whoever owns it: one that was deleted left its tombstone."""
        statement = select(chats.c.id).where(chats.c.id == chat_id)
        return bool(await self._database.run(lambda connection: _all(connection, statement)))

    async def rename(self, owner_id: str, chat_id: str, title: str, at: int) -> Chat:
        """Give a chat a title, which from then on no record replaces. `at` in Unix ms. Raises NotFound."""
        if not is_id(chat_id):
            raise _not_found()
        statement = (
            update(chats)
            .where(_is(owner_id, chat_id))
            .values(
                title=title,
                updated_at=func.greatest(chats.c.updated_at, to_datetime(at)),
                version=chats.c.version + 1,
            )
            .returning(chats)
        )
        rows = await self._database.run(lambda connection: _all(connection, statement))
        if not rows:
            raise _not_found()
        return _chat(rows[0])

    async def delete(self, owner_id: str, chat_id: str, at: int) -> None:
        """Remove a chat with its messages and runs; a bare tombstone stays. `at` in Unix ms. Raises NotFound."""
        if not is_id(chat_id):
            raise _not_found()

        async def work(connection: AsyncConnection) -> None:
            tombstone = (
                update(chats)
                .where(_is(owner_id, chat_id))
                .values(title=None, deleted_at=to_datetime(at), version=chats.c.version + 1)
            )
            if (await connection.execute(tombstone)).rowcount == 0:
                raise _not_found()
            # The tombstone's row lock holds off `apply`, so no message can come in behind these.
            await connection.execute(delete(messages).where(messages.c.chat_id == chat_id))
            await connection.execute(delete(runs).where(runs.c.chat_id == chat_id))

        await self._database.run(work)

    async def messages(self, owner_id: str, chat_id: str) -> builtins.list[Message]:
        """All messages of a chat, oldest first; none when the chat is not the owner's or was deleted."""
        if not is_id(chat_id):
            return []
        return await self._database.run(lambda connection: chat_messages(connection, owner_id, chat_id))

    async def message(self, message_id: str) -> Message | None:
        """One message, whoever owns it: the caller checks the owner."""
        if not is_id(message_id):
            return None
        statement = select(messages).where(messages.c.id == message_id)
        rows = await self._database.run(lambda connection: _all(connection, statement))
        return _message(rows[0]) if rows else None


class Turn:
    """A chat that is locked for one turn; another turn of the same chat waits, in any process.

    Inside, write with `apply`. Waiting here for a syncer to store records of the same chat would
    wait for this very lock.
    """

    def __init__(self, database: Database, connection: AsyncConnection, chat: Chat, active: Sequence[Run]) -> None:
        self._database = database
        self._connection = connection
        self.chat = chat
        #: The runs that are queued or running in this chat, oldest first.
        self.active = active

    async def messages(self) -> list[Message]:
        """All messages of the chat, oldest first."""
        return await self._database.limited(chat_messages(self._connection, self.chat.owner_id, self.chat.id))

    async def apply(self, records: Sequence[Record]) -> None:
        """Write records; they are committed when the turn ends without an exception."""
        await self._database.limited(apply(self._connection, records))


@asynccontextmanager
async def turn(database: Database, owner_id: str, chat_id: str) -> AsyncIterator[Turn]:
    """Lock the chat's row. Raises NotFound, and StoreUnavailable when another turn holds it for too long."""
    if not is_id(chat_id):
        raise _not_found()
    async with database.open() as connection:
        locked = select(chats).where(_is(owner_id, chat_id)).with_for_update(key_share=True)
        row = (await database.limited(connection.execute(locked))).first()
        if row is None:
            raise _not_found()
        active = await database.limited(active_runs(connection, chat_id))
        yield Turn(database, connection, _chat(row), active)


async def chat_messages(connection: AsyncConnection, owner_id: str, chat_id: str) -> list[Message]:
    """The messages of a chat, oldest first; equal times in the order of their ids, which grow with time."""
    statement = (
        select(messages)
        .where(messages.c.chat_id == chat_id, messages.c.owner_id == owner_id)
        .order_by(messages.c.created_at, messages.c.id)
    )
    return [_message(row) for row in await _all(connection, statement)]


async def _all(connection: AsyncConnection, statement: Any) -> Sequence[Row[Any]]:
    return (await connection.execute(statement)).all()


def _is(owner_id: str, chat_id: str) -> Any:
    return and_(chats.c.id == chat_id, chats.c.owner_id == owner_id, chats.c.deleted_at.is_(None))


def _not_found() -> NotFound:
    return NotFound("There is no such chat.")


def _storable(query: str) -> bool:
    # PostgreSQL cannot hold such text, so no title has it; as a parameter it would be an error.
    return "\0" not in query and not any("\ud800" <= char <= "\udfff" for char in query)


def _chat(row: Row[Any]) -> Chat:
    return Chat(row.id, row.owner_id, to_ms(row.created_at), to_ms(row.updated_at), row.title, row.version)


def _message(row: Row[Any]) -> Message:
    return Message(
        id=row.id,
        chat_id=row.chat_id,
        owner_id=row.owner_id,
        role=Role(row.role),
        content=row.content,
        created_at=to_ms(row.created_at),
        status=MessageStatus(row.status),
        parent_id=row.parent_id,
        reasoning=row.reasoning,
        run_id=row.run_id,
        model=row.model,
        usage=row.usage,
        error=row.error,
        version=row.version,
    )


def _token(row: Row[Any]) -> str:
    """The place after a row: its time and its id, which breaks ties."""
    return base64.urlsafe_b64encode(f"{to_ms(row.updated_at)}.{row.id}".encode()).decode().rstrip("=")


def _parse_token(token: str) -> tuple[datetime, str]:
    problem = BadCursor("The cursor is not one that a list of chats gave.")
    try:
        plain = base64.urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        raise problem from None
    ms, _, chat_id = plain.partition(".")
    if not (ms.isascii() and ms.isdigit() and len(ms) <= 15 and int(ms) <= _LAST_MS and is_id(chat_id)):
        raise problem
    return to_datetime(int(ms)), chat_id
