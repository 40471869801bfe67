"""How a run ends: terminal events, the ended run, and what the log tells of earlier attempts. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from headwater.errors import HeadwaterError, RunFailed
from headwater.events import Event, EventType
from headwater.runs import Run, RunState
from headwater.streams.base import ENDS
from headwater.transcript import Transcript

#: The `reason` of the state event a worker leaves when it hands a run over on purpose.
HANDED_OVER: Final = "handed_over"
#: What the person who waits reads when the pipeline raised what nobody expected.
INTERNAL: Final = "Something went wrong on our side. What was said so far is kept; please try again."

#: Events that show nothing to forget: a further attempt needs no `reset` because of them.
_SILENT: Final = frozenset({EventType.STATE, EventType.USAGE})


def failure(error: HeadwaterError) -> Event:
    """The `error` event of a run that failed with `error`."""
    return Event(EventType.ERROR, {"code": error.code, "message": str(error), "retryable": bool(error.retryable)})


def internal() -> Event:
    """The `error` event of a fault of ours. Says nothing of the exception, which may quote anything."""
    return failure(RunFailed(INTERNAL, code="internal"))


def cancelled() -> Event:
    return Event(EventType.CANCELLED, {})


def ended(run: Run, end: Event, transcript: Transcript, usage: Mapping[str, Any] | None) -> Run:
    """The run as `end` leaves it; `end.at` is the moment. Raises ValueError when it had ended already."""
    state = ENDS[end.type]
    failed = state is RunState.FAILED
    error = {name: end.data[name] for name in ("code", "message", "retryable") if name in end.data} if failed else None
    fraction = 1.0 if state is RunState.DONE else transcript.progress
    return run.ended(state, end.at, error=error, usage=usage, stage=transcript.stage, progress=fraction)


def since_reset(events: Sequence[Event]) -> Sequence[Event]:
    """The events behind the last `reset`: what a reader shows."""
    for index in range(len(events) - 1, -1, -1):
        if events[index].type is EventType.RESET:
            return events[index + 1 :]
    return events


def shows(events: Sequence[Event]) -> bool:
    """Whether a reader has something on screen that a fresh attempt must take back."""
    return any(event.type not in _SILENT for event in since_reset(events))


def lost_attempts(attempt: int, events: Iterable[Event]) -> int:
    """Attempts before `attempt` that died. One that was handed over on purpose does not count."""
    handed = sum(1 for event in events if _is_hand_over(event))
    return max(0, attempt - 1 - handed)


def handed_over(events: Sequence[Event]) -> bool:
    """Whether the last attempt gave the run away itself, rather than dying with it."""
    return bool(events) and _is_hand_over(events[-1])


def _is_hand_over(event: Event) -> bool:
    return event.type is EventType.STATE and event.data.get("reason") == HANDED_OVER
