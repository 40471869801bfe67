"""The checker itself: a history that is right passes, and every way to be wrong is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from chaos.history import History, Promise, Reader, Seen, check

ANSWER = "one two three"


def right() -> History:
    promise = Promise("r", "c", "a", "q", "count", ANSWER, "key-1")
    events = [Seen("e1", 1, "state", {"state": "running"})]
    events += [Seen("e1", seq + 2, "content", {"text": text}) for seq, text in enumerate(("one ", "two ", "three"))]
    events.append(Seen("e1", 5, "done", {"finish_reason": "stop"}))
    return History(
        promises=[promise],
        readers=[
            Reader("anna", "sse", "r", list(events), finished=True),
            Reader("bert", "poll", "r", list(events), finished=True),
        ],
        runs=[{"id": "r", "state": "done", "attempt": 1, "idempotency_key": "key-1", "code": None}],
        messages=[
            {"id": "q", "chat_id": "c", "role": "user", "content": "count", "status": "done", "run_id": None},
            {"id": "a", "chat_id": "c", "role": "assistant", "content": ANSWER, "status": "done", "run_id": "r"},
        ],
    )


def test_a_right_history_has_no_violation() -> None:
    assert check(right()) == []


def test_a_reset_and_a_new_epoch_are_right() -> None:
    history = right()
    reader = history.readers[0]
    lost = [Seen("e0", 1, "state", {}), Seen("e0", 2, "content", {"text": "old"}), Seen("e1", 0, "reset", {})]
    reader.events = [*lost, *reader.events]
    assert check(history) == []


def test_a_stored_reset_forgets_the_first_attempt() -> None:
    history = right()
    for reader in history.readers:
        first, *rest = reader.events
        told = [first, Seen("e1", 2, "content", {"text": "one t"}), Seen("e1", 3, "reset", {"attempt": 2})]
        reader.events = told + [replace(event, seq=event.seq + 2) for event in rest]
    assert check(history) == []


def lose_an_event(history: History) -> None:
    del history.readers[0].events[2]


def double_an_event(history: History) -> None:
    history.readers[0].events.insert(2, history.readers[0].events[1])


def swap_two_events(history: History) -> None:
    events = history.readers[0].events
    events[1], events[2] = events[2], events[1]


def begin_behind_the_start(history: History) -> None:
    del history.readers[0].events[0]


def end_twice(history: History) -> None:
    history.readers[0].events.append(Seen("e1", 6, "done", {}))


def never_end(history: History) -> None:
    history.readers[0].events.pop()


def hang(history: History) -> None:
    history.readers[0].events.pop()
    history.readers[0].finished = False


def change_the_epoch_in_silence(history: History) -> None:
    events = history.readers[0].events
    history.readers[0].events = [*events[:3], *(replace(event, epoch="e2") for event in events[3:])]


def tell_two_readers_different_things(history: History) -> None:
    history.readers[0].events[1] = Seen("e1", 2, "content", {"text": "eins "})


def store_other_words(history: History) -> None:
    history.messages[1] = {**history.messages[1], "content": "one two"}


def store_a_doubled_answer(history: History) -> None:
    history.messages[1] = {**history.messages[1], "content": ANSWER + ANSWER}
    for reader in history.readers:
        reader.events[3] = Seen("e1", 4, "content", {"text": "three" + ANSWER})


def store_another_state(history: History) -> None:
    history.messages[1] = {**history.messages[1], "status": "failed"}


def lose_the_run(history: History) -> None:
    history.runs.clear()


def lose_the_question(history: History) -> None:
    del history.messages[0]


def lose_the_answer(history: History) -> None:
    del history.messages[1]


def leave_it_running(history: History) -> None:
    history.runs[0] = {**history.runs[0], "state": "running"}


def store_the_answer_twice(history: History) -> None:
    history.messages.append({**history.messages[1], "id": "a2"})


def run_it_twice(history: History) -> None:
    history.runs.append({"id": "r2", "state": "done", "attempt": 1, "idempotency_key": "key-1", "code": None})


def run_what_nobody_asked(history: History) -> None:
    history.runs.append({"id": "r2", "state": "done", "attempt": 1, "idempotency_key": None, "code": None})


def cancel_what_nobody_stopped(history: History) -> None:
    history.runs[0] = {**history.runs[0], "state": "cancelled"}
    history.messages[1] = {**history.messages[1], "status": "cancelled"}
    for reader in history.readers:
        reader.events[-1] = Seen("e1", 5, "cancelled", {})


def swap_two_questions(history: History) -> None:
    later = Promise("r2", "c", "a2", "q2", "again", ANSWER, "key-2")
    history.promises.append(later)
    history.runs.append({"id": "r2", "state": "done", "attempt": 1, "idempotency_key": "key-2", "code": None})
    question, answer = history.messages
    history.messages = [{**question, "id": "q2", "content": "again"}, question, answer]
    history.messages.append({**answer, "id": "a2", "run_id": "r2"})


def fail_without_a_name(history: History) -> None:
    history.runs[0] = {**history.runs[0], "state": "failed", "code": "internal"}
    history.messages[1] = {**history.messages[1], "status": "failed"}
    for reader in history.readers:
        reader.events[-1] = Seen("e1", 5, "error", {"code": "internal"})


def meet_an_internal_error(history: History) -> None:
    history.complaints.append("500 from POST /api/chats")


WRONG: list[tuple[Callable[[History], None], str]] = [
    (lose_an_event, "exact"),
    (double_an_event, "exact"),
    (swap_two_events, "exact"),
    (begin_behind_the_start, "exact"),
    (end_twice, "exact"),
    (never_end, "exact"),
    (hang, "it ends"),
    (change_the_epoch_in_silence, "loss is said"),
    (tell_two_readers_different_things, "exact"),
    (store_other_words, "one answer"),
    (store_a_doubled_answer, "one answer"),
    (store_another_state, "it ends"),
    (lose_the_run, "accepted is kept"),
    (lose_the_question, "accepted is kept"),
    (lose_the_answer, "accepted is kept"),
    (leave_it_running, "it ends"),
    (store_the_answer_twice, "one answer"),
    (run_it_twice, "one answer"),
    (run_what_nobody_asked, "one answer"),
    (cancel_what_nobody_stopped, "it ends"),
    (swap_two_questions, "in order"),
    (fail_without_a_name, "degrades by name"),
    (meet_an_internal_error, "degrades by name"),
]


@pytest.mark.parametrize(("spoil", "rule"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_history_is_found(spoil: Callable[[History], None], rule: str) -> None:
    history = right()
    spoil(history)
    assert rule in {violation.rule for violation in check(history)}


@pytest.mark.parametrize("spoil", [None, *(spoil for spoil, _ in WRONG)])
def test_a_history_that_was_kept_is_judged_the_same(spoil: Callable[[History], None] | None) -> None:
    history = right()
    if spoil is not None:
        spoil(history)
    kept = History.from_json(json.loads(json.dumps(history.to_json())))
    assert check(kept) == check(history)


def test_a_stop_is_noted_on_its_promise_alone() -> None:
    history = right()
    history.promises.append(replace(history.promises[0], run_id="other"))
    history.stopped("r")
    assert [promise.stopped for promise in history.promises] == [True, False]
