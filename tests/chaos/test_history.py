"""The checker itself: a history that is right passes, and every way to be wrong is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from chaos.checker import check
from chaos.history import History, Promise, Reader, Seen

ANSWER = "one two three"
TIMES = {"started_at": 1_000, "ended_at": 40_000}
LATER = {"started_at": 40_000, "ended_at": 41_000}


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
        runs=[{"id": "r", "state": "done", "attempt": 1, "idempotency_key": "key-1", "code": None, **TIMES}],
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


def test_a_log_that_is_told_again_from_its_start_tells_its_attempts_again() -> None:
    history = right()
    for reader in history.readers:
        states = [Seen("e1", seq, "state", {"state": "running", "attempt": seq}) for seq in (1, 2)]
        rest = [replace(event, seq=event.seq + 1) for event in reader.events[1:]]
        reader.events = [*states, Seen("e1", 0, "reset", {"reason": "history_lost"}), *states, *rest]
    assert check(history) == []


def test_a_stored_reset_forgets_the_first_attempt() -> None:
    history = right()
    for reader in history.readers:
        first, *rest = reader.events
        told = [first, Seen("e1", 2, "content", {"text": "one t"}), Seen("e1", 3, "reset", {"attempt": 2})]
        reader.events = told + [replace(event, seq=event.seq + 2) for event in rest]
    history.runs[0] = {**history.runs[0], "attempt": 2}
    assert check(history) == []


def test_time_in_which_nobody_could_go_on_does_not_count() -> None:
    history = right()
    history.promises[0] = replace(history.promises[0], accepted_at=1_000)
    _written_at(history, 20_000, 20_001, 20_002, 28_000, 28_001)
    history.stopped("r", 20_003)
    history.away = [(22_000, 27_000), (500, 4_000), (3_000, 10_000)]
    assert check(history) == []


def test_a_question_that_was_stopped_while_it_waited_needs_no_turn() -> None:
    history = right()
    answer_two_at_once(history)
    history.promises[1] = replace(history.promises[1], stopped=True)
    history.runs[1] = {**history.runs[1], "state": "cancelled"}
    history.messages[3] = {**history.messages[3], "status": "cancelled", "content": ""}
    assert check(history) == []


def test_an_end_that_was_lost_and_told_again_counts_when_it_was_told_first() -> None:
    history = right()
    answer_two_at_once(history)
    history.readers[0].events[-1] = Seen("e1", 5, "done", {"at": 39_999, "finish_reason": "stop"})
    history.readers[1].events[-1] = history.readers[0].events[-1]
    history.readers.append(Reader("cleo", "poll", "r", [], finished=True))
    late = [replace(event, epoch="e2", data={**event.data, "at": 90_000}) for event in history.readers[0].events]
    history.readers[-1].events = late
    history.stopped("r", 39_000)
    assert check(history) == []


def test_two_hosts_that_cannot_see_each_other_may_take_a_request_each() -> None:
    history = right()
    run, (question, answer) = history.runs[0], history.messages
    history.runs.append({**run, "id": "r2"})
    history.messages += [{**question, "id": "q2"}, {**answer, "id": "a2", "run_id": "r2"}]
    assert len(check(history)) == 3
    history.hosts = 2
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


def show_an_event_without_a_number(history: History) -> None:
    history.readers[0].events.insert(0, Seen("e1", 0, "content", {"text": "zero "}))


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


def show_other_words_than_are_stored(history: History) -> None:
    history.readers[0].events[3] = Seen("e1", 4, "content", {"text": "four"})


def tell_another_end_than_is_stored(history: History) -> None:
    history.readers[0].events[4] = Seen("e1", 5, "error", {"code": "provider_cut"})


def store_words_of_somebody_else(history: History) -> None:
    history.runs[0] = {**history.runs[0], "state": "failed", "code": "provider_cut"}
    history.messages[1] = {**history.messages[1], "status": "failed", "content": "eins"}


def store_a_message_twice(history: History) -> None:
    history.messages.append(history.messages[1])


def store_a_run_twice(history: History) -> None:
    history.runs.append(history.runs[0])


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


def leave_run_and_answer_running(history: History) -> None:
    history.runs[0] = {**history.runs[0], "state": "running"}
    history.messages[1] = {**history.messages[1], "status": "running"}


def store_the_answer_twice(history: History) -> None:
    history.messages.append({**history.messages[1], "id": "a2"})


def run_it_twice(history: History) -> None:
    history.runs.append({"id": "r2", "state": "done", "attempt": 1, "idempotency_key": "key-1", "code": None, **TIMES})


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
    history.runs.append({"id": "r2", "state": "done", "attempt": 1, "idempotency_key": "key-2", "code": None, **LATER})
    question, answer = history.messages
    history.messages = [{**question, "id": "q2", "content": "again"}, question, answer]
    history.messages.append({**answer, "id": "a2", "run_id": "r2"})


def store_a_question_twice(history: History) -> None:
    history.messages.append({**history.messages[0], "id": "q2"})


def go_back_to_an_earlier_attempt(history: History) -> None:
    for reader in history.readers:
        reader.events[0] = Seen("e1", 1, "state", {"state": "running", "attempt": 2})
        reader.events[1:1] = [Seen("e1", 2, "state", {"state": "running", "attempt": 1})]
        reader.events[2:] = [replace(event, seq=event.seq + 1) for event in reader.events[2:]]


def _written_at(history: History, *times: int) -> None:
    for reader in history.readers:
        reader.events = [
            replace(event, data={**event.data, "at": at}) for event, at in zip(reader.events, times, strict=True)
        ]


def stand_still(history: History) -> None:
    _written_at(history, 1_000, 2_000, 20_000, 20_001, 20_002)
    # Something was away, but not for long enough.
    history.away = [(3_000, 5_000)]


def begin_late(history: History) -> None:
    history.promises[0] = replace(history.promises[0], accepted_at=1_000)
    _written_at(history, 20_000, 20_001, 20_002, 20_003, 20_004)


def go_on_after_a_stop(history: History) -> None:
    _written_at(history, 1_000, 2_000, 8_000, 8_001, 8_002)
    history.stopped("r", 2_000)


def answer_two_at_once(history: History) -> None:
    history.promises.append(Promise("r2", "c", "a2", "q2", "again", ANSWER, "key-2"))
    row = {"id": "r2", "state": "done", "attempt": 1, "idempotency_key": "key-2", "code": None}
    history.runs.append({**row, **LATER, "started_at": 39_999})
    question, answer = history.messages
    history.messages += [{**question, "id": "q2", "content": "again"}, {**answer, "id": "a2", "run_id": "r2"}]


def fail_without_a_name(history: History) -> None:
    history.runs[0] = {**history.runs[0], "state": "failed", "code": "internal"}
    history.messages[1] = {**history.messages[1], "status": "failed"}
    for reader in history.readers:
        reader.events[-1] = Seen("e1", 5, "error", {"code": "internal"})


def meet_an_internal_error(history: History) -> None:
    history.complaints.append("500 from POST /api/chats")


#: How to spoil it, and a part of what must be said of it: every rule of the checker is here.
WRONG: list[tuple[Callable[[History], None], str]] = [
    (lose_an_event, "exact: anna (sse) of run r saw a hole before e1-4"),
    (double_an_event, "exact: anna (sse) of run r saw twice e1-2"),
    (swap_two_events, "exact: anna (sse) of run r saw twice e1-2"),
    (begin_behind_the_start, "exact: anna (sse) of run r saw a hole before e1-2, expected 1"),
    (show_an_event_without_a_number, "exact: anna (sse) of run r saw a content without a number"),
    (end_twice, "exact: anna (sse) of run r saw done e1-6 after the end"),
    (never_end, "exact: anna (sse) of run r finished with 0 terminal events"),
    (hang, "it ends: anna (sse) of run r never reached the end"),
    (change_the_epoch_in_silence, "loss is said: anna (sse) of run r went from epoch e1 to e2"),
    (tell_two_readers_different_things, "exact: two readers of r saw different events at e1-2"),
    (show_other_words_than_are_stored, "exact: anna (sse) of run r saw 'one two four', stored is"),
    (tell_another_end_than_is_stored, "exact: anna of run r saw error, stored is done"),
    (store_other_words, "one answer: run r is done with 'one two'"),
    (store_a_doubled_answer, "one answer: run r is done with"),
    (store_words_of_somebody_else, "one answer: run r stored what the model never said: 'eins'"),
    (store_another_state, "it ends: run r is done, its message a failed"),
    (lose_the_run, "accepted is kept: run r was answered with 202"),
    (lose_the_question, "accepted is kept: the question of run r"),
    (lose_the_answer, "accepted is kept: run r has no answer's row"),
    (leave_it_running, "it ends: run r is running, its message a done"),
    (leave_run_and_answer_running, "it ends: run r is running"),
    (store_the_answer_twice, "one answer: 2 answers belong to run r"),
    (store_a_message_twice, "one answer: 2 messages have the id a"),
    (store_a_run_twice, "one answer: 2 runs have the id r"),
    (store_a_question_twice, "one answer: 'count' stands 2 times in chat c"),
    (run_it_twice, "one answer: 2 runs have the key key-1"),
    (run_what_nobody_asked, "one answer: run r2 was never asked for"),
    (cancel_what_nobody_stopped, "it ends: run r is cancelled and nobody asked for it"),
    (go_back_to_an_earlier_attempt, "one writer: anna (sse) of run r heard of attempt 2 and then of attempt 1"),
    (stand_still, "in time: run r stood still for 18000 ms"),
    (begin_late, "in time: run r stood still for 19000 ms"),
    (go_on_after_a_stop, "stop stops: run r went on for 6002 ms"),
    (swap_two_questions, "in order: the questions of chat c"),
    (answer_two_at_once, "in turn: run r2 of chat c began 1 ms before r ended"),
    (fail_without_a_name, "degrades by name: run r failed with the code internal"),
    (meet_an_internal_error, "degrades by name: 500 from POST /api/chats"),
]


@pytest.mark.parametrize(("spoil", "said"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_history_is_found(spoil: Callable[[History], None], said: str) -> None:
    history = right()
    spoil(history)
    found = [str(violation) for violation in check(history)]
    assert any(said in violation for violation in found), found


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
    history.stopped("r", 7)
    history.stopped("r", 9)
    assert [(promise.stopped, promise.stopped_at) for promise in history.promises] == [(True, 7), (False, 0)]
