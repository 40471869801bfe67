"""What the syncer keeps in memory while neither disk nor PostgreSQL takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from headwater.clock import SystemClock
from headwater.errors import JournalUnavailable, StoreUnavailable
from headwater.journal import Backlog, Journal
from headwater.records import Record
from headwater.service import running
from headwater.store import Store
from headwater.syncer import Syncer
from headwater.telemetry import Telemetry
from support.runs import new_run
from support.wait import eventually


class Disk:
    """A journal that is full, then slow, and a PostgreSQL that is away."""

    def __init__(self) -> None:
        self.full = True
        self.adding: list[Sequence[Record]] = []
        self.kept: list[Sequence[Record]] = []
        self.goes_on = asyncio.Event()

    async def add(self, records: Sequence[Record], *_: Any) -> None:
        if self.full:
            raise JournalUnavailable("full")
        self.adding.append(records)
        await self.goes_on.wait()
        self.kept.append(records)

    async def unsynced(self, limit: int) -> list[Any]:
        return []

    async def backlog(self) -> Backlog:
        return Backlog(0, None, 0)

    async def apply(self, records: Sequence[Record]) -> None:
        raise StoreUnavailable("away")


async def test_what_is_owed_while_an_earlier_one_is_repaid_is_not_forgotten_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headwater.syncer.OWED", 1)
    disk = Disk()
    syncer = Syncer(cast("Journal", disk), cast("Store", disk), telemetry=Telemetry(), clock=SystemClock())
    first, second = ([Record.of(new_run())] for _ in range(2))
    with pytest.raises(StoreUnavailable):
        await syncer.keep(first)
    disk.full = False
    async with running(syncer):
        await eventually(lambda: disk.adding)
        disk.full = True
        with pytest.raises(StoreUnavailable):
            await syncer.keep(second)
        disk.full = False
        disk.goes_on.set()
        await eventually(lambda: disk.kept == [first, second])
