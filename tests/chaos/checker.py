"""The checker: compares what was promised, what every reader saw and what is stored.

It is pure and knows nothing of headwater's code: it reads events as they came off the wire and rows as
they came out of PostgreSQL. All rules but two are exact. `in time` and `stop stops` have limits that
leave out the time in which nobody could have gone on (`History.away`); they are the promised ones,
or far longer than what they judge ever takes, and do not depend on the speed of the machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from chaos.history import STORED, TERMINAL, History, Promise, Reader, Seen

#: Milliseconds within which a dead worker is noticed, or a run found whose order was lost, and it goes on.
NOTICED: Final = 15_000
#: Milliseconds that a run may go on after a cancel was taken.
STOPPED: Final = 5_000


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
        *_answers_take_turns(history),
        *_failures_have_a_name(history),
        *_attempts_grow(history),
        *_nothing_stands_still(history),
        *_stop_stops(history),
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
        if count > history.hosts:
            yield Violation("one answer", f"{count} runs have the key {key}")


def _nothing_uninvited(history: History) -> Iterable[Violation]:
    asked = Counter((row["chat_id"], row["content"]) for row in history.messages if row["role"] == "user")
    for (chat_id, question), count in asked.items():
        # Every question of the harness is another one.
        if count > history.hosts:
            yield Violation("one answer", f"{_short(question)} stands {count} times in chat {chat_id}")
    invited = {promise.run_id for promise in history.promises}
    keys = set(history.unanswered)
    if history.hosts > 1:
        # Both hosts may have taken the same request: docs/decisions/0004.
        keys |= {promise.key for promise in history.promises}
    for row in history.runs:
        if row["id"] not in invited and row["idempotency_key"] not in keys:
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


def _answers_take_turns(history: History) -> Iterable[Violation]:
    """Within a chat an answer begins when those before it have ended. Hosts that cannot see each other may differ."""
    rows, ends = {row["id"]: row for row in history.runs}, _first_ends(history)
    # A run that was stopped while it waited says nothing and so need not wait for its turn.
    spoke = {row["run_id"] for row in history.messages if row["status"] != "cancelled" or row["content"]}
    last: dict[str, str] = {}
    for promise in history.promises if history.hosts == 1 else ():
        run_id, before = promise.run_id, last.get(promise.chat_id)
        began = rows[run_id].get("started_at") if run_id in rows else None
        if run_id not in spoke or run_id not in ends or not began:
            continue
        if before is not None and began < ends[before]:
            early = f"{ends[before] - began} ms before {before} ended"
            yield Violation("in turn", f"run {run_id} of chat {promise.chat_id} began {early}")
        if before is None or ends[run_id] > ends[before]:
            last[promise.chat_id] = run_id


def _failures_have_a_name(history: History) -> Iterable[Violation]:
    for row in history.runs:
        if row["state"] == "failed" and row["code"] in {None, "internal"}:
            yield Violation("degrades by name", f"run {row['id']} failed with the code {row['code']}")


def _short(text: str) -> str:
    return repr(text) if len(text) < 80 else f"{text[:40]!r}…{text[-30:]!r} ({len(text)} characters)"


def _attempts_grow(history: History) -> Iterable[Violation]:
    for reader in history.readers:
        who = f"{reader.name} ({reader.transport}) of run {reader.run_id}"
        known = ("", 0)
        for event in reader.events:
            if event.seq == 0:
                # Whatever log follows is told from its start.
                known = ("", 0)
            elif "attempt" in event.data:
                epoch, attempt = known
                known = (event.epoch, event.data["attempt"])
                if epoch == event.epoch and event.data["attempt"] < attempt:
                    yield Violation("one writer", f"{who} heard of attempt {attempt} and then of attempt {known[1]}")


def _nothing_stands_still(history: History) -> Iterable[Violation]:
    for promise, times in _written(history):
        for before, after in pairwise([promise.accepted_at, *times] if promise.accepted_at else times):
            if _present(before, after, history.away) > NOTICED:
                yield Violation(
                    "in time", f"run {promise.run_id} stood still for {after - before} ms from {before} without a cause"
                )


def _stop_stops(history: History) -> Iterable[Violation]:
    for promise, times in _written(history):
        if promise.stopped_at and times and _present(promise.stopped_at, times[-1], history.away) > STOPPED:
            late = times[-1] - promise.stopped_at
            yield Violation("stop stops", f"run {promise.run_id} went on for {late} ms after its cancel was taken")


def _written(history: History) -> Iterable[tuple[Promise, Sequence[int]]]:
    """When each promised run wrote its events up to its first end, as far as readers know, in Unix milliseconds."""
    times: dict[str, set[int]] = defaultdict(set)
    for reader in history.readers:
        # What was made again from the rows has only two times, the run's beginning and its end.
        times[reader.run_id].update(
            event.data["at"] for event in reader.events if event.seq and event.epoch != STORED and "at" in event.data
        )
    ends = _first_ends(history)
    for promise in history.promises:
        end = ends.get(promise.run_id)
        yield promise, sorted(at for at in times[promise.run_id] if end is None or at <= end)


def _first_ends(history: History) -> dict[str, int]:
    """When each run first said its end, in Unix milliseconds. A log that was lost with it is told once more later."""
    ends = {row["id"]: row["ended_at"] for row in history.runs if row.get("ended_at")}
    for reader in history.readers:
        for event in reader.events:
            if event.type in TERMINAL and "at" in event.data:
                ends[reader.run_id] = min(event.data["at"], ends.get(reader.run_id, event.data["at"]))
    return ends


def _present(began: int, ended: int, away: Sequence[tuple[int, int]]) -> int:
    """Milliseconds between two moments, less those in which `away` says that nobody could go on."""
    left, at = 0, began
    for gone, back in sorted(away):
        if back > at and gone < ended:
            left += max(0, gone - at)
            at = back
    return left + max(0, ended - at)
