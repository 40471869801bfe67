"""Replay: a run whose log has expired is told again from its rows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from headwater.events import Cursor, Event, EventType
from headwater.hub import Hub
from headwater.ids import new_id
from headwater.intake import Accepted
from headwater.replay import EPOCH, PIECE, replayed
from headwater.runs import Run, RunState
from headwater.service import running
from headwater.transcript import Transcript
from support.house import ME, House, make_house
from support.wait import eventually


@pytest_asyncio.fixture
async def house(redis_url: str, database_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with make_house(redis_url, database_url, tmp_path) as made:
        yield made


async def said(house: House, question: str) -> Accepted:
    chat = await house.intake.create_chat(ME)
    return await house.intake.send(ME, chat.id, question)


async def logged(house: House, run_id: str) -> list[Event]:
    page = await house.log.read(run_id, 0, 10_000)
    assert page is not None
    return list(page.events)


@pytest.mark.parametrize(
    ("question", "end"),
    [("hello " * 2000, EventType.DONE), ("please fail", EventType.ERROR), ("ü🌊\n", EventType.DONE)],
)
async def test_an_expired_log_and_its_replay_add_up_to_the_same(house: House, question: str, end: EventType) -> None:
    accepted = await said(house, question)
    await house.work()
    log = await logged(house, accepted.task_id)
    page = await house.replay.page(accepted.task_id)
    assert page is not None
    assert (page.epoch, page.closed, page.count) == (EPOCH, True, len(page.events))
    assert [event.seq for event in page.events] == list(range(1, len(page.events) + 1))
    assert [event.terminal for event in page.events] == [False] * (len(page.events) - 1) + [True]
    told, lived = Transcript.of(page.events), Transcript.of(log)
    assert (told.content, told.reasoning) == (lived.content, lived.reasoning)
    assert told.end is not None
    assert lived.end is not None
    assert told.end.type is lived.end.type is end
    assert told.end.data == lived.end.data
    assert all(len(event.data.get("text", "")) <= PIECE for event in page.events)
    assert page.events[0].data == log[0].data


async def test_a_replay_never_changes(house: House) -> None:
    accepted = await said(house, "hello " * 2000)
    await house.work()

    async def encoded() -> list[bytes]:
        page = await house.replay.page(accepted.task_id)
        assert page is not None
        return [event.encode() for event in page.events]

    from_journal_or_store = await encoded()

    await eventually(house.synced)
    assert await encoded() == from_journal_or_store


async def test_a_cancelled_run_is_replayed(house: House) -> None:
    accepted = await said(house, "hello")
    await house.intake.cancel(ME, accepted.task_id)
    page = await house.replay.page(accepted.task_id)
    assert page is not None
    assert page.events[-1].type is EventType.CANCELLED


async def test_there_is_no_replay_before_the_end_or_of_nothing(house: House) -> None:
    accepted = await said(house, "wait")
    assert await house.replay.page(accepted.task_id) is None
    working = house.begin()
    await eventually(lambda: house.asked)
    assert await house.replay.page(accepted.task_id) is None
    house.gate.set()
    await working
    assert await house.replay.page(accepted.task_id) is not None
    assert await house.replay.page(new_id()) is None


async def test_a_reader_after_the_expiry_gets_it_all_and_can_go_on_from_anywhere(house: House) -> None:
    accepted = await said(house, "hello " * 2000)
    await house.work()
    await house.log.forget(accepted.task_id)
    page = await house.replay.page(accepted.task_id)
    assert page is not None
    hub = Hub(house.log, history=house.replay, telemetry=house.telemetry)
    async with running(hub):
        for seen in range(len(page.events) + 1):
            cursor = Cursor(EPOCH, seen) if seen else None
            assert await read(hub, accepted.task_id, cursor) == [event.encode() for event in page.events[seen:]]


async def read(hub: Hub, run_id: str, after: Cursor | None) -> list[bytes]:
    subscription = hub.subscribe(run_id, after)
    got: list[bytes] = []
    try:
        while (batch := await subscription.next()) is not None:
            assert not batch.reset
            got += [event.encode() for event in batch.events]
    finally:
        subscription.close()
    return got


def test_a_job_without_a_message_is_replayed() -> None:
    run = Run(new_id(), "shorts", "local", {}, 1000, RunState.RUNNING, attempt=2, started_at=1500)
    ended = run.ended(RunState.FAILED, 2000, error={"code": "x", "message": "No."}, stage="render", progress=0.5)
    state, progress, end = replayed(ended, None)
    assert (state.type, state.data, state.at) == (EventType.STATE, {"state": "running", "attempt": 2}, 1500)
    assert progress.data == {"stage": "render", "progress": 0.5, "message": ""}
    assert (end.type, end.data, end.at) == (EventType.ERROR, {"code": "x", "message": "No.", "retryable": False}, 2000)
    assert [event.seq for event in replayed(replace(ended, attempt=0, stage=None), None)] == [1]
