"""Chats and their messages, as they are read and as a person changes them."""

from __future__ import annotations

import base64
import binascii
import builtins
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, and_, bindparam, delete, func, or_, select, update

from headwater.clock import to_datetime, to_ms
from headwater.errors import BadCursor, NotFound
from headwater.ids import is_id
from headwater.messages import Chat, Message, MessageStatus, Role, flaw_of
from headwater.records import Record
from headwater.runs import Run
from headwater.store.apply import writing
from headwater.store.database import Database, Statement, Transaction
from headwater.store.runs import ACTIVE_RUNS, RUN_OF_KEY, run_of
from headwater.store.tables import chats, messages, runs

#: The messages of the chat `chat_id` of `owner_id`, oldest first; equal times in the order of their ids, which grow
#: with time.
_MESSAGES: Final = (
    select(messages)
    .where(messages.c.chat_id == bindparam("chat_id"), messages.c.owner_id == bindparam("owner_id"))
    .order_by(messages.c.created_at, messages.c.id)
)
#: The end of 9999 in Unix milliseconds: what a datetime can hold.
_LAST_MS: Final = 253_402_300_799_000


def _is(owner_id: Any, chat_id: Any) -> Any:
    return and_(chats.c.id == chat_id, chats.c.owner_id == owner_id, chats.c.deleted_at.is_(None))


def _was(owner_id: Any, chat_id: Any) -> Any:
    return and_(chats.c.id == chat_id, chats.c.owner_id == owner_id, chats.c.deleted_at.is_not(None))


_LOCKED: Final = Statement.of(
    select(chats).where(_is(bindparam("owner_id"), bindparam("chat_id"))).with_for_update(key_share=True)
)
_SAID: Final = Statement.of(_MESSAGES)
_ACTIVE: Final = Statement.of(ACTIVE_RUNS)
_OF_KEY: Final = Statement.of(RUN_OF_KEY)


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
            if flaw_of(query) is not None:
                # No title has it; as a parameter it would be an error.
                return [], None
            statement = statement.where(chats.c.title.icontains(query, autoescape=True))
        # One more than asked for tells whether a further page exists.
        statement = statement.order_by(chats.c.updated_at.desc(), chats.c.id.desc()).limit(limit + 1)
        rows = await self._database.rows(statement)
        found = [_chat(row) for row in rows[:limit]]
        return found, _token(rows[limit - 1]) if len(rows) > limit else None

    async def get(self, owner_id: str, chat_id: str) -> Chat:
        """One chat. Raises NotFound."""
        if not is_id(chat_id):
            raise _not_found()
        statement = select(chats).where(_is(owner_id, chat_id))
        rows = await self._database.rows(statement)
        if not rows:
            raise _not_found()
        return _chat(rows[0])

    async def exists(self, chat_id: str) -> bool:
        """Whether there is or was such a chat, whoever owns it: one that was deleted left its tombstone."""
        statement = select(chats.c.id).where(chats.c.id == chat_id)
        return bool(await self._database.rows(statement))

    async def deleted(self, owner_id: str, chat_id: str) -> bool:
        """Whether the owner had such a chat and deleted it."""
        statement = select(chats.c.id).where(_was(owner_id, chat_id))
        return bool(await self._database.rows(statement))

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
        rows = await self._database.rows(statement)
        if not rows:
            raise _not_found()
        return _chat(rows[0])

    async def delete(self, owner_id: str, chat_id: str, at: int) -> None:
        """Remove a chat with its messages and runs; a bare tombstone stays. `at` in Unix ms. Raises NotFound."""
        if not is_id(chat_id):
            raise _not_found()

        tombstone = (
            update(chats)
            .where(_is(owner_id, chat_id))
            .values(title=None, deleted_at=to_datetime(at), version=chats.c.version + 1)
            .returning(chats.c.id)
        )
        dead = select(chats.c.id).where(_was(owner_id, chat_id))
        # The tombstone's row lock holds off records on their way, so no message can come in behind these.
        rest = [delete(table).where(table.c.chat_id.in_(dead)) for table in (messages, runs)]
        buried, *_ = await self._database.fly(*map(Statement.of, (tombstone, *rest)))
        if not buried:
            raise _not_found()

    async def messages(self, owner_id: str, chat_id: str) -> builtins.list[Message]:
        """All messages of a chat, oldest first; none when the chat is not the owner's or was deleted."""
        if not is_id(chat_id):
            return []
        rows = await self._database.rows(_MESSAGES, owner_id=owner_id, chat_id=chat_id)
        return [_message(row) for row in rows]

    async def message(self, message_id: str) -> Message | None:
        """One message, whoever owns it: the caller checks the owner."""
        if not is_id(message_id):
            return None
        statement = select(messages).where(messages.c.id == message_id)
        rows = await self._database.rows(statement)
        return _message(rows[0]) if rows else None


class Turn:
    """A chat that is locked for one turn, as it was then; another turn of the same chat waits, in any process.

    Inside, write with `end`. Waiting here for a syncer to store records of the same chat would
    wait for this very lock.
    """

    def __init__(
        self,
        transaction: Transaction,
        chat: Chat,
        messages: Sequence[Message],
        active: Sequence[Run],
        of_key: Run | None,
    ) -> None:
        self._transaction = transaction
        self.chat = chat
        #: All messages of the chat, oldest first.
        self.messages = messages
        #: The runs that are queued or running in this chat, oldest first.
        self.active = active
        #: The run that the Idempotency-Key stands for already.
        self.of_key = of_key

    async def end(self, records: Sequence[Record]) -> None:
        """Write records and commit; the chat is free for the next turn. Without it a turn leaves nothing."""
        await self._transaction.fly(*writing(records, locked=True), commit=True)


@asynccontextmanager
async def turn(database: Database, owner_id: str, chat_id: str, key: str | None) -> AsyncIterator[Turn]:
    """Lock the chat's row. Raises NotFound, and StoreUnavailable when another turn holds it for too long."""
    if not is_id(chat_id):
        raise _not_found()
    asked = [statement.with_values(owner_id=owner_id, chat_id=chat_id) for statement in (_LOCKED, _SAID, _ACTIVE)]
    if key is not None:
        asked.append(_OF_KEY.with_values(owner_id=owner_id, key=key))
    async with database.transaction() as transaction:
        # One after the other and each on its own snapshot: what comes behind the lock sees what the turn before wrote.
        chat, said, active, *of_key = await transaction.fly(*asked)
        if not chat:
            raise _not_found()
        known = [run_of(row) for rows in of_key for row in rows]
        yield Turn(
            transaction,
            _chat(chat[0]),
            [_message(row) for row in said],
            [run_of(row) for row in active],
            known[0] if known else None,
        )


def _not_found() -> NotFound:
    return NotFound("There is no such chat.")


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
