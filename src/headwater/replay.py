"""Replay: the events of a run whose log has expired, made again from the store.

The same kinds of events in the same order, not the same cuts: what was streamed in a thousand
pieces comes in a few. The page is a pure function of the rows, so a reader that is cut off in the
middle goes on at its cursor, on any server, as long as the message exists.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from headwater.events import Event, EventType, content, reasoning
from headwater.messages import Message
from headwater.runs import Run, RunState
from headwater.streams.base import Page

#: The epoch of every log that was made from the store.
EPOCH: Final = "stored"
#: Characters of one content or reasoning event.
PIECE: Final = 4096

_USAGE: Final = ("prompt_tokens", "completion_tokens", "total_tokens", "estimated")


class Replay:
    """The history of ended runs, for the hub."""

    def __init__(
        self,
        find_run: Callable[[str], Awaitable[Run | None]],
        find_message: Callable[[str], Awaitable[Message | None]],
    ) -> None:
        self._find_run = find_run
        self._find_message = find_message

    async def page(self, run_id: str) -> Page | None:
        """All events of a run that has ended; None when it is unknown or has not. Raises StoreUnavailable."""
        run = await self._find_run(run_id)
        if run is None or not run.state.terminal:
            return None
        # A run and its answer are stored in one step, so the answer read after the run is the whole one.
        message = await self._find_message(run.message_id) if run.message_id else None
        events = replayed(run, message)
        return Page(EPOCH, events, len(events), closed=True)


def replayed(run: Run, message: Message | None) -> list[Event]:
    """The events that tell an ended run and its answer, numbered from 1."""
    begun, ended = run.started_at or run.created_at, run.ended_at or run.created_at
    events = list(_events(run, message))
    last = len(events)
    return [event.stamped(seq, ended if seq == last else begun) for seq, event in enumerate(events, start=1)]


def _events(run: Run, message: Message | None) -> Iterator[Event]:
    if run.attempt:
        yield Event(EventType.STATE, {"state": RunState.RUNNING.value, "attempt": run.attempt})
    if run.stage:
        data = {"stage": run.stage, "progress": run.progress, "message": ""}
        yield Event(EventType.PROGRESS, data)
    if message is not None:
        yield from (reasoning(piece) for piece in _pieces(message.reasoning or ""))
        yield from (content(piece) for piece in _pieces(message.content))
    used = _usage(run, message)
    if used:
        yield Event(EventType.USAGE, used)
    yield _end(run, used)


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def _usage(run: Run, message: Message | None) -> dict[str, Any]:
    usage = run.usage or (message.usage if message is not None else None) or {}
    return {name: usage[name] for name in _USAGE if name in usage}


def _end(run: Run, used: dict[str, Any]) -> Event:
    extra: dict[str, Any] = {"usage": used} if used else {}
    if run.message_id is not None:
        extra["message_id"] = run.message_id
    if run.state is RunState.DONE:
        # How the model put it was streamed and not stored.
        return Event(EventType.DONE, {"finish_reason": "stop", **extra})
    if run.state is RunState.CANCELLED:
        return Event(EventType.CANCELLED, extra)
    error = run.error or {}
    data = {
        "code": error.get("code", "internal"),
        "message": error.get("message", "The run failed."),
        "retryable": bool(error.get("retryable", False)),
    }
    return Event(EventType.ERROR, {**data, **extra})
