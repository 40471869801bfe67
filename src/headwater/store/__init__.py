"""The store: chats, messages and runs in PostgreSQL, the master."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

from sqlalchemy import text

from headwater.clock import Clock
from headwater.records import Record
from headwater.store.apply import writing
from headwater.store.chats import Chats, Turn, turn
from headwater.store.database import Database
from headwater.store.runs import Runs

__all__ = ["Chats", "Runs", "Store", "Turn"]

_PING: Final = text("SELECT 1")


class Store:
    """PostgreSQL, for one event loop.

    `url` is a libpq URL, `pool_size` the most connections at once, `wait` the seconds any call may
    take, `clock` what `lost_at` is read from. Every call raises StoreUnavailable when PostgreSQL does
    not answer within that time. Making a Store connects to nothing; making it in the process that uses
    it keeps forks safe.
    """

    def __init__(self, url: str, *, pool_size: int, wait: float, clock: Clock) -> None:
        self._database = Database(url, pool_size=pool_size, wait=wait, clock=clock)
        self.chats = Chats(self._database)
        self.runs = Runs(self._database)

    @property
    def lost_at(self) -> float | None:
        """When PostgreSQL was last found away, by the clock's `monotonic`; None when it never was."""
        return self._database.lost_at

    async def ping(self) -> None:
        """Whether PostgreSQL answers."""
        await self._database.rows(_PING)

    async def close(self) -> None:
        await self._database.close()

    async def apply(self, records: Sequence[Record]) -> None:
        """Write records in one transaction, each only over a lower version; those of deleted chats are left out.

        Applying a record again, or late, changes nothing. Raises RecordRefused when one of them can
        never be stored; then none was.
        """
        if records:
            await self._database.fly(*writing(records))

    def turn(self, owner_id: str, chat_id: str, key: str | None = None) -> AbstractAsyncContextManager[Turn]:
        """One turn at a time in a chat, across processes: a transaction with the chat's row locked.

        `key` is an Idempotency-Key to look up as well. Raises NotFound.
        """
        return turn(self._database, owner_id, chat_id, key)
