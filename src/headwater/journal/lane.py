"""A thread with a connection of its own, awaitable from asyncio.

The writer's lane commits in groups: whatever was queued while the disk was busy with the last
commit shares the next one. So one commit's cost is paid by all who wait at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, TypeVar

import apsw

from headwater.errors import JournalUnavailable
from headwater.journal.file import JournalFile, explain, unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]

#: Jobs that share one commit at most, so that none waits for long.
GROUP: Final = 256


@dataclass(slots=True)
class _Job:
    work: Work[Any]
    future: asyncio.Future[Any]
    #: Outside a transaction and by itself.
    alone: bool
    result: Any = None
    error: Exception | None = None


class Lane:
    """Runs jobs one after the other in a thread; a `writer` runs them in transactions, grouped.

    `committed` is told the seconds of each commit, in the event loop.
    """

    def __init__(
        self, name: str, file: JournalFile, *, writer: bool, committed: Callable[[float], None] | None = None
    ) -> None:
        self._name = name
        self._file = file
        self._writer = writer
        self._committed = committed
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        #: Whether the newest jobs, or some of them, could not be done for a reason that is the file's.
        self.failed = False

    async def open(self) -> None:
        """Start the thread and its connection; harmless the second time. Raises JournalUnavailable."""
        if self._thread is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        self._thread.start()
        await self.submit(lambda connection: connection.pragma("schema_version"), alone=True)

    async def close(self) -> None:
        """Finish what is queued, then end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            await asyncio.to_thread(thread.join)

    async def submit(self, work: Work[T], *, alone: bool = False) -> T:
        """Run `work` in the thread. What it raises comes out here, SQLite's errors as ours."""
        return await self.post(work, alone=alone)

    def post(self, work: Work[T], *, alone: bool = False) -> asyncio.Future[T]:
        """`submit` without waiting; on the event loop. Raises JournalUnavailable when it is not open."""
        if self._thread is None or self._loop is None:
            raise unavailable("The journal is not open.", "journal_closed")
        if os.getpid() != self._pid:
            raise RuntimeError("The journal was opened before a fork: open it in the process that uses it.")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Job(work, future, alone or not self._writer))
        return future

    # --- in the thread ---------------------------------------------------------------------------

    def _main(self) -> None:
        connection: apsw.Connection | None = None
        closing = False
        while not closing:
            jobs, closing = self._take()
            for alone, group in groupby(jobs, key=lambda job: job.alone):
                connection = self._run(connection, list(group), alone)
        if connection is not None:
            connection.close()

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for a job, then take what else is there; whether the lane is closing."""
        jobs: list[_Job] = []
        job = self._queue.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == GROUP:
                return jobs, False
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return jobs, False
        return jobs, True

    def _run(self, connection: apsw.Connection | None, jobs: list[_Job], alone: bool) -> apsw.Connection | None:
        begun = time.monotonic()
        try:
            if connection is None:
                connection = self._file.connect()
            if alone:
                for job in jobs:
                    _attempt(connection, [job])
            else:
                self._file.check_in_place()
                _commit(connection, jobs)
        except Exception as error:
            logger.debug("%s failed", self._name, exc_info=True)
            for job in jobs:
                job.error = error
        if connection is not None and _spoilt(connection, jobs):
            connection.close()
            connection = None
        for job in jobs:
            if job.error is not None:
                job.error = explain(job.error, self._file.path)
        self._deliver(jobs, None if alone else time.monotonic() - begun)
        return connection

    def _deliver(self, jobs: Sequence[_Job], seconds: float | None) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._resolve, jobs, seconds)
        except RuntimeError:
            logger.warning("%s: the event loop ended before %d results reached it", self._name, len(jobs))

    # --- in the event loop -----------------------------------------------------------------------

    def _resolve(self, jobs: Sequence[_Job], seconds: float | None) -> None:
        if seconds is not None and self._committed is not None:
            self._committed(seconds)
        self.failed = any(isinstance(job.error, JournalUnavailable) for job in jobs)
        for job in jobs:
            if job.future.done():
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)


def _spoilt(connection: apsw.Connection, jobs: Sequence[_Job]) -> bool:
    """Whether the next job must open the file again: descriptors can go bad with the disk, and a rollback can fail."""
    return connection.in_transaction or any(isinstance(job.error, apsw.IOError | apsw.CantOpenError) for job in jobs)


def _commit(connection: apsw.Connection, jobs: Sequence[_Job]) -> None:
    """All jobs in one transaction; should that fail, each in its own, so that a bad one fails alone."""
    _attempt(connection, jobs, "BEGIN IMMEDIATE", "COMMIT")
    if len(jobs) > 1 and jobs[0].error is not None:
        for job in jobs:
            _attempt(connection, [job], "BEGIN IMMEDIATE", "COMMIT")


def _attempt(connection: apsw.Connection, jobs: Sequence[_Job], *frame: str) -> None:
    """Run the jobs between the statements of `frame`; after an error all of them have it and nothing is kept."""
    begin, end = frame or (None, None)
    error: Exception | None = None
    try:
        if begin:
            connection.execute(begin)
        for job in jobs:
            job.result = job.work(connection)
        if end:
            connection.execute(end)
    except Exception as caught:  # noqa: BLE001 - handed to whoever awaits the job
        error = caught
        # SQLite has rolled back already after some errors, such as a full disk.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    for job in jobs:
        job.error = error
