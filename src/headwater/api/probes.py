"""How each part is looked at for the health page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from headwater.api.health import Probe
from headwater.errors import JournalUnavailable
from headwater.journal import Journal
from headwater.queue import CHAT_QUEUE, JOBS_QUEUE, lists_of
from headwater.settings import Settings
from headwater.store import Store
from headwater.streams.base import StreamLog
from headwater.syncer import Syncer

logger = logging.getLogger(__name__)

#: Records that wait for so long mean trouble although PostgreSQL answers.
STALE_MS: Final = 60_000


STALE_SCHEMA: Final = "The schema is not up to date. Run `headwater db upgrade`."


def _is_up_to_date(url: str) -> bool:
    # Here and in a thread: the migration tool takes a while to load, and nothing else of a server needs it.
    from headwater.store import migrate

    return migrate.current(url) == migrate.head()


class Probes:
    """One method per part; each returns what is to be shown and raises when the part is away."""

    def __init__(self, settings: Settings, log: StreamLog, store: Store, journal: Journal, syncer: Syncer) -> None:
        self._settings = settings
        self._log = log
        self._store = store
        self._journal = journal
        self._syncer = syncer
        #: None until it was looked at. Once true it stays so while this process lives.
        self._migrated: bool | None = None
        self._asking: asyncio.Task[bool] | None = None

    async def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def all(self) -> Mapping[str, Probe]:
        return {
            "redis": self.redis,
            "postgres": self.postgres,
            "journal": self.journal,
            "worker": self.worker,
            "queue": self.queue,
        }

    async def redis(self) -> Mapping[str, Any]:
        await self._log.ping()
        return {}

    async def postgres(self) -> Mapping[str, Any]:
        await self._store.ping()
        if self._syncer.away:
            # Read-only, locked, full: it answers, and yet nothing gets in.
            return {"ok": False, "detail": "PostgreSQL answers but takes no rows. Its own log says why."}
        if not self._migrated and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(asyncio.to_thread(_is_up_to_date, self._settings.need_database()))
            self._asking.add_done_callback(self._told)
        if self._migrated is False:
            return {"ok": False, "migrated": False, "detail": STALE_SCHEMA}
        return {"migrated": self._migrated}

    def _told(self, asking: asyncio.Task[bool]) -> None:
        if asking.cancelled():
            return
        error = asking.exception()
        if error is not None:
            # It is asked again at the next look; PostgreSQL itself has a part of its own.
            logger.warning("the schema's version cannot be told: %s", error)
            return
        if self._migrated is None and not asking.result():
            logger.error(STALE_SCHEMA)
        self._migrated = asking.result()

    async def journal(self) -> Mapping[str, Any]:
        backlog = await self._journal.backlog()
        oldest = None if backlog.oldest_ms is None else round(backlog.oldest_ms / 1000, 1)
        found: dict[str, Any] = {"backlog": backlog.count, "oldest_seconds": oldest, "poison": backlog.poison}
        if backlog.poison:
            found["detail"] = f"PostgreSQL refused {backlog.poison} records; see `headwater journal status`."
        elif backlog.count and self._syncer.away:
            found["detail"] = "History is catching up: PostgreSQL is away, the journal keeps what is new."
        elif backlog.oldest_ms is not None and backlog.oldest_ms > STALE_MS:
            found["detail"] = "Records have been waiting for PostgreSQL for more than a minute."
        try:
            await self._journal.check()
        except JournalUnavailable as error:
            return {**found, "ok": False, "detail": str(error)}
        return found

    async def worker(self) -> Mapping[str, Any]:
        alive = await self._log.workers()
        if not alive:
            return {"ok": False, "count": 0, "detail": "No worker runs. Start one with `headwater worker`."}
        return {"count": len(alive)}

    async def queue(self) -> Mapping[str, Any]:
        return {"depth": await self._log.depth(*lists_of(CHAT_QUEUE, JOBS_QUEUE))}
