"""Runs and scripted pipelines for tests of whoever executes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from headwater.events import Event
from headwater.ids import new_id
from headwater.messages import Message, MessageStatus, Role
from headwater.pipelines.base import OnWorkerLost, Pipeline
from headwater.runs import Run, RunState
from headwater.transcript import Transcript

Script = Callable[[Run, Transcript], AsyncGenerator[Event, None]]

_STATUS = {
    RunState.DONE: MessageStatus.DONE,
    RunState.FAILED: MessageStatus.FAILED,
    RunState.CANCELLED: MessageStatus.CANCELLED,
}


class Anything(BaseModel):
    """No checks."""


class ScriptedPipeline(Pipeline):
    """Plays a script: an async generator function of the run and what was said before."""

    kind: ClassVar[str] = "scripted"
    input_model: ClassVar[type[BaseModel]] = Anything

    def __init__(
        self, script: Script, *, lost: OnWorkerLost = OnWorkerLost.RESTART, deadline: float | None = None
    ) -> None:
        self._script = script
        self.on_worker_lost = lost  # type: ignore[misc]
        self.deadline = deadline  # type: ignore[misc]
        self.calls = 0
        #: Set when a generator was closed or ended.
        self.closed = asyncio.Event()

    async def events(self, run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        self.calls += 1
        self.closed.clear()
        try:
            async for event in self._script(run, said):
                yield event
        finally:
            self.closed.set()

    def results(self, run: Run, transcript: Transcript) -> Sequence[Message]:
        assert run.message_id is not None
        assert run.chat_id is not None
        return (
            Message(
                id=run.message_id,
                chat_id=run.chat_id,
                owner_id=run.owner_id,
                role=Role.ASSISTANT,
                content=transcript.content,
                created_at=run.created_at,
                status=_STATUS[run.state],
                run_id=run.id,
                usage=run.usage,
                error=run.error,
                version=run.version,
            ),
        )


def new_run(kind: str = "scripted", **members: Any) -> Run:
    """A queued run that answers into a message of a chat."""
    fields: dict[str, Any] = {
        "id": new_id(),
        "kind": kind,
        "owner_id": "local",
        "input": {},
        "created_at": 1_767_225_600_000,
        "chat_id": new_id(),
        "message_id": new_id(),
    }
    return Run(**{**fields, **members})
