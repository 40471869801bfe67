"""Plans: where a message goes in the tree of its chat, what the model will see, and the rows that say so.

Planning has no effect. It reads the log in one case: an answer that ended a moment ago, whose row
does not know yet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from headwater.access import Caller
from headwater.errors import InvalidInput, LogUnavailable, NotFound, StoreUnavailable, reason
from headwater.ids import new_id
from headwater.intake import checks
from headwater.intake.parts import LOG_WAIT, Parts
from headwater.journal import Key
from headwater.messages import Chat, Message, MessageStatus, Role, branch, title_of
from headwater.overlay import in_order
from headwater.pipelines.chat import fit
from headwater.records import Record
from headwater.runs import Priority, Run
from headwater.settings import WhenBusy
from headwater.transcript import Transcript

logger = logging.getLogger(__name__)

#: The kind of run that answers in a chat.
KIND: Final = "chat"
#: Events of one read of a log.
_PAGE: Final = 1000


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
class Ask:
    """A request, checked as far as it can be without looking anything up."""

    caller: Caller
    chat_id: str
    #: None: make an answer again.
    content: str | None
    #: The parent of a message that is sent; the answer that is made again.
    target: str | checks.Unset | None
    key: str | None
    fingerprint: str
    when_busy: WhenBusy
    priority: Priority = Priority.NORMAL

    def same(self, fingerprint: str | None, run_id: str, message_id: str | None) -> Accepted:
        """What the first request with this key was told. Raises KeyReused when it was another request."""
        if fingerprint != self.fingerprint or message_id is None:
            raise checks.key_reused()
        question_id = checks.question_of(message_id) if self.content is not None else None
        return Accepted(run_id, message_id, question_id, self.chat_id)

    def told(self, key: Key) -> Accepted:
        """`same`, from the journal's key."""
        return self.same(key.fingerprint, key.run_id, key.message_id)

    def stands_for(self, plan: Plan) -> Key | None:
        """The key that the plan is journalled with."""
        if self.key is None:
            return None
        return Key(self.caller.owner_id, self.key, self.fingerprint, plan.run.id, plan.accepted.message_id)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a turn writes."""

    accepted: Accepted
    run: Run
    records: list[Record]
    #: Runs that are stopped to make room for this one.
    cancels: Sequence[str] = ()
    #: Where the records stand in the journal, when the turn has stored them itself.
    positions: Sequence[int] = ()


class Planner:
    """Plans turns."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def plan(
        self, ask: Ask, chat: Chat, messages: Mapping[str, Message], *, complete: bool, behind: Sequence[str] = ()
    ) -> Plan:
        """What taking `ask` writes, among all messages of the chat or, not `complete`, those at hand.

        `behind`: the runs of the chat that have not ended, which the new one waits for.
        Raises InvalidInput, NotFound, NotKnownYet, StoreUnavailable; writes nothing.
        """
        newest = in_order(messages.values())[-1:]
        # Later than what it follows, also when the clock went back: the order of a chat is the order of its times.
        at = max([self._parts.clock.now_ms(), *(message.created_at + 1 for message in newest)])
        first_id, answer_id = checks.id_pair()
        owner_id = ask.caller.owner_id
        # With every turn, so that the journal has each chat of late whole, with its owner and title.
        title = chat.title or (title_of(ask.content) if ask.content is not None else None)
        rows: list[Chat | Message] = [replace(chat, title=title, updated_at=at, version=chat.version + 1)]
        if ask.content is None:
            parent_id = await self._regenerated(ask, messages, complete)
        else:
            above = await self._parent(ask, messages, newest, complete)
            parent_id = first_id
            rows.append(Message(first_id, chat.id, owner_id, Role.USER, ask.content, at, parent_id=above))
        asked = {**messages, **{row.id: row for row in rows if isinstance(row, Message)}}
        run = Run(
            id=new_id(),
            kind=KIND,
            owner_id=owner_id,
            input=await self._input(branch(asked, parent_id), parent_id, behind),
            created_at=at,
            chat_id=chat.id,
            message_id=answer_id,
            idempotency_key=ask.key,
            fingerprint=ask.fingerprint if ask.key is not None else None,
            priority=ask.priority,
            waits_for=tuple(behind),
        )
        answer = Message(
            answer_id, chat.id, owner_id, Role.ASSISTANT, "", at, MessageStatus.PROCESSING, parent_id, run_id=run.id
        )
        records = [Record.of(row) for row in (*rows, answer, run)]
        accepted = Accepted(run.id, answer_id, None if ask.content is None else first_id, chat.id)
        return Plan(accepted, run, records, behind if ask.when_busy is WhenBusy.INTERRUPT else ())

    async def _parent(
        self, ask: Ask, messages: Mapping[str, Message], newest: list[Message], complete: bool
    ) -> str | None:
        """The message that a new one follows."""
        if isinstance(ask.target, checks.Unset):
            return newest[0].id if newest else None
        if ask.target is not None:
            await self._must_know(ask.target, messages, complete)
        return ask.target

    async def _regenerated(self, ask: Ask, messages: Mapping[str, Message], complete: bool) -> str | None:
        """The parent of the answer that is made again."""
        target = await self._must_know(str(ask.target), messages, complete)
        if target.role is not Role.ASSISTANT:
            raise InvalidInput(
                "Only an answer can be made again. To change a question, send another with its parent_id."
            )
        if target.parent_id is not None and target.parent_id not in messages:
            # The answer may be at hand, or even stored, and its question not: another host's journal has it.
            raise StoreUnavailable("The question of this answer is not stored yet. Try again in a moment.")
        return target.parent_id

    async def _must_know(self, message_id: str, messages: Mapping[str, Message], complete: bool) -> Message:
        message = messages.get(message_id)
        if message is not None:
            return message
        if not complete:
            raise StoreUnavailable("The database is away and this message is not at hand. Try again in a moment.")
        what, parts = "message in this chat", self._parts
        if await parts.overlay.message(message_id) is None:
            raise parts.absence.of(message_id, what)
        raise NotFound(f"There is no such {what}.")

    async def _input(self, said: list[Message], parent_id: str | None, behind: Sequence[str]) -> dict[str, Any]:
        turns = []
        for message in said:
            turn = {"role": message.role.value, "content": message.content}
            if message.status is MessageStatus.PROCESSING and message.run_id is not None:
                if message.run_id in behind:
                    # Not said yet; filled in when this run begins.
                    turn["run_id"] = message.run_id
                else:
                    # It ended, its row only does not know yet.
                    turn["content"] = await self._from_log(message.run_id)
            turns.append(turn)
        # Fitted here as well as in the pipeline: a run carries its input through Celery, Redis and the
        # journal, and a long chat would carry itself whole through each of its runs.
        fitted = fit(turns, self._parts.settings.max_history)
        if not fitted:
            raise InvalidInput("There is nothing before this answer that could be answered again.")
        return self._parts.pipelines[KIND].check({"messages": fitted, "parent_id": parent_id})

    async def _from_log(self, run_id: str) -> str:
        transcript, after = Transcript(), 0
        try:
            async with asyncio.timeout(LOG_WAIT):
                while (page := await self._parts.log.read(run_id, after, _PAGE)) is not None and page.events:
                    for event in page.events:
                        transcript.fold(event)
                    after = page.events[-1].seq
        except (LogUnavailable, TimeoutError) as error:
            logger.warning("an earlier answer is left out of what the model sees: %s", reason(error))
        return transcript.content
