"""What a caller may follow, told for many runs at once while a part is away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from headwater.access import Caller
from headwater.dev.services import Postgres
from headwater.errors import LogUnavailable, NotFound, StoreUnavailable
from headwater.ids import new_id
from headwater.messages import Message, Role
from headwater.reading import Reading
from headwater.records import Record
from headwater.runs import Run
from headwater.streams.base import Meta
from headwater.streams.memory import MemoryStreamLog
from support.house import frozen, make_house
from support.ids import old_id

ME = Caller("local")
STRANGER = Caller("somebody")


class StuckLog(MemoryStreamLog):
    """A log that takes every question and answers none."""

    asked = 0

    async def metas(self, run_ids: Sequence[str]) -> list[Meta | None]:
        self.asked += 1
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")


class SlowLog(MemoryStreamLog):
    """A log whose first answers come too late."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self._late = late

    async def metas(self, run_ids: Sequence[str]) -> list[Meta | None]:
        self._late -= 1
        if self._late >= 0:
            await asyncio.Event().wait()
        return await super().metas(run_ids)


async def test_a_busy_log_is_not_taken_for_one_that_does_not_know_the_run(
    redis_url: str, database_url: str, tmp_path: Path
) -> None:
    async with make_house(redis_url, database_url, tmp_path) as house:
        run = Run(id=new_id(), kind="chat", owner_id=ME.owner_id, input={}, created_at=1)
        slow, stuck = SlowLog(late=1), SlowLog(late=9)
        for log in (slow, stuck):
            assert await log.claim(run, "worker")
        await Reading(house.store, house.journal, slow, house.absence).may_read(ME, run.id)
        with pytest.raises(NotFound):
            await Reading(house.store, house.journal, slow, house.absence).may_read(ME, old_id())
        reading = Reading(house.store, house.journal, stuck, house.absence)
        with pytest.raises(LogUnavailable):
            await reading.may_read(ME, run.id)
        with pytest.raises(LogUnavailable):
            await reading.run_view(ME, run.id)
        refused = await reading.may_read_each(ME, [run.id])
        assert {key: type(error) for key, error in refused.items()} == {run.id: LogUnavailable}


async def test_a_run_that_only_postgresql_could_know_does_not_hide_the_others(
    redis_url: str, database_url: str, tmp_path: Path, postgres_server: Postgres
) -> None:
    async with make_house(redis_url, database_url, tmp_path, db_wait=0.6) as house:
        chat = await house.intake.create_chat(ME)
        run_id = (await house.intake.send(ME, chat.id, "hello")).task_id
        untold = old_id()
        assert {
            key: type(error) for key, error in (await house.reading.may_read_each(ME, [run_id, untold])).items()
        } == {untold: NotFound}
        with frozen(postgres_server.pid):
            refused = await house.reading.may_read_each(ME, [run_id, untold])
            assert {key: type(error) for key, error in refused.items()} == {untold: StoreUnavailable}
            refused = await house.reading.may_read_each(STRANGER, [run_id])
            assert {key: type(error) for key, error in refused.items()} == {run_id: NotFound}
        assert (await house.work()).state.terminal


async def test_an_answer_in_a_chat_that_another_host_took_is_shown_while_postgresql_is_away(
    redis_url: str, database_url: str, tmp_path: Path, postgres_server: Postgres
) -> None:
    said = Message(new_id(), new_id(), ME.owner_id, Role.ASSISTANT, "Hello", created_at=1)
    async with make_house(redis_url, database_url, tmp_path, db_wait=0.3) as house:
        with frozen(postgres_server.pid):
            # This host's worker has answered; question and chat are in the other's journal.
            await house.syncer.save([Record.of(said)], wait=0)
            assert list((await house.reading.get_chat(ME, said.chat_id)).messages) == [said]
            assert await house.reading.active_task(ME, said.chat_id) is None
            with pytest.raises(NotFound):
                await house.reading.active_task(STRANGER, said.chat_id)
            with pytest.raises(StoreUnavailable):
                await house.reading.active_task(ME, new_id())


async def test_a_log_that_does_not_answer_is_asked_once_for_all_runs(
    redis_url: str, database_url: str, tmp_path: Path
) -> None:
    async with make_house(redis_url, database_url, tmp_path) as house:
        runs = []
        for _ in range(8):
            chat = await house.intake.create_chat(ME)
            runs.append((await house.intake.send(ME, chat.id, "hello")).task_id)
        log = StuckLog()
        reading = Reading(house.store, house.journal, log, house.absence)
        assert await reading.may_read_each(ME, runs) == {}
        assert list(await reading.may_read_each(STRANGER, runs)) == runs
        assert log.asked == 2
        for _ in runs:
            await house.work()
