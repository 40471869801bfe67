"""Turns: a message is sent, an answer is made again.

A turn is one decision under the chat's lock: the caller's Idempotency-Key, whether the chat is
answering already, where in the tree the message goes. What was decided is written to the journal
first and with one fsync; from then on it is accepted, whatever becomes of PostgreSQL, of Redis or of
this process.

    with PostgreSQL      the row lock holds across processes; the rows are there when the caller hears of it
    without PostgreSQL   the journal knows the chat or it cannot be taken; the syncer carries it over

Both write to the journal on condition that no run has begun in the chat since they looked, so two
processes of one host take one message, also when they do not agree on whether PostgreSQL is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from headwater.access import Caller, may
from headwater.errors import (
    ChatBusy,
    ChatQueueFull,
    JournalUnavailable,
    LogUnavailable,
    RecordRefused,
    StoreUnavailable,
    Unavailable,
    reason,
)
from headwater.intake import checks
from headwater.intake.parts import LOG_WAIT, Locks, Parts, Patience
from headwater.intake.plans import Accepted, Ask, Plan, Planner
from headwater.intake.stops import Stops
from headwater.journal import Alone, Key
from headwater.messages import MessageStatus
from headwater.runs import Priority, Run, RunState
from headwater.settings import WhenBusy
from headwater.store import Turn
from headwater.streams.base import Meta

logger = logging.getLogger(__name__)

#: Messages that may wait in one chat behind the one that is answered.
MAX_QUEUED: Final = 10


class Turns:
    """Takes messages. `locks` are shared with whoever else changes a chat as a whole."""

    def __init__(self, parts: Parts, locks: Locks, stops: Stops) -> None:
        self._parts = parts
        self._stops = stops
        self._planner = Planner(parts)
        self._locks = locks
        self._patience = Patience(parts.clock, parts.away)

    async def send(
        self,
        caller: Caller,
        chat_id: str,
        content: str,
        *,
        parent_id: str | checks.Unset | None,
        key: str | None,
        when_busy: WhenBusy | None,
        priority: Priority,
    ) -> Accepted:
        """`Intake.send`."""
        checks.checked_id(chat_id, "chat")
        if isinstance(parent_id, str):
            checks.checked_id(parent_id, "message in this chat")
        text = checks.checked_text(content, self._parts.settings.max_message)
        place = "" if isinstance(parent_id, checks.Unset) else parent_id
        chosen = {"when_busy": when_busy.value} if when_busy is not None else {}
        if priority is not Priority.NORMAL:
            chosen["priority"] = priority.value
        digest = checks.fingerprint("send", chat_id=chat_id, content=text, parent_id=place, **chosen)
        busy = when_busy or self._parts.settings.when_busy
        return await self._take(Ask(caller, chat_id, text, parent_id, checks.checked_key(key), digest, busy, priority))

    async def regenerate(self, caller: Caller, chat_id: str, message_id: str, *, key: str | None) -> Accepted:
        """Make an answer again, beside the one there is; also a failed one. Raises what `send` raises."""
        checks.checked_id(chat_id, "chat")
        checks.checked_id(message_id, "message in this chat")
        digest = checks.fingerprint("regenerate", chat_id=chat_id, message_id=message_id)
        busy = self._parts.settings.when_busy
        return await self._take(Ask(caller, chat_id, None, message_id, checks.checked_key(key), digest, busy))

    # --- one turn --------------------------------------------------------------------------------

    async def _take(self, ask: Ask) -> Accepted:
        # Within this process a chat's turns wait here and not each with a connection of the pool.
        async with self._locks.of(ask.chat_id):
            outcome = await self._insist(ask)
        if isinstance(outcome, Accepted):
            await self._ring_again(outcome.task_id)
            return outcome
        self._parts.telemetry.count("headwater_runs_accepted_total", kind=outcome.run.kind)
        self._stops.bring(outcome.cancels)
        return outcome.accepted

    async def _insist(self, ask: Ask) -> Plan | Accepted:
        for _ in range(MAX_QUEUED):
            try:
                return await self._decide(ask)
            except ChatBusy:
                if ask.when_busy is WhenBusy.REJECT:
                    raise
                # Another process took a message for this chat since we looked: go behind that one.
        return await self._decide(ask)

    async def _decide(self, ask: Ask) -> Plan | Accepted:
        if self._patience.worthwhile:
            try:
                return await self._with_store(ask)
            except StoreUnavailable as error:
                self._patience.lost()
                logger.warning("a message is taken without PostgreSQL: %s", error)
        return await self._without_store(ask)

    async def _with_store(self, ask: Ask) -> Plan | Accepted:
        """Raises StoreUnavailable only while nothing was written."""
        parts = self._parts
        # In this order, which is that of the journal's answers: a run that begins after the rows are read must not be
        # seen by `alone`, or nothing would tell of it.
        earlier, alone, _ = await asyncio.gather(
            self._key(ask),
            parts.journal.look(ask.chat_id),
            # The turn reads rows only, so they must be as new as the journal.
            parts.overlay.carry_over(ask.chat_id),
        )
        if earlier is not None:
            return ask.told(earlier)
        plan: Plan | None = None
        announcing: asyncio.Task[None] | None = None
        try:
            async with (
                parts.absence.doubted(ask.chat_id),
                parts.store.turn(ask.caller.owner_id, ask.chat_id, ask.key) as turn,
            ):
                outcome = await self._turn(ask, turn, alone)
                if isinstance(outcome, Accepted):
                    return outcome
                plan = outcome
                # What is in the journal is accepted: its answer need not wait for PostgreSQL.
                announcing = asyncio.create_task(self._announce(plan.run))
                await turn.end(plan.records)
        except (StoreUnavailable, RecordRefused) as error:
            if plan is None:
                raise
            # It is durable, so it is accepted; the syncer brings it, or sets it aside and reports it.
            logger.warning("a message was journalled but not stored yet: %s", error)
            await self._wake_syncer(plan)
            return plan
        finally:
            # Not within the turn: who waits for Redis must not keep a connection to PostgreSQL from others.
            if announcing is not None:
                await announcing
        parts.telemetry.step("accept.stored")
        parts.journal.mark_soon(plan.positions)
        return plan

    async def _turn(self, ask: Ask, turn: Turn, alone: Alone) -> Plan | Accepted:
        if turn.of_key is not None:
            return ask.same(turn.of_key.fingerprint, turn.of_key.id, turn.of_key.message_id)
        active = {run.id: run for run in turn.active}
        # Another process of this host may have taken the key while we waited for the row.
        earlier = await self._key(ask)
        if earlier is not None:
            return ask.told(earlier)
        messages = {message.id: message for message in turn.messages}
        # A run whose end is in the log but not in its row yet does not hold the chat up.
        waiting = {message.run_id for message in messages.values() if message.status is MessageStatus.PROCESSING}
        metas = await self._metas({run_id for run_id in waiting if run_id} | active.keys())
        behind = [run_id for run_id, meta in metas.items() if (not meta.status.terminal if meta else run_id in active)]
        _admit(ask, behind)
        plan = await self._planner.plan(ask, turn.chat, messages, complete=True, behind=behind)
        self._parts.telemetry.step("accept.planned")
        # Not by `save`: its syncer would store the same rows a second time, after waiting for this turn's lock.
        added = await self._parts.journal.add(plan.records, ask.stands_for(plan), alone, plan.cancels)
        self._parts.telemetry.step("accept.journalled")
        return ask.told(added.earlier) if added.earlier else replace(plan, positions=added.positions)

    async def _without_store(self, ask: Ask) -> Plan | Accepted:
        """Take it on the journal's word alone: it shows whose the chat is and whether it is answering."""
        earlier = await self._key(ask)
        if earlier is not None:
            return ask.told(earlier)
        alone = await self._parts.journal.look(ask.chat_id)
        known = await self._parts.overlay.kept(ask.chat_id)
        chat = known.chat(ask.chat_id)
        if chat is None:
            raise StoreUnavailable("The database is away and this chat is not at hand. Try again in a moment.")
        may(ask.caller, chat.owner_id)
        # Where neither journal nor log saw an end, a run counts as active for as long as it could be.
        settings = self._parts.settings
        horizon = self._parts.clock.now_ms() - settings.run_deadline * settings.max_attempts * 1000
        open_runs = [run for run in known.runs.values() if not run.state.terminal and run.created_at > horizon]
        metas = await self._metas(run.id for run in open_runs)
        behind = [run_id for run_id, meta in metas.items() if meta is None or not meta.status.terminal]
        _admit(ask, behind)
        plan = await self._planner.plan(ask, chat, known.messages, complete=False, behind=behind)
        self._parts.telemetry.step("accept.planned")
        holder = await self._parts.save(
            plan.records, wait=0, key=ask.stands_for(plan), alone=alone, cancels=plan.cancels
        )
        self._parts.telemetry.step("accept.journalled")
        if holder:
            return ask.told(holder)
        await self._announce(plan.run)
        return plan

    async def _wake_syncer(self, plan: Plan) -> None:
        """A record that is saved again changes nothing and lets the syncer look at once."""
        try:
            await self._parts.save(plan.records[-1:], wait=0)
        except JournalUnavailable as error:
            logger.warning("run %s is journalled and waits for the syncer's next look: %s", plan.run.id, error)

    async def _key(self, ask: Ask) -> Key | None:
        """The first use of the caller's key, as far as this host's journal knows."""
        return None if ask.key is None else await self._parts.journal.find_key(ask.caller.owner_id, ask.key)

    # --- what others know ------------------------------------------------------------------------

    async def _metas(self, run_ids: Iterable[str]) -> dict[str, Meta | None]:
        ids = sorted(run_ids)
        if not ids:
            return {}
        try:
            async with asyncio.timeout(LOG_WAIT):
                return dict(zip(ids, await self._parts.log.metas(ids), strict=True))
        except (LogUnavailable, TimeoutError) as error:
            logger.warning("cannot see whether earlier answers ended: %s", reason(error))
            return dict.fromkeys(ids)

    async def _announce(self, run: Run) -> None:
        try:
            async with asyncio.timeout(LOG_WAIT):
                await self._parts.log.open(run, self._parts.settings.queue_grace)
        except (LogUnavailable, TimeoutError) as error:
            # The sweeper finds a run that was not announced.
            logger.warning("run %s is accepted and waits for Redis: %s", run.id, reason(error))
        self._parts.telemetry.step("accept.announced")
        self._parts.enqueue(run)
        self._parts.telemetry.step("accept.enqueued")

    async def _ring_again(self, run_id: str) -> None:
        """A request that comes again tells that its reply was lost: whoever took it may have died before it rang."""
        if (await self._metas([run_id]))[run_id] is not None:
            return
        try:
            run = await self._parts.overlay.run(run_id)
        except Unavailable as error:
            logger.warning("run %s was accepted before and is left to the sweeper: %s", run_id, error)
            return
        if run is not None and run.state is RunState.QUEUED:
            await self._announce(run)


def _admit(ask: Ask, behind: Sequence[str]) -> None:
    """Whether a message may go behind these runs, oldest first. Raises ChatBusy, ChatQueueFull."""
    if behind and ask.when_busy is WhenBusy.REJECT:
        raise ChatBusy(behind[0])
    if len(behind) > MAX_QUEUED:
        raise ChatQueueFull(behind[0], MAX_QUEUED)
