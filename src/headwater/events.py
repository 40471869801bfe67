"""Event and Cursor: the only things that travel.

A run's log is a list of events, numbered densely from 1. A pipeline makes events without a
number; the runner stamps them; from then on they never change. `encode` is the one form that
Redis, the published message and every format see:

    {"seq":7,"type":"content","at":1767225600123,"text":"Hello"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

import orjson

from headwater.errors import BadCursor


class EventType(StrEnum):
    """What an event says. The last three are terminal: exactly one of them ends a log."""

    #: `state`, `attempt`: the run moved on.
    STATE = "state"
    #: `text`: a piece of the answer.
    CONTENT = "content"
    #: `text`: a piece of the model's reasoning.
    REASONING = "reasoning"
    #: `id`, `name`, `arguments`.
    TOOL_CALL = "tool_call"
    #: `id`, `output`.
    TOOL_RESULT = "tool_result"
    #: `stage`, `progress` from 0 to 1, `message`.
    PROGRESS = "progress"
    #: `level`, `message`.
    LOG = "log"
    #: `prompt_tokens`, `completion_tokens`, `total_tokens`, `estimated`.
    USAGE = "usage"
    #: `reason`, `attempt`: forget what was shown; the answer begins again.
    RESET = "reset"
    #: `finish_reason`, `usage`.
    DONE = "done"
    #: `code`, `message`, `retryable`.
    ERROR = "error"
    #: `usage`.
    CANCELLED = "cancelled"


TERMINAL: Final = frozenset({EventType.DONE, EventType.ERROR, EventType.CANCELLED})
#: The same as they are written.
ENDING: Final = frozenset(kind.value.encode() for kind in TERMINAL)

#: How `encode` begins: seq, type and time.
HEAD: Final = re.compile(rb'\{"seq":(\d{1,15}),"type":"([a-z_]+)","at":(\d{1,15})[,}]').match
_END: Final = ord("}")
_TYPES: Final = {kind.value.encode(): kind for kind in EventType}


class Event:
    """One numbered fact of a run. It never changes; a further one is made instead.

    `seq` is 0 until the runner stamps it. `at` is Unix time in milliseconds. `data` holds the
    type's own fields, JSON values only.

    One that was decoded reads its `data` only when somebody asks: a server hands most events on as
    they came, and to take each apart costs more than all else it does with it.
    """

    __slots__ = ("_data", "_raw", "at", "seq", "type")

    def __init__(
        self,
        type: EventType,  # noqa: A002  as the wire calls it
        data: Mapping[str, Any] | None,
        seq: int = 0,
        at: int = 0,
        raw: bytes | None = None,
    ) -> None:
        """`raw` is the encoded form where it is known; only with it `data` may be None."""
        self.type = type
        self.seq = seq
        self.at = at
        self._data = data
        self._raw = raw

    @property
    def data(self) -> Mapping[str, Any]:
        if self._data is None:
            data = orjson.loads(self._raw or b"")
            for key in ("seq", "type", "at"):
                del data[key]
            self._data = data
        return self._data

    @property
    def terminal(self) -> bool:
        return self.type in TERMINAL

    def stamped(self, seq: int, at: int) -> Event:
        """The same event with its place and time, encoded once."""
        # A run's events are kept until it ends, and what orjson returns holds on to the 4 KB it was written in.
        tight = b"%b" % _encoded(self.type, self.data, seq, at)
        return Event(self.type, self.data, seq, at, tight)

    def encode(self) -> bytes:
        """One JSON object without newlines: `seq`, `type`, `at`, then the type's own fields."""
        if self._raw is not None:
            return self._raw
        return _encoded(self.type, self.data, self.seq, self.at)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read what `encode` wrote. Raises ValueError when it is anything else."""
        known = HEAD(raw)
        if known is not None and raw[-1] == _END:
            seq, name, at = known.groups()
            if (kind := _TYPES.get(name)) is not None:
                return cls(kind, None, int(seq), int(at), raw)
        try:
            # Not by our hand: the same object with its members in another order, say.
            data = orjson.loads(raw)
            return cls(EventType(data.pop("type")), data, data.pop("seq"), data.pop("at"), bytes(raw))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not an event: {raw[:80]!r}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return (self.type, self.seq, self.at, self.data) == (other.type, other.seq, other.at, other.data)

    __hash__ = None  # type: ignore[assignment]  # `data` is a dict

    def __repr__(self) -> str:
        return f"Event({self.type.value}, {self.data!r}, seq={self.seq}, at={self.at})"


def _encoded(type_: EventType, data: Mapping[str, Any], seq: int, at: int) -> bytes:
    return orjson.dumps({"seq": seq, "type": type_.value, "at": at, **data})


def content(text: str) -> Event:
    """A piece of the answer."""
    return Event(EventType.CONTENT, {"text": text})


def reasoning(text: str) -> Event:
    """A piece of the model's reasoning."""
    return Event(EventType.REASONING, {"text": text})


def progress(stage: str, fraction: float, message: str = "") -> Event:
    """How far a job is: `fraction` from 0 to 1."""
    return Event(EventType.PROGRESS, {"stage": stage, "progress": fraction, "message": message})


def log(message: str, level: str = "info") -> Event:
    """A line for the person who watches."""
    return Event(EventType.LOG, {"level": level, "message": message})


def usage(prompt_tokens: int, completion_tokens: int, *, estimated: bool = False) -> Event:
    """Tokens so far; a later one replaces an earlier one."""
    return Event(
        EventType.USAGE,
        {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "estimated": estimated,
        },
    )


def done(finish_reason: str = "stop") -> Event:
    """The pipeline ended well. Optional: the runner adds one when the pipeline just returns."""
    return Event(EventType.DONE, {"finish_reason": finish_reason})


#: How a cursor is written.
CURSOR_PATTERN: Final = "([0-9a-z]{1,32})-(0|[1-9][0-9]{0,14})"
_CURSOR: Final = re.compile(CURSOR_PATTERN)


@dataclass(frozen=True, slots=True, order=False)
class Cursor:
    """The last event a reader has seen: `<epoch>-<seq>`.

    An offset alone lies after data loss: a log that was lost and begun again counts from 1 as
    well. `epoch` names one incarnation of the log, so the loss can be said.
    """

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read `<epoch>-<seq>`. Raises BadCursor."""
        match = _CURSOR.fullmatch(text)
        if match is None:
            raise BadCursor(f"The cursor {text[:60]!r} is not of the form <epoch>-<seq>.")
        return cls(match[1], int(match[2]))
