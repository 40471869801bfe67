"""Runs, as they are read. They change by records only."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from headwater.clock import to_ms
from headwater.ids import is_id
from headwater.runs import Priority, Run, RunState
from headwater.store.database import Database
from headwater.store.tables import ACTIVE, runs


class Runs:
    """Look-ups of runs. Whoever shows one to a caller checks its owner."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, run_id: str) -> Run | None:
        if not is_id(run_id):
            return None
        return await self._one(select(runs).where(runs.c.id == run_id))

    async def active_in(self, chat_id: str) -> list[Run]:
        """Every queued or running run of a chat, oldest first."""
        if not is_id(chat_id):
            return []
        return await self._database.run(lambda connection: active_runs(connection, chat_id))

    async def active_of(self, owner_id: str) -> list[Run]:
        """Every queued or running run of an owner, oldest first."""
        return await self._many(select(runs).where(runs.c.owner_id == owner_id, text(ACTIVE)))

    async def by_key(self, owner_id: str, key: str) -> Run | None:
        """The run an Idempotency-Key stands for; the earliest, should two hosts have taken the same key."""
        return await self._one(select(runs).where(runs.c.owner_id == owner_id, runs.c.idempotency_key == key))

    async def unfinished(self, *, older_than: float, limit: int) -> list[Run]:
        """Queued or running runs made more than `older_than` seconds ago by PostgreSQL's clock, oldest first."""
        age = func.make_interval(0, 0, 0, 0, 0, 0, older_than)
        return await self._many(select(runs).where(text(ACTIVE), runs.c.created_at < func.now() - age).limit(limit))

    async def _one(self, statement: Select[Any]) -> Run | None:
        found = await self._many(statement.limit(1))
        return found[0] if found else None

    async def _many(self, statement: Select[Any]) -> list[Run]:
        return await self._database.run(lambda connection: _fetch(connection, statement))


async def active_runs(connection: AsyncConnection, chat_id: str) -> list[Run]:
    """The queued and running runs of a chat, oldest first."""
    return await _fetch(connection, select(runs).where(runs.c.chat_id == chat_id, text(ACTIVE)))


async def _fetch(connection: AsyncConnection, statement: Select[Any]) -> list[Run]:
    ordered = statement.order_by(runs.c.created_at, runs.c.id)
    return [_run(row) for row in (await connection.execute(ordered)).all()]


def _run(row: Row[Any]) -> Run:
    return Run(
        id=row.id,
        kind=row.kind,
        owner_id=row.owner_id,
        input=row.input,
        created_at=to_ms(row.created_at),
        state=RunState(row.state),
        attempt=row.attempt,
        chat_id=row.chat_id,
        message_id=row.message_id,
        stage=row.stage,
        progress=row.progress,
        started_at=_ms(row.started_at),
        ended_at=_ms(row.ended_at),
        error=row.error,
        usage=row.usage,
        idempotency_key=row.idempotency_key,
        fingerprint=row.fingerprint,
        priority=Priority(row.priority),
        waits_for=tuple(row.waits_for),
    )


def _ms(moment: datetime | None) -> int | None:
    return None if moment is None else to_ms(moment)
