"""Intake: everything a caller can ask that changes something.

    turns.py    a message is sent, an answer is made again
    stops.py    a run is stopped
    chats.py    a chat is made, renamed, deleted
    plans.py    where a message goes, and what is written
    checks.py   what is taken and what is refused, without any effect
    parts.py    what they all work with

Whatever is accepted is durable in the journal before the caller hears of it; whatever is refused
has left nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headwater.absence import Absence
from headwater.access import Caller
from headwater.clock import Clock
from headwater.intake.chats import ChatVerbs
from headwater.intake.checks import UNSET, Unset
from headwater.intake.parts import Locks, Parts, Save, Settle
from headwater.intake.plans import Accepted
from headwater.intake.stops import CANCELLING, Stopped, Stops
from headwater.intake.turns import Turns
from headwater.journal import Journal
from headwater.messages import Chat
from headwater.overlay import Overlay
from headwater.pipelines.base import Pipeline
from headwater.queue import Enqueue
from headwater.runs import Priority
from headwater.settings import Settings, WhenBusy
from headwater.store import Store
from headwater.streams.base import StreamLog
from headwater.telemetry import Telemetry

__all__ = ["CANCELLING", "UNSET", "Accepted", "Intake", "Save", "Settle", "Stopped", "Unset"]


class Intake:
    """The verbs of the API, for every transport.

    `save` is the syncer's, `settle` the runner's; `away` tells whether PostgreSQL did not answer
    somebody else just now. Every verb checks the owner and raises NotFound for what belongs to
    somebody else, NotKnownYet for what another host may have taken.
    """

    def __init__(
        self,
        *,
        store: Store,
        absence: Absence,
        journal: Journal,
        save: Save,
        log: StreamLog,
        enqueue: Enqueue,
        settle: Settle,
        pipelines: Mapping[str, Pipeline],
        clock: Clock,
        telemetry: Telemetry,
        settings: Settings,
        away: Callable[[], bool] = lambda: False,
    ) -> None:
        overlay = Overlay(store, journal)
        parts = Parts(
            store, journal, overlay, absence, save, log, enqueue, settle, pipelines, clock, telemetry, settings, away
        )
        locks = Locks()
        #: To be started beside it: keeps the cancels that were promised.
        self.stops = Stops(parts)
        self._turns = Turns(parts, locks, self.stops)
        self._chats = ChatVerbs(parts, locks, self.stops)

    async def create_chat(self, caller: Caller, *, title: str | None = None, key: str | None = None) -> Chat:
        """A new chat; without a title it gets one from its first message. The same `key` gives the same chat.

        Raises InvalidInput, KeyReused, JournalUnavailable.
        """
        return await self._chats.create(caller, title, key)

    async def rename_chat(self, caller: Caller, chat_id: str, title: str) -> Chat:
        """Give a chat a title. Raises InvalidInput, NotFound, StoreUnavailable."""
        return await self._chats.rename(caller, chat_id, title)

    async def delete_chat(self, caller: Caller, chat_id: str) -> None:
        """Remove a chat and all that was said in it, once its answer has stopped. Raises NotFound, StoreUnavailable."""
        await self._chats.delete(caller, chat_id)

    async def send(
        self,
        caller: Caller,
        chat_id: str,
        content: str,
        *,
        parent_id: str | Unset | None = UNSET,
        key: str | None = None,
        when_busy: WhenBusy | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> Accepted:
        """Take a message and begin its answer.

        `parent_id` UNSET goes on after the chat's newest message, None begins a new branch at the
        root; editing a message is sending another with its parent. The same `key` with the same
        message is answered as the first time and does nothing. `when_busy` None takes the setting's;
        `priority` says which of the runs that wait for a worker goes first.

        Raises InvalidInput, NotFound, ChatBusy, ChatQueueFull, KeyReused, StoreUnavailable,
        JournalUnavailable; then nothing was written.
        """
        return await self._turns.send(
            caller, chat_id, content, parent_id=parent_id, key=key, when_busy=when_busy, priority=priority
        )

    async def regenerate(self, caller: Caller, chat_id: str, message_id: str, *, key: str | None = None) -> Accepted:
        """Make an answer again, beside the one there is; also a failed one. Raises what `send` raises."""
        return await self._turns.regenerate(caller, chat_id, message_id, key=key)

    async def cancel(self, caller: Caller, run_id: str) -> Stopped:
        """Stop a run; of one that has ended, tell how it did.

        When nobody is there who knows whose the run is, the wish is kept until somebody is. Raises
        NotFound, JournalUnavailable.
        """
        return await self.stops.cancel(caller, run_id)
