"""A run's legal moves, and the version that orders its copies."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.runs import Priority, Run, RunState

QUEUED = Run("id", "chat", "local", {"prompt": "hello"}, 1_000)
ENDS = (RunState.DONE, RunState.FAILED, RunState.CANCELLED)


def test_a_run_begins_queued_and_unclaimed() -> None:
    assert (QUEUED.state, QUEUED.attempt, QUEUED.version) == (RunState.QUEUED, 0, 0)
    assert not QUEUED.state.terminal


def test_a_claim_makes_it_running_under_its_attempt() -> None:
    run = QUEUED.started(1, 2_000)
    assert (run.state, run.attempt, run.started_at) == (RunState.RUNNING, 1, 2_000)


def test_a_further_attempt_keeps_the_first_start() -> None:
    run = QUEUED.started(1, 2_000).started(2, 3_000)
    assert (run.state, run.attempt, run.started_at) == (RunState.RUNNING, 2, 2_000)


@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_an_attempt_that_is_not_higher_is_refused(attempt: int) -> None:
    with pytest.raises(ValueError, match="cannot start"):
        QUEUED.started(2, 2_000).started(attempt, 3_000)


@pytest.mark.parametrize("end", ENDS)
def test_terminal_states_absorb(end: RunState) -> None:
    ended = QUEUED.started(1, 2_000).ended(end, 3_000)
    assert ended.state.terminal
    with pytest.raises(ValueError, match="cannot start"):
        ended.started(2, 4_000)
    for other in ENDS:
        with pytest.raises(ValueError, match="cannot become"):
            ended.ended(other, 4_000)


@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.RUNNING])
def test_an_end_is_a_terminal_state(state: RunState) -> None:
    with pytest.raises(ValueError, match="cannot become"):
        QUEUED.started(1, 2_000).ended(state, 3_000)


def test_a_queued_run_can_be_cancelled() -> None:
    assert QUEUED.ended(RunState.CANCELLED, 2_000).state is RunState.CANCELLED


def test_an_end_keeps_what_it_is_not_told() -> None:
    run = replace(QUEUED.started(1, 2_000), stage="draw", progress=0.5, usage={"total_tokens": 1})

    kept = run.ended(RunState.DONE, 3_000)
    assert (kept.stage, kept.progress, kept.usage, kept.error, kept.ended_at) == (
        "draw",
        0.5,
        {"total_tokens": 1},
        None,
        3_000,
    )
    told = run.ended(RunState.FAILED, 3_000, error={"code": "x"}, usage={}, stage="end", progress=0.0)
    assert (told.stage, told.progress, told.usage, told.error) == ("end", 0.0, {}, {"code": "x"})


def test_every_legal_move_makes_the_version_grow() -> None:
    first = QUEUED.started(1, 1)
    second = first.started(2, 2)
    path = [QUEUED, first, second, second.ended(RunState.DONE, 3)]
    assert all(earlier.version < later.version for earlier, later in pairwise(path))
    assert QUEUED.ended(RunState.CANCELLED, 1).version > QUEUED.version


@given(st.integers(1, 1000), st.integers(1, 1000), st.sampled_from(ENDS), st.booleans())
def test_whatever_a_higher_attempt_wrote_beats_what_a_lower_one_wrote(
    one: int, other: int, end: RunState, ended: bool
) -> None:
    low, high = sorted((one, other))
    if low == high:
        return
    zombie = QUEUED.started(low, 1).ended(end, 2)
    owner = QUEUED.started(high, 1)
    assert (owner.ended(end, 2) if ended else owner).version > zombie.version


def test_a_run_survives_its_json_form() -> None:
    run = replace(
        QUEUED.started(2, 5).ended(RunState.FAILED, 9, error={"code": "deadline"}, usage={"total_tokens": 3}),
        chat_id="chat",
        message_id="message",
        idempotency_key="key",
        fingerprint="print",
        priority=Priority.URGENT,
        waits_for=("one", "two"),
    )
    back = Run.from_json(orjson.loads(orjson.dumps(run.to_json())))
    assert back == run
    assert isinstance(back.state, RunState)


def test_a_run_of_an_earlier_version_is_read_without_its_later_members() -> None:
    data = QUEUED.to_json()
    del data["priority"], data["waits_for"]
    assert Run.from_json(data) == QUEUED


def test_members_of_a_later_version_are_ignored() -> None:
    assert Run.from_json({**QUEUED.to_json(), "colour": "blue"}) == QUEUED
