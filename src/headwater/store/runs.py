"""Runs, as they are read. They change by records only."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, Select, bindparam, func, select, text

from headwater.clock import to_ms
from headwater.ids import is_id
from headwater.runs import Priority, Run, RunState
from headwater.store.database import Database
from headwater.store.tables import ACTIVE, runs

_ORDER: Final = (runs.c.created_at, runs.c.id)
#: The queued and running runs of the chat `chat_id`, oldest first.
ACTIVE_RUNS: Final = select(runs).where(runs.c.chat_id == bindparam("chat_id"), text(ACTIVE)).order_by(*_ORDER)
#: The run that the Idempotency-Key `key` of `owner_id` stands for; the earliest, should two hosts have taken it.
RUN_OF_KEY: Final = (
    select(runs)
    .where(runs.c.owner_id == bindparam("owner_id"), runs.c.idempotency_key == bindparam("key"))
    .order_by(*_ORDER)
    .limit(1)
)


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
        return await self._many(ACTIVE_RUNS, chat_id=chat_id)

    async def active_of(self, owner_id: str) -> list[Run]:
        """Every queued or running run of an owner, oldest first."""
        return await self._many(select(runs).where(runs.c.owner_id == owner_id, text(ACTIVE)))

    async def unfinished(self, skip: int = 0, *, older_than: float, limit: int) -> list[Run]:
        """Queued or running runs made more than `older_than` seconds ago by PostgreSQL's clock, oldest first.

        At most `limit`, past the first `skip`.
        """
        age = func.make_interval(0, 0, 0, 0, 0, 0, older_than)
        old = select(runs).where(text(ACTIVE), runs.c.created_at < func.now() - age)
        return await self._many(old.limit(limit).offset(skip))

    async def _one(self, statement: Select[Any]) -> Run | None:
        found = await self._many(statement.limit(1))
        return found[0] if found else None

    async def _many(self, statement: Select[Any], **values: Any) -> list[Run]:
        return [run_of(row) for row in await self._database.rows(statement.order_by(None).order_by(*_ORDER), **values)]


def run_of(row: Row[Any]) -> Run:
    """A row of the table as a run."""
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
