"""Reading: everything a caller can look at, from three places at once.

The store is the master, the journal is ahead of it by what is not synced yet, and the log knows of
a run what happened a moment ago. While PostgreSQL is away, what the journal has is shown and the
answer says so by `degraded`; what only PostgreSQL could know raises StoreUnavailable. What none of
them knows is NotFound, or NotKnownYet while another host may have taken it: absence.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from headwater.absence import Absence
from headwater.access import Caller, may
from headwater.errors import (
    HeadwaterError,
    LogUnavailable,
    NotFound,
    NotKnownYet,
    StoreUnavailable,
    Unavailable,
    reason,
)
from headwater.ids import is_id
from headwater.journal import Journal
from headwater.messages import Chat, Message
from headwater.overlay import Facts, Overlay, newer_run
from headwater.runs import Run
from headwater.store import Store
from headwater.streams.base import Meta, StreamLog

logger = logging.getLogger(__name__)

#: Seconds a look at the log may take before the rows are shown without it.
LOG_WAIT: Final = 0.5
#: Seconds for the log to say who owns a run that nobody else knows of.
PATIENCE: Final = 2.0
#: Seconds between two looks for a run that nobody knows yet.
LOOK_AGAIN: Final = 0.2
#: Seconds to learn who owns runs of which the log says nothing, for all of one request together.
OWNERS_WAIT: Final = 1.5


@dataclass(frozen=True, slots=True)
class ChatPage:
    """A page of chats, the latest updated first."""

    items: Sequence[Chat]
    #: The token of the next page; None at the end.
    next: str | None
    #: PostgreSQL is away: these are the chats that are at hand.
    degraded: bool = False


@dataclass(frozen=True, slots=True)
class ChatView:
    """A chat with its messages, oldest first."""

    chat: Chat
    messages: Sequence[Message]
    #: PostgreSQL is away: earlier messages may be missing.
    degraded: bool = False


class Reading:
    """Look-ups for callers. Every one checks the owner; what belongs to somebody else is NotFound."""

    def __init__(self, store: Store, journal: Journal, log: StreamLog, absence: Absence) -> None:
        self._store = store
        self._absence = absence
        self._log = log
        self._overlay = Overlay(store, journal)

    # --- chats -----------------------------------------------------------------------------------

    async def list_chats(
        self, caller: Caller, *, after: str | None = None, limit: int = 50, query: str | None = None
    ) -> ChatPage:
        """A page of the caller's chats; `query` is looked for in the titles. Raises BadCursor.

        The first page may be longer than `limit` by the chats that are not in the store yet.
        """
        owner_id = caller.owner_id
        try:
            rows, following = await self._store.chats.list(owner_id, after=after, limit=limit, query=query)
        except StoreUnavailable:
            known = await self._overlay.kept_chats(owner_id)
            if after is not None or not known:
                raise
            return ChatPage([chat for chat in known if _titled(chat, query)][:limit], None, degraded=True)
        ahead = await self._overlay.facts("owner_id", owner_id)
        if after is not None:
            # These were on the first page already, because they are newer than their rows.
            return ChatPage([row for row in rows if row.id not in ahead.chats], following)
        merged = Facts(chats={row.id: row for row in rows})
        for chat in ahead.chats.values():
            merged.add(chat)
        return ChatPage([chat for chat in merged.newest_first() if _titled(chat, query)], following)

    async def get_chat(self, caller: Caller, chat_id: str) -> ChatView:
        """A chat with all its messages."""
        _check_id(chat_id)
        try:
            chat, rows = await self._stored_chat(caller, chat_id)
        except StoreUnavailable:
            known = await self._overlay.kept(chat_id)
            at_hand = known.chat(chat_id)
            if at_hand is None:
                raise
            may(caller, at_hand.owner_id)
            return ChatView(at_hand, known.in_order(), degraded=True)
        merged = await self._overlay.facts("chat_id", chat_id)
        for row in rows:
            merged.add(row)
        if chat is not None:
            merged.add(chat)
        if chat_id not in merged.chats:
            async with self._absence.doubted(chat_id):
                raise NotFound("There is no such chat.")
        may(caller, merged.chats[chat_id].owner_id)
        return ChatView(merged.chats[chat_id], merged.in_order())

    async def _stored_chat(self, caller: Caller, chat_id: str) -> tuple[Chat | None, list[Message]]:
        try:
            chat = await self._store.chats.get(caller.owner_id, chat_id)
        except NotFound:
            # Made a moment ago, perhaps: then the journal has it.
            return None, []
        return chat, await self._store.chats.messages(caller.owner_id, chat_id)

    # --- runs ------------------------------------------------------------------------------------

    async def owner_of(self, run_id: str) -> str:
        """Who owns a run, from the nearest place that knows. Raises NotFound, or Unavailable when nobody can tell.

        What may be on its way from another host is waited for a little: most often it is there at once, and an
        EventSource that is refused does not come back.
        """
        _check_id(run_id)
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE
        while True:
            try:
                return await self._owner_of(run_id)
            except NotKnownYet:
                if loop.time() >= until:
                    raise
            await asyncio.sleep(LOOK_AGAIN)

    async def _owner_of(self, run_id: str) -> str:
        meta, silence = await self._meta(run_id)
        if meta is None:
            run = await self._overlay.run(run_id)
            if run is not None:
                return run.owner_id
            if silence is not None:
                # Busy rather than away, perhaps.
                meta, silence = await self._meta(run_id, PATIENCE)
        if meta is None:
            raise silence or self._absence.of(run_id, "run")
        return meta.owner_id

    async def may_read(self, caller: Caller, run_id: str) -> None:
        """Whether the caller may follow the run. Raises NotFound, or Unavailable when nobody can tell."""
        may(caller, await self.owner_of(run_id))

    async def may_read_each(self, caller: Caller, run_ids: Sequence[str]) -> dict[str, HeadwaterError]:
        """Why the caller may not follow some of the runs, by their ids: NotFound, or Unavailable when nobody can tell.

        One look at the log for all; what it does not know is asked elsewhere at once, so the answer takes
        LOG_WAIT + OWNERS_WAIT at most, whatever is away.
        """
        metas, silence = await self._metas(run_ids)
        refusals = await asyncio.gather(
            *(self._refusal(caller, run_id, meta, silence) for run_id, meta in zip(run_ids, metas, strict=True))
        )
        return {run_id: error for run_id, error in zip(run_ids, refusals, strict=True) if error is not None}

    async def _refusal(
        self, caller: Caller, run_id: str, meta: Meta | None, silence: LogUnavailable | None
    ) -> HeadwaterError | None:
        try:
            async with asyncio.timeout(OWNERS_WAIT):
                run = None if meta is not None else await self._overlay.run(run_id)
        except Unavailable as error:
            return error
        except TimeoutError:
            return StoreUnavailable("PostgreSQL did not answer in time.")
        known = meta or run
        if known is None:
            return silence or self._absence.of(run_id, "run")
        try:
            may(caller, known.owner_id)
        except NotFound:
            return NotFound("There is no such run.")
        return None

    async def run_view(self, caller: Caller, run_id: str) -> Run:
        """The run as it stands this moment."""
        _check_id(run_id)
        meta, silence = await self._meta(run_id)
        try:
            run = await self._overlay.run(run_id)
        except StoreUnavailable:
            run = None
            if meta is None:
                raise
        if run is None and meta is not None:
            run = _of_meta(meta)
        if run is None:
            raise silence or self._absence.of(run_id, "run")
        may(caller, run.owner_id)
        return live(run, meta)

    async def active_task(self, caller: Caller, chat_id: str) -> Run | None:
        """The run that answers in a chat now; others may wait behind it. NotFound when the chat is not the caller's."""
        _check_id(chat_id)
        ahead = await self._overlay.facts("chat_id", chat_id)
        try:
            # Whoever owns the chat owns its runs; the chat itself may be on its way still.
            if chat_id not in ahead.chats:
                async with self._absence.doubted(chat_id):
                    await self._store.chats.get(caller.owner_id, chat_id)
            rows = await self._store.runs.active_in(chat_id)
        except StoreUnavailable:
            ahead, rows = await self._overlay.kept(chat_id), []
            if ahead.chat(chat_id) is None:
                raise
        at_hand = ahead.chat(chat_id)
        if at_hand is not None:
            may(caller, at_hand.owner_id)
        active = await self._unended(rows, ahead)
        return active[0] if active else None

    async def active_tasks(self, caller: Caller) -> list[Run]:
        """Every run of the caller that is queued or running, oldest first."""
        ahead = await self._overlay.facts("owner_id", caller.owner_id)
        try:
            rows = await self._store.runs.active_of(caller.owner_id)
        except StoreUnavailable:
            # What was synced before has most likely ended since; what was not is all that can be told.
            rows = []
        return await self._unended(rows, ahead)

    async def _unended(self, rows: Sequence[Run], ahead: Facts) -> list[Run]:
        """Runs that neither their row nor the journal nor the log knows as ended, oldest first."""
        merged = Facts(runs=dict(ahead.runs))
        for row in rows:
            merged.add(row)
        candidates = [run for run in merged.runs.values() if not run.state.terminal]
        metas, _ = await self._metas([run.id for run in candidates])
        current = [live(run, meta) for run, meta in zip(candidates, metas, strict=True)]
        return sorted((run for run in current if not run.state.terminal), key=lambda run: (run.created_at, run.id))

    async def _meta(self, run_id: str, wait: float = LOG_WAIT) -> tuple[Meta | None, LogUnavailable | None]:
        (meta,), silence = await self._metas([run_id], wait)
        return meta, silence

    async def _metas(
        self, run_ids: Sequence[str], wait: float = LOG_WAIT
    ) -> tuple[Sequence[Meta | None], LogUnavailable | None]:
        """What the log says of the runs. None for all, and why, when it does not answer: that is not to know them."""
        if not run_ids:
            return [], None
        try:
            async with asyncio.timeout(wait):
                return await self._log.metas(run_ids), None
        except (LogUnavailable, TimeoutError) as error:
            # The rows are older than the log but true; the live part is back when Redis is.
            logger.warning("runs are shown without their live state: %s", reason(error))
            return [None] * len(run_ids), LogUnavailable("Redis did not answer in time. Ask again in a moment.")


def live(run: Run, meta: Meta | None) -> Run:
    """The run, moved on to what its log says when that is further."""
    if meta is None:
        return run
    return newer_run(run, replace(run, state=meta.status, attempt=meta.attempt))


def _of_meta(meta: Meta) -> Run:
    return Run(
        id=meta.run_id,
        kind=meta.kind,
        owner_id=meta.owner_id,
        input={},
        created_at=meta.created_at,
        state=meta.status,
        attempt=meta.attempt,
        chat_id=meta.chat_id,
    )


def _titled(chat: Chat, query: str | None) -> bool:
    return not query or query.casefold() in (chat.title or "").casefold()


def _check_id(text: str) -> None:
    if not is_id(text):
        raise NotFound("There is nothing of that id.")
