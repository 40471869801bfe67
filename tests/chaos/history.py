"""History: what was promised, what every reader saw, what is stored. `checker` compares them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self

TERMINAL: Final = {"done": "done", "error": "failed", "cancelled": "cancelled"}
#: The epoch of a stream that is made from the rows, after its log is gone.
STORED: Final = "stored"


@dataclass(frozen=True, slots=True)
class Promise:
    """A 202: the run, the messages and the words it stands for."""

    run_id: str
    chat_id: str
    message_id: str
    user_message_id: str
    question: str
    #: What the scripted provider answers to `question`, whole; None when the question asks for a failure.
    answer: str | None
    key: str
    #: When the 202 came, in Unix milliseconds; 0 when others may rightly be answered first.
    accepted_at: int = 0
    #: Somebody asked to stop it.
    stopped: bool = False
    #: When the first such request was answered, in Unix milliseconds; 0 when none was.
    stopped_at: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """One event as it reached a reader."""

    epoch: str
    seq: int
    type: str
    data: Mapping[str, Any]
    #: When it came, in Unix milliseconds.
    came: int = 0


@dataclass(slots=True)
class Reader:
    """One logical reader over all its connections."""

    name: str
    transport: str
    run_id: str
    events: list[Seen] = field(default_factory=list)
    #: The stream told it that the run is over: terminal event, then end (or 204 on return).
    finished: bool = False
    connections: int = 0

    def text(self) -> str:
        """The answer as a person would see it: what came after the last reset."""
        pieces: list[str] = []
        for event in self.events:
            if event.type == "reset":
                pieces.clear()
            elif event.type == "content":
                pieces.append(event.data["text"])
        return "".join(pieces)


@dataclass(slots=True)
class History:
    """Everything that is known at the end of a run of the harness."""

    promises: list[Promise] = field(default_factory=list)
    #: Idempotency-Keys of requests whose reply never came: they may or may not stand for a run.
    unanswered: set[str] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)
    #: Rows of PostgreSQL: id, state, attempt, idempotency_key, the error's code, and started_at and ended_at in Unix
    #: milliseconds.
    runs: list[Mapping[str, Any]] = field(default_factory=list)
    #: Rows of PostgreSQL, each chat's in its order: id, chat_id, role, content, status, run_id.
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    #: What clients met that no fault excuses: an internal error, a 404 for what was accepted, a process that fell.
    complaints: list[str] = field(default_factory=list)
    #: Hosts, each with a journal of its own. While PostgreSQL is away each may take what another one took as well.
    hosts: int = 1
    #: From when to when, in Unix milliseconds, a fault held that lets nobody go on with a run.
    away: list[tuple[int, int]] = field(default_factory=list)

    def stopped(self, run_id: str, at: int = 0) -> None:
        """Somebody is about to ask that this run stops, or was answered at `at`, in Unix milliseconds."""
        for index, promise in enumerate(self.promises):
            if promise.run_id == run_id:
                self.promises[index] = replace(promise, stopped=True, stopped_at=promise.stopped_at or at)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, to be kept and looked at later."""
        return {**asdict(self), "unanswered": sorted(self.unanswered)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(
            promises=[Promise(**one) for one in data["promises"]],
            unanswered=set(data["unanswered"]),
            readers=[
                Reader(**{**one, "events": [Seen(**event) for event in one["events"]]}) for one in data["readers"]
            ],
            runs=list(data["runs"]),
            messages=list(data["messages"]),
            complaints=list(data["complaints"]),
            hosts=data["hosts"],
            away=[(gone, back) for gone, back in data["away"]],
        )
