"""The syncer: brings what the journal holds to PostgreSQL, in order, until nothing is left.

Several may work on one journal, in this process or in others: applying a record twice changes
nothing, so they need not know of each other.

A record that PostgreSQL refuses is set aside at once. One that it never answers to, because it alone
runs into a time limit or ends its session, is set aside when others are seen to pass. Both are tried
again, a few times soon and then with every periodic sync.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence
from typing import Final

from headwater.clock import Clock
from headwater.errors import JournalUnavailable, RecordRefused, StoreUnavailable, Unavailable
from headwater.journal import Alone, Entry, Journal, Key
from headwater.records import Record
from headwater.service import Service
from headwater.store import Store
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Records of one transaction at most.
BATCH: Final = 500
#: Failures of a record all by itself before it is asked whether others pass.
ALONE: Final = 3
#: Chats of which a record is tried for it.
WITNESSES: Final = 5
#: Periodic syncs that try a record again which was set aside: a day of them. By hand it can be tried at any time.
AGAIN: Final = 288
#: Tries of such a record that do not wait for a periodic sync but come PERIOD apart: it may have met a lock only.
EARLY: Final = 10
#: Seconds between two looks when nobody calls; another process may have died with its records unsynced.
PERIOD: Final = 30.0
#: Ended runs whose rows are kept in memory while they can be kept nowhere else.
OWED: Final = 1_000
#: Seconds before the first try while PostgreSQL is away; doubles up to MAX_BACKOFF.
FIRST_BACKOFF: Final = 0.5
MAX_BACKOFF: Final = 10.0


class Syncer(Service):
    """Saves records: the journal first, then PostgreSQL as soon as it answers."""

    def __init__(self, journal: Journal, store: Store, *, telemetry: Telemetry, clock: Clock) -> None:
        super().__init__()
        self._journal = journal
        self._store = store
        self._telemetry = telemetry
        self._clock = clock
        #: PostgreSQL did not answer last time; callers skip waiting.
        self.away = False
        self._wake = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._batch = BATCH
        #: The position of the record that failed by itself last, and how often.
        self._failed = (0, 0)
        self._applied = 0
        #: What neither journal nor PostgreSQL could take. Bounded: its log has it as well.
        self._owed: deque[Sequence[Record]] = deque(maxlen=OWED)
        #: Who waits, by the last position of what they saved.
        self._waiting: dict[asyncio.Future[None], int] = {}

    async def save(
        self,
        records: Sequence[Record],
        *,
        wait: float = 1.0,
        key: Key | None = None,
        alone: Alone | None = None,
        cancels: Sequence[str] = (),
    ) -> Key | None:
        """Make records durable, then wait at most `wait` seconds until PostgreSQL has them.

        The wish to cancel the runs `cancels` becomes durable in the same step. With `wait` 0, or while
        PostgreSQL is away, it does not wait at all. Returns the earlier Key if `key` was used before;
        then nothing was saved. Raises JournalUnavailable and RecordRefused, and ChatBusy when a run has
        begun since `alone` was looked at; never StoreUnavailable, for what is in the journal will arrive.

        Inside a turn of the same chat, call it with `wait` 0: the turn's lock holds off the syncer.
        """
        added = await self._journal.add(records, key, alone, cancels)
        if not added.positions:
            return added.earlier
        self._telemetry.step("save.journalled")
        self._wake.set()
        if wait > 0 and not self.away and self.started.is_set():
            await self._stored(added.positions[-1], wait)
        return None

    async def keep(self, records: Sequence[Record], *, wait: float = 1.0) -> None:
        """`save` for what has happened already, such as an answer that was given: it must be kept somewhere.

        When the journal has no room, PostgreSQL gets it at once. Raises StoreUnavailable when it is away too; then
        it is tried again for as long as this process runs.
        """
        try:
            await self.save(records, wait=wait)
        except JournalUnavailable as error:
            logger.warning("PostgreSQL gets %d records past the journal: %s", len(records), error)
            try:
                await self._store.apply(records)
            except StoreUnavailable:
                self._owed.append(records)
                self._wake.set()
                raise

    async def sync(self, *, again: bool = False) -> int:
        """Apply everything that waits now, with `again` also what was set aside; the number applied.

        Raises StoreUnavailable when PostgreSQL is away; what was applied until then stays applied.
        """
        return await self._sync(AGAIN if again else 0)

    async def _sync(self, tries: int) -> int:
        """`sync`, with what was set aside fewer than `tries` times."""
        async with self._one_at_a_time:
            before = self._applied
            try:
                if tries:
                    await self._journal.put_back(tries)
                while entries := await self._next():
                    await self._step(entries)
            except StoreUnavailable as error:
                self._gone(error)
                raise
            finally:
                await self._measure()
            self._back()
            return self._applied - before

    async def run(self) -> None:
        backoff, looked_at = FIRST_BACKOFF, self._clock.monotonic()
        while True:
            self._wake.clear()
            before, now = self._applied, self._clock.monotonic()
            early = now - looked_at >= PERIOD
            looked_at = now if early else looked_at
            try:
                await self._repay()
                await self._sync(EARLY if early else 0)
            except Unavailable as error:
                if self._applied > before:
                    # It is slow, not away: go on soon with the smaller batch.
                    backoff = FIRST_BACKOFF
                logger.debug("next try in about %.1f s: %s", backoff, error)
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                # What is owed is in this process only, and a disk may have room again at any moment.
                backoff = FIRST_BACKOFF if self._owed else min(backoff * 2, MAX_BACKOFF)
                continue
            backoff = FIRST_BACKOFF
            try:
                async with asyncio.timeout(PERIOD):
                    await self._wake.wait()
            except TimeoutError:
                logger.debug("a look after %.0f s without a call", PERIOD)

    async def close(self) -> None:
        self._release()

    async def _repay(self) -> None:
        """Keep what could be kept nowhere. Raises StoreUnavailable when it still cannot."""
        while self._owed:
            records = self._owed[0]
            try:
                await self._journal.add(records)
            except JournalUnavailable:
                try:
                    await self._store.apply(records)
                except RecordRefused as error:
                    logger.warning("%d records are left out: %s", len(records), error)
            # One too many may have pushed it out meanwhile.
            if self._owed[0] is records:
                self._owed.popleft()

    async def _next(self) -> list[Entry]:
        # Noted before the look: whoever waits now is answered by a look that finds nothing.
        waiting = list(self._waiting)
        entries = await self._journal.unsynced(self._batch)
        if not entries:
            for future in waiting:
                _resolve(future)
        # What was set aside before goes by itself, so that it costs nobody else a try.
        suspect = next((number for number, entry in enumerate(entries) if entry.tries), len(entries))
        return entries[: max(1, suspect)]

    async def _step(self, entries: Sequence[Entry]) -> None:
        """Apply a batch. Should PostgreSQL not answer to it but answer otherwise, the next one is half of it."""
        try:
            await self._apply(entries)
        except StoreUnavailable as error:
            self._gone(error)
            if len(entries) == 1:
                await self._isolate(entries[0], error)
            else:
                self._batch = max(1, len(entries) // 2)
                await self._store.ping()
        else:
            # A batch that was too much for the time limit was halved; feel the way back.
            self._batch = min(BATCH, self._batch * 2)

    async def _isolate(self, entry: Entry, error: StoreUnavailable) -> None:
        """Set a record aside that fails by itself while others pass; else raise what it failed with."""
        position, times = self._failed
        times = times + 1 if position == entry.position else 1
        self._failed = (entry.position, times)
        if entry.tries:
            # It was found out before.
            await self._store.ping()
        elif times < ALONE or not await self._others_pass(entry):
            raise error
        else:
            # What held it up, such as a lock, may be gone, so that the others passed.
            try:
                await self._apply([entry])
            except StoreUnavailable as again:
                error = again
            else:
                return
        await self._set_aside(entry, f"PostgreSQL answers, but not to this: {error}")

    async def _others_pass(self, entry: Entry) -> bool:
        """Whether PostgreSQL takes any record of this kind behind this one. Another kind goes to another table."""
        behind = [other for other in await self._journal.unsynced(BATCH) if other.position != entry.position]
        kind, chats = entry.record.kind, dict[str, list[Entry]]()
        for other in behind:
            # With what comes before it in its chat, whose records are applied in order.
            before = chats.setdefault(_place(other), [])
            if not before or before[-1].record.kind is not kind:
                before.append(other)
        own = chats.pop(_place(entry), [])
        witnesses = [entries for entries in (*chats.values(), own) if entries and entries[-1].record.kind is kind]
        for entries in witnesses[:WITNESSES]:
            try:
                await self._apply(entries)
            except StoreUnavailable as error:
                logger.debug("record %d does not pass either: %s", entries[-1].position, error)
            else:
                return True
        return False

    async def _apply(self, entries: Sequence[Entry]) -> None:
        """Apply a batch; should PostgreSQL refuse it, find the record it means by halving, and set that one aside."""
        try:
            await self._store.apply([entry.record for entry in entries])
        except RecordRefused as error:
            if len(entries) == 1:
                await self._set_aside(entries[0], str(error))
            else:
                middle = len(entries) // 2
                await self._apply(entries[:middle])
                await self._apply(entries[middle:])
        else:
            await self._mark(entries)

    async def _mark(self, entries: Sequence[Entry]) -> None:
        self._telemetry.step("sync.applied")
        # Answered before the mark is on the disk: without it the records are applied once more, which changes nothing.
        self._release(entries[-1].position)
        await self._journal.mark_synced([entry.position for entry in entries])
        self._telemetry.step("sync.marked")
        self._applied += len(entries)
        self._telemetry.count("headwater_synced_total", len(entries))

    async def _set_aside(self, entry: Entry, reason: str) -> None:
        record = entry.record
        # An error once; that it still does not pass is no news.
        level = logging.DEBUG if entry.tries else logging.ERROR
        logger.log(level, "The %s %s is set aside, see `headwater journal status`: %s", record.kind, record.id, reason)
        await self._journal.set_aside(entry.position, reason)
        self._release(entry.position)

    async def _stored(self, position: int, wait: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = position
        try:
            async with asyncio.timeout(wait):
                await future
        except TimeoutError:
            logger.debug("PostgreSQL has not got record %d within %.1f s; it will", position, wait)
        finally:
            del self._waiting[future]

    def _release(self, position: int | None = None) -> None:
        """Answer those who wait for records up to `position`; all, without one."""
        for future, wanted in self._waiting.items():
            if position is None or wanted <= position:
                _resolve(future)

    def _gone(self, error: StoreUnavailable) -> None:
        if not self.away:
            logger.warning("PostgreSQL is away; the journal keeps what comes: %s", error)
        self.away = True
        self._release()

    def _back(self) -> None:
        if self.away:
            logger.warning("PostgreSQL is back and has everything")
        self.away = False

    async def _measure(self) -> None:
        try:
            backlog = await self._journal.backlog()
        except JournalUnavailable as error:
            logger.warning("the backlog cannot be measured: %s", error)
            return
        self._telemetry.gauge("headwater_journal_backlog", backlog.count)
        self._telemetry.gauge("headwater_journal_backlog_age_seconds", (backlog.oldest_ms or 0) / 1000)
        self._telemetry.gauge("headwater_journal_poison", backlog.poison)


def _place(entry: Entry) -> str:
    """What the order of records is kept within."""
    return entry.record.chat_id or entry.record.id


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
