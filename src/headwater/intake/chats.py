"""Chats as wholes: made, renamed, deleted."""

from __future__ import annotations

import logging
from typing import Final

from headwater.access import Caller
from headwater.errors import JournalUnavailable, LogUnavailable, NotFound
from headwater.ids import new_id
from headwater.intake import checks
from headwater.intake.parts import Locks, Parts
from headwater.intake.stops import Stops
from headwater.journal import Key
from headwater.messages import Chat
from headwater.records import Record

logger = logging.getLogger(__name__)

#: Seconds a deletion waits until the worker confirms that it stopped.
CONFIRM_WAIT: Final = 2.0


class ChatVerbs:
    """Changes of a chat as a whole."""

    def __init__(self, parts: Parts, locks: Locks, stops: Stops) -> None:
        self._parts = parts
        self._locks = locks
        self._stops = stops

    async def create(self, caller: Caller, title: str | None, key: str | None) -> Chat:
        """A new chat. Raises InvalidInput, KeyReused, JournalUnavailable."""
        now = self._parts.clock.now_ms()
        name = checks.checked_title(title) if title is not None else None
        key = checks.checked_key(key)
        # Made from the key, the id is the same on a host whose journal has not seen the key.
        chat_id = checks.id_of_key(caller.owner_id, key) if key is not None else new_id()
        chat = Chat(chat_id, caller.owner_id, now, now, name)
        digest = checks.fingerprint("create", title=name)
        stands_for = Key(caller.owner_id, key, digest, chat_id) if key is not None else None
        earlier = await self._parts.save([Record.of(chat)], wait=self._parts.settings.db_wait, key=stands_for)
        if earlier is None:
            return chat
        if earlier.fingerprint != digest:
            raise checks.key_reused()
        return (await self._parts.overlay.kept(chat_id)).chat(chat_id) or chat

    async def rename(self, caller: Caller, chat_id: str, title: str) -> Chat:
        """Give a chat a title. Raises InvalidInput, NotFound, StoreUnavailable."""
        checks.checked_id(chat_id, "chat")
        name = checks.checked_title(title)
        await self._parts.overlay.carry_over(chat_id)
        now = self._parts.clock.now_ms()
        async with self._parts.absence.doubted(chat_id):
            chat = await self._parts.store.chats.rename(caller.owner_id, chat_id, name, now)
        try:
            # It is in PostgreSQL already; the journal shows it while PostgreSQL is away.
            await self._parts.save([Record.of(chat)], wait=0)
        except JournalUnavailable as error:
            logger.warning("the new title of chat %s is in PostgreSQL only: %s", chat_id, error)
        return chat

    async def delete(self, caller: Caller, chat_id: str) -> None:
        """Stop what the chat is answering, then remove it from everywhere. Raises NotFound, StoreUnavailable."""
        checks.checked_id(chat_id, "chat")
        parts = self._parts
        async with self._locks.of(chat_id):
            await parts.overlay.carry_over(chat_id)
            # Whose it is, and that PostgreSQL is there, before anything is stopped.
            try:
                async with parts.absence.doubted(chat_id):
                    await parts.store.chats.get(caller.owner_id, chat_id)
            except NotFound:
                if await parts.store.chats.deleted(caller.owner_id, chat_id):
                    # The deletion that went before may not have come as far as here.
                    await parts.journal.forget(chat_id)
                raise
            await self._stop(caller, chat_id)
            said = await parts.store.chats.messages(caller.owner_id, chat_id)
            await parts.store.chats.delete(caller.owner_id, chat_id, parts.clock.now_ms())
            await parts.journal.forget(chat_id)
        await self._forget_logs([message.run_id for message in said if message.run_id is not None])

    async def _stop(self, caller: Caller, chat_id: str) -> None:
        # The newest first: the end of one would let the next begin.
        for run in reversed(await self._parts.store.runs.active_in(chat_id)):
            try:
                stopped = await self._stops.cancel(caller, run.id)
                if not stopped.ended and not await self._stops.confirmed(run.id, CONFIRM_WAIT):
                    # It stops at its next word, and what it still writes meets the chat's tombstone.
                    logger.warning("run %s did not confirm its cancel before its chat was deleted", run.id)
            except LogUnavailable as error:
                logger.warning("run %s of a deleted chat could not be told to stop: %s", run.id, error)

    async def _forget_logs(self, run_ids: list[str]) -> None:
        try:
            for meta in await self._parts.log.metas(run_ids) if run_ids else []:
                # The log of a run that still goes on carries its cancel flag; it expires by itself.
                if meta is not None and meta.status.terminal:
                    await self._parts.log.forget(meta.run_id)
        except LogUnavailable as error:
            logger.warning("the logs of a deleted chat stay until they expire: %s", error)
