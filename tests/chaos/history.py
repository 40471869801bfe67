"""History: what was promised, what every reader saw, what is stored; and the checker that compares them.

The checker is pure. It knows nothing of headwater's code: it reads events as they came off the
wire and rows as they came out of PostgreSQL.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Final, Self

TERMINAL: Final = {"done": "done", "error": "failed", "cancelled": "cancelled"}


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
    #: Somebody asked to stop it.
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """One event as it reached a reader."""

    epoch: str
    seq: int
    type: str
    data: Mapping[str, Any]


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
    #: Rows of PostgreSQL: id, state, attempt, idempotency_key, and the error's code.
    runs: list[Mapping[str, Any]] = field(default_factory=list)
    #: Rows of PostgreSQL, each chat's in its order: id, chat_id, role, content, status, run_id.
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    #: What clients met that no fault excuses: an internal error, a 404 for what was accepted, a process that fell.
    complaints: list[str] = field(default_factory=list)

    def stopped(self, run_id: str) -> None:
        """Somebody is about to ask that this run stops."""
        for index, promise in enumerate(self.promises):
            if promise.run_id == run_id:
                self.promises[index] = replace(promise, stopped=True)

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
        )


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: the rule's name and the case."""

    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


def check(history: History) -> list[Violation]:
    """Every violation of the promises; an empty list is the proof."""
    return [
        *_every_promise_ends(history),
        *_one_row_each(history),
        *_nothing_uninvited(history),
        *(violation for reader in history.readers for violation in _reader_is_exact(reader)),
        *_readers_agree(history.readers),
        *_text_is_what_is_stored(history),
        *_answers_are_whole(history),
        *_chats_are_in_order(history),
        *_failures_have_a_name(history),
        *(Violation("degrades by name", complaint) for complaint in history.complaints),
    ]


def _every_promise_ends(history: History) -> Iterable[Violation]:
    runs = {row["id"]: row for row in history.runs}
    messages = {row["id"]: row for row in history.messages}
    for promise in history.promises:
        run = runs.get(promise.run_id)
        if run is None:
            yield Violation("accepted is kept", f"run {promise.run_id} was answered with 202 and is not stored")
            continue
        if run["state"] not in TERMINAL.values():
            yield Violation("it ends", f"run {promise.run_id} is {run['state']}")
        answer, question = messages.get(promise.message_id), messages.get(promise.user_message_id)
        if question is None or question["content"] != promise.question:
            yield Violation("accepted is kept", f"the question of run {promise.run_id} is not stored as it was asked")
        if answer is None:
            yield Violation("accepted is kept", f"run {promise.run_id} has no answer's row")
        elif answer["status"] != run["state"]:
            yield Violation(
                "it ends",
                f"run {promise.run_id} is {run['state']}, its message {promise.message_id} {answer['status']}",
            )


def _one_row_each(history: History) -> Iterable[Violation]:
    for name, rows in (("runs", history.runs), ("messages", history.messages)):
        for row_id, count in Counter(row["id"] for row in rows).items():
            if count > 1:
                yield Violation("one answer", f"{count} {name} have the id {row_id}")
    for run_id, count in Counter(row["run_id"] for row in history.messages if row["role"] == "assistant").items():
        if count > 1:
            yield Violation("one answer", f"{count} answers belong to run {run_id}")
    for key, count in Counter(row["idempotency_key"] for row in history.runs if row["idempotency_key"]).items():
        if count > 1:
            yield Violation("one answer", f"{count} runs have the key {key}")


def _nothing_uninvited(history: History) -> Iterable[Violation]:
    invited = {promise.run_id for promise in history.promises}
    for row in history.runs:
        if row["id"] not in invited and row["idempotency_key"] not in history.unanswered:
            yield Violation("one answer", f"run {row['id']} was never asked for")


def _reader_is_exact(reader: Reader) -> Iterable[Violation]:
    who = f"{reader.name} ({reader.transport}) of run {reader.run_id}"
    epoch, expected, terminals = None, 1, 0
    for event in reader.events:
        if event.seq == 0:
            if event.type != "reset":
                yield Violation("exact", f"{who} saw a {event.type} without a number")
            # Nothing is shown any more, so whatever log follows is told from its start.
            epoch, expected, terminals = None, 1, 0
            continue
        if epoch is not None and event.epoch != epoch:
            yield Violation("loss is said", f"{who} went from epoch {epoch} to {event.epoch} without a reset")
            expected = event.seq
        epoch = event.epoch
        if event.seq != expected:
            kind = "twice" if event.seq < expected else "a hole before"
            yield Violation("exact", f"{who} saw {kind} {epoch}-{event.seq}, expected {expected}")
        if terminals:
            yield Violation("exact", f"{who} saw {event.type} {epoch}-{event.seq} after the end")
        expected = event.seq + 1
        terminals += event.type in TERMINAL
    if reader.finished and terminals != 1:
        yield Violation("exact", f"{who} finished with {terminals} terminal events")
    if not reader.finished:
        yield Violation("it ends", f"{who} never reached the end")


def _readers_agree(readers: Iterable[Reader]) -> Iterable[Violation]:
    known: dict[tuple[str, str, int], Seen] = {}
    for reader in readers:
        for event in reader.events:
            if event.seq == 0:
                continue
            first = known.setdefault((reader.run_id, event.epoch, event.seq), event)
            if (first.type, first.data) != (event.type, event.data):
                yield Violation(
                    "exact", f"two readers of {reader.run_id} saw different events at {event.epoch}-{event.seq}"
                )


def _text_is_what_is_stored(history: History) -> Iterable[Violation]:
    stored = {row["run_id"]: row for row in history.messages if row["role"] == "assistant"}
    for reader in history.readers:
        row = stored.get(reader.run_id)
        if row is None or not reader.finished:
            continue
        if reader.text() != row["content"]:
            yield Violation(
                "exact",
                f"{reader.name} ({reader.transport}) of run {reader.run_id} saw {_short(reader.text())}, "
                f"stored is {_short(row['content'])}",
            )
        end = next((event.type for event in reversed(reader.events) if event.type in TERMINAL), None)
        if end is not None and TERMINAL[end] != row["status"]:
            yield Violation("exact", f"{reader.name} of run {reader.run_id} saw {end}, stored is {row['status']}")


def _answers_are_whole(history: History) -> Iterable[Violation]:
    stored = {row["run_id"]: row for row in history.messages if row["role"] == "assistant"}
    for promise in history.promises:
        row = stored.get(promise.run_id)
        if row is None or promise.answer is None:
            continue
        if row["status"] == "done" and row["content"] != promise.answer:
            yield Violation("one answer", f"run {promise.run_id} is done with {_short(row['content'])}")
        if not promise.answer.startswith(row["content"]):
            yield Violation(
                "one answer", f"run {promise.run_id} stored what the model never said: {_short(row['content'])}"
            )
        if row["status"] == "cancelled" and not promise.stopped:
            yield Violation("it ends", f"run {promise.run_id} is cancelled and nobody asked for it")


def _chats_are_in_order(history: History) -> Iterable[Violation]:
    asked: dict[str, list[str]] = defaultdict(list)
    for promise in history.promises:
        # Another answer to the same question is one more promise and no further question.
        if promise.user_message_id not in asked[promise.chat_id]:
            asked[promise.chat_id].append(promise.user_message_id)
    known = {promise.user_message_id for promise in history.promises}
    stored: dict[str, list[str]] = defaultdict(list)
    for row in history.messages:
        if row["id"] in known:
            stored[row["chat_id"]].append(row["id"])
    for chat_id, questions in asked.items():
        if set(stored[chat_id]) == set(questions) and stored[chat_id] != questions:
            yield Violation("in order", f"the questions of chat {chat_id} are not stored in the order they were asked")


def _failures_have_a_name(history: History) -> Iterable[Violation]:
    for row in history.runs:
        if row["state"] == "failed" and row["code"] in {None, "internal"}:
            yield Violation("degrades by name", f"run {row['id']} failed with the code {row['code']}")


def _short(text: str) -> str:
    return repr(text) if len(text) < 80 else f"{text[:40]!r}…{text[-30:]!r} ({len(text)} characters)"


def summary(history: History) -> dict[str, Any]:
    """Figures for the report."""
    states: dict[str, int] = defaultdict(int)
    for row in history.runs:
        states[row["state"]] += 1
    return {
        "promises": len(history.promises),
        "readers": len(history.readers),
        "connections": sum(reader.connections for reader in history.readers),
        "events": sum(len(reader.events) for reader in history.readers),
        "resets": sum(event.type == "reset" for reader in history.readers for event in reader.events),
        "attempts": sum(row["attempt"] for row in history.runs),
        "most_attempts": max((row["attempt"] for row in history.runs), default=0),
        "states": dict(states),
        "failures": dict(Counter(row["code"] for row in history.runs if row["state"] == "failed")),
        "longest_silence": max(map(_longest_silence, history.readers), default=(0.0, 0, "")),
    }


def _longest_silence(reader: Reader) -> tuple[float, int, str]:
    """Between two neighbouring events of one log: seconds, when it began in Unix milliseconds, and the run."""
    longest = (0.0, 0, reader.run_id)
    for before, after in pairwise(reader.events):
        # What was made again from the rows has only two times, the run's beginning and its end.
        if before.epoch == after.epoch != "stored" and 0 < before.seq < after.seq:
            began, ended = before.data["at"], after.data["at"]
            longest = max(longest, ((ended - began) / 1000, began, reader.run_id))
    return longest
