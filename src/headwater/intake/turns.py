"""Turns: a message is sent, an answer is made again.

A turn is one decision under the chat's lock: the caller's Idempotency-Key, whether the chat is
answering already, where in the tree the message goes. What was decided is written to the journal
first and with one fsync; from then on it is accepted, whatever becomes of PostgreSQL, of Redis or of
this process.

    with PostgreSQL      the row lock holds across processes; the rows are there when the caller hears of it
    without PostgreSQL   the journal knows the chat or it cannot be taken; the syncer carries it over
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from headwater.access import Caller, may
from headwater.errors import (
    ChatBusy,
    InvalidInput,
    LogUnavailable,
    NotFound,
    RecordRefused,
    StoreUnavailable,
)
from headwater.ids import new_id
from headwater.intake import checks
from headwater.intake.parts import Locks, Parts, Patience
from headwater.journal import Key
from headwater.messages import Chat, Message, MessageStatus, Role, branch, title_of
from headwater.overlay import in_order
from headwater.pipelines.chat import fit
from headwater.records import Record
from headwater.runs import Run
from headwater.store import Turn
from headwater.streams.base import Meta
from headwater.transcript import Transcript

logger = logging.getLogger(__name__)

#: Seconds a call to Redis may take here. None of them is needed to accept a message, and the caller waits.
LOG_WAIT: Final = 0.3
#: Events of one read of a log.
_PAGE: Final = 1000
_KIND: Final = "chat"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A run that was taken: what the 202 says."""

    task_id: str
    #: The answer that is being made.
    message_id: str
    #: What the caller said; None when an answer is made again.
    user_message_id: str | None
    chat_id: str


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request, checked as far as it can be without looking anything up."""

    caller: Caller
    chat_id: str
    #: None: make an answer again.
    content: str | None
    #: The parent of a message that is sent; the answer that is made again.
    target: str | checks.Unset | None
    key: str | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a turn writes."""

    accepted: Accepted
    run: Run
    records: list[Record]


class Turns:
    """Takes messages. `locks` are shared with whoever else changes a chat as a whole."""

    def __init__(self, parts: Parts, locks: Locks) -> None:
        self._parts = parts
        self._locks = locks
        self._patience = Patience(parts.clock, parts.away)

    async def send(
        self, caller: Caller, chat_id: str, content: str, *, parent_id: str | checks.Unset | None, key: str | None
    ) -> Accepted:
        """Take a message and begin its answer.

        `parent_id` UNSET goes on after the chat's newest message, None begins a new branch at the
        root; editing a message is sending another with its parent. Raises InvalidInput, NotFound,
        ChatBusy, KeyReused, StoreUnavailable, JournalUnavailable; then nothing was written.
        """
        checks.checked_id(chat_id, "chat")
        if isinstance(parent_id, str):
            checks.checked_id(parent_id, "message in this chat")
        text = checks.checked_text(content, self._parts.settings.max_message)
        place = "" if isinstance(parent_id, checks.Unset) else parent_id
        digest = checks.fingerprint("send", chat_id=chat_id, content=text, parent_id=place)
        return await self._take(_Ask(caller, chat_id, text, parent_id, checks.checked_key(key), digest))

    async def regenerate(self, caller: Caller, chat_id: str, message_id: str, *, key: str | None) -> Accepted:
        """Make an answer again, beside the one there is; also a failed one. Raises what `send` raises."""
        checks.checked_id(chat_id, "chat")
        checks.checked_id(message_id, "message in this chat")
        digest = checks.fingerprint("regenerate", chat_id=chat_id, message_id=message_id)
        return await self._take(_Ask(caller, chat_id, None, message_id, checks.checked_key(key), digest))

    # --- one turn --------------------------------------------------------------------------------

    async def _take(self, ask: _Ask) -> Accepted:
        # Within this process a chat's turns wait here and not each with a connection of the pool.
        async with self._locks.of(ask.chat_id):
            outcome = await self._by_journal(ask) or await self._decide(ask)
        if isinstance(outcome, Accepted):
            return outcome
        self._parts.telemetry.count("headwater_runs_accepted_total", kind=outcome.run.kind)
        await self._announce(outcome.run)
        return outcome.accepted

    async def _decide(self, ask: _Ask) -> _Plan | Accepted:
        if self._patience.worthwhile:
            try:
                return await self._with_store(ask)
            except StoreUnavailable as error:
                self._patience.lost()
                logger.warning("a message is taken without PostgreSQL: %s", error)
        return await self._without_store(ask)

    async def _with_store(self, ask: _Ask) -> _Plan | Accepted:
        """Raises StoreUnavailable only while nothing was written."""
        parts = self._parts
        if ask.key is not None:
            run = await parts.store.runs.by_key(ask.caller.owner_id, ask.key)
            if run is not None:
                return _same(ask, run.fingerprint, run.id, run.message_id)
        # The turn reads rows only, so they must be as new as the journal.
        await parts.overlay.carry_over(ask.chat_id)
        outcome: _Plan | Accepted | None = None
        try:
            async with parts.store.turn(ask.caller.owner_id, ask.chat_id) as turn:
                outcome = await self._turn(ask, turn)
                if isinstance(outcome, _Plan):
                    await turn.apply(outcome.records)
        except (StoreUnavailable, RecordRefused) as error:
            if outcome is None:
                raise
            # It is durable, so it is accepted; the syncer brings it, or sets it aside and reports it.
            logger.warning("a message was journalled but not stored yet: %s", error)
        return outcome

    async def _turn(self, ask: _Ask, turn: Turn) -> _Plan | Accepted:
        active = turn.active
        if active is not None and ask.key is not None and active.idempotency_key == ask.key:
            return _same(ask, active.fingerprint, active.id, active.message_id)
        # Another process of this host may have taken the key while we waited for the row.
        earlier = await self._by_journal(ask)
        if earlier is not None:
            return earlier
        messages = {message.id: message for message in await turn.messages()}
        # A run whose end is in the log but not in its row yet does not hold the chat up.
        waiting = {message.run_id for message in messages.values() if message.status is MessageStatus.PROCESSING}
        metas = await self._metas({run_id for run_id in waiting if run_id} | ({active.id} if active else set()))
        for run_id, meta in metas.items():
            if not meta.status.terminal if meta else active is not None and run_id == active.id:
                raise _busy(run_id)
        plan = await self._plan(ask, turn.chat, messages, complete=True)
        return await self._write(ask, plan)

    async def _without_store(self, ask: _Ask) -> _Plan | Accepted:
        """Take it on the journal's word alone: it shows whose the chat is and whether it is answering."""
        known = await self._parts.overlay.kept(ask.chat_id)
        chat = known.chat(ask.chat_id)
        if chat is None:
            raise StoreUnavailable("The database is away and this chat is not at hand. Try again in a moment.")
        may(ask.caller, chat.owner_id)
        # Where neither journal nor log saw an end, a run counts as active for as long as it could be.
        settings = self._parts.settings
        horizon = self._parts.clock.now_ms() - settings.run_deadline * settings.max_attempts * 1000
        open_runs = [run for run in known.runs.values() if not run.state.terminal and run.created_at > horizon]
        for run_id, meta in (await self._metas(run.id for run in open_runs)).items():
            if meta is None or not meta.status.terminal:
                raise _busy(run_id)
        plan = await self._plan(ask, chat, known.messages, complete=False)
        return await self._write(ask, plan)

    async def _write(self, ask: _Ask, plan: _Plan) -> _Plan | Accepted:
        """The moment of acceptance. One step: all of it is durable, or nothing, or an earlier request had the key."""
        key = None
        if ask.key is not None:
            accepted = plan.accepted
            key = Key(ask.caller.owner_id, ask.key, ask.fingerprint, accepted.task_id, accepted.message_id)
        # Not waiting for PostgreSQL: within a turn its row is locked by ourselves.
        earlier = await self._parts.save(plan.records, wait=0, key=key)
        return plan if earlier is None else _same(ask, earlier.fingerprint, earlier.run_id, earlier.message_id)

    async def _by_journal(self, ask: _Ask) -> Accepted | None:
        if ask.key is None:
            return None
        known = await self._parts.journal.find_key(ask.caller.owner_id, ask.key)
        return _same(ask, known.fingerprint, known.run_id, known.message_id) if known else None

    # --- what it writes --------------------------------------------------------------------------

    async def _plan(self, ask: _Ask, chat: Chat, messages: Mapping[str, Message], *, complete: bool) -> _Plan:
        newest = in_order(messages.values())[-1:]
        # Later than what it follows, also when the clock went back: the order of a chat is the order of its times.
        at = max([self._parts.clock.now_ms(), *(message.created_at + 1 for message in newest)])
        first_id, answer_id = checks.id_pair()
        owner_id = ask.caller.owner_id
        # With every turn, so that the journal has each chat of late whole, with its owner and title.
        title = chat.title or (title_of(ask.content) if ask.content is not None else None)
        rows: list[Chat | Message] = [replace(chat, title=title, updated_at=at, version=chat.version + 1)]
        if ask.content is None:
            parent_id = _regenerated(ask, messages, complete)
        else:
            above = _parent(ask, messages, newest, complete)
            parent_id = first_id
            rows.append(Message(first_id, chat.id, owner_id, Role.USER, ask.content, at, parent_id=above))
        asked = {**messages, **{row.id: row for row in rows if isinstance(row, Message)}}
        run = Run(
            id=new_id(),
            kind=_KIND,
            owner_id=owner_id,
            input=await self._input(branch(asked, parent_id), parent_id),
            created_at=at,
            chat_id=chat.id,
            message_id=answer_id,
            idempotency_key=ask.key,
            fingerprint=ask.fingerprint if ask.key is not None else None,
        )
        answer = Message(
            answer_id, chat.id, owner_id, Role.ASSISTANT, "", at, MessageStatus.PROCESSING, parent_id, run_id=run.id
        )
        records = [Record.of(row) for row in (*rows, answer, run)]
        return _Plan(Accepted(run.id, answer_id, None if ask.content is None else first_id, chat.id), run, records)

    async def _input(self, said: list[Message], parent_id: str | None) -> dict[str, Any]:
        turns = []
        for message in said:
            text = message.content
            if message.status is MessageStatus.PROCESSING and message.run_id is not None:
                # It ended, or the chat would be busy; its row only does not know yet.
                text = await self._from_log(message.run_id)
            turns.append({"role": message.role.value, "content": text})
        # Fitted here as well as in the pipeline: a run carries its input through Celery, Redis and the
        # journal, and a long chat would carry itself whole through each of its runs.
        fitted = fit(turns, self._parts.settings.max_history)
        if not fitted:
            raise InvalidInput("There is nothing before this answer that could be answered again.")
        return self._parts.pipelines[_KIND].check({"messages": fitted, "parent_id": parent_id})

    async def _from_log(self, run_id: str) -> str:
        transcript, after = Transcript(), 0
        try:
            async with asyncio.timeout(LOG_WAIT):
                while (page := await self._parts.log.read(run_id, after, _PAGE)) is not None and page.events:
                    for event in page.events:
                        transcript.fold(event)
                    after = page.events[-1].seq
        except (LogUnavailable, TimeoutError) as error:
            logger.warning("an earlier answer is left out of what the model sees: %s", error)
        return transcript.content

    # --- what others know ------------------------------------------------------------------------

    async def _metas(self, run_ids: Iterable[str]) -> dict[str, Meta | None]:
        ids = sorted(run_ids)
        if not ids:
            return {}
        try:
            async with asyncio.timeout(LOG_WAIT):
                return dict(zip(ids, await self._parts.log.metas(ids), strict=True))
        except (LogUnavailable, TimeoutError) as error:
            logger.warning("cannot see whether earlier answers ended: %s", error)
            return dict.fromkeys(ids)

    async def _announce(self, run: Run) -> None:
        try:
            async with asyncio.timeout(LOG_WAIT):
                await self._parts.log.open(run, self._parts.settings.queue_grace)
        except (LogUnavailable, TimeoutError) as error:
            # The sweeper finds a run that was not announced.
            logger.warning("run %s is accepted and waits for Redis: %s", run.id, error)
        self._parts.enqueue(run)


def _same(ask: _Ask, digest: str | None, run_id: str, message_id: str | None) -> Accepted:
    """What the first request with this key was told. Raises KeyReused."""
    if digest != ask.fingerprint or message_id is None:
        raise checks.key_reused()
    question_id = checks.question_of(message_id) if ask.content is not None else None
    return Accepted(run_id, message_id, question_id, ask.chat_id)


def _busy(run_id: str) -> ChatBusy:
    return ChatBusy("This chat is still answering. Wait for the answer or stop it, then send again.", task_id=run_id)


def _parent(ask: _Ask, messages: Mapping[str, Message], newest: list[Message], complete: bool) -> str | None:
    """The message that a new one follows."""
    if isinstance(ask.target, checks.Unset):
        return newest[0].id if newest else None
    if ask.target is not None:
        _must_know(ask.target, messages, complete)
    return ask.target


def _regenerated(ask: _Ask, messages: Mapping[str, Message], complete: bool) -> str | None:
    """The parent of the answer that is made again."""
    target = _must_know(str(ask.target), messages, complete)
    if target.role is not Role.ASSISTANT:
        raise InvalidInput("Only an answer can be made again. To change a question, send another with its parent_id.")
    return target.parent_id


def _must_know(message_id: str, messages: Mapping[str, Message], complete: bool) -> Message:
    message = messages.get(message_id)
    if message is None:
        if not complete:
            raise StoreUnavailable("The database is away and this message is not at hand. Try again in a moment.")
        raise NotFound("There is no such message in this chat.")
    return message
