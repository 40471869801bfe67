"""What happens when Celery's processes start and stop.

    pool       the event loop is              in                         it is told to hand over by
    asyncio    the pool's                     the worker's own process   the signal handler of that process
    threads    ours, in a thread beside it    the worker's own process   the same
    solo       ours, in a thread beside it    the worker's own process   the same
    prefork    ours, in a thread beside it    every child                a pipe from the parent, closed

A child of the prefork pool never hears of a warm shutdown: Celery waits for its task. So the parent
holds the only writing end of a pipe, and a child that reads its end, because the parent closed it or
died, hands its runs over.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from celery import signals

from headwater.errors import SettingsError
from headwater.settings import Settings
from headwater.threads import take_turns
from headwater.worker import collector
from headwater.worker.runtime import Runtimes

logger = logging.getLogger(__name__)

#: EX_CONFIG of sysexits.h: the configuration cannot work.
EXIT_CONFIG = 78


class _Pipe:
    """Parent to children: end of file says that the worker goes down."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        self._owner = os.getpid()

    @property
    def ours(self) -> bool:
        return self._owner == os.getpid()

    def close_writer(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1


class Hooks:
    """Celery's signals, bound to the runtimes of a worker."""

    def __init__(self, settings: Settings, runtimes: Runtimes) -> None:
        self._settings = settings
        self._runtimes = runtimes
        self._pipe: _Pipe | None = None

    def worker_init(self, **_: Any) -> None:
        """Before the pool exists: what cannot work must say so now, not in every task."""
        try:
            self._settings.need_redis()
            self._settings.need_database()
            if self._settings.worker_metrics_port:
                self._settings.check_exposed()
        except SettingsError as error:
            sys.stderr.write(f"{error}\n")
            raise SystemExit(EXIT_CONFIG) from None
        self._pipe = _Pipe()

    def worker_process_init(self, **_: Any) -> None:
        """In a child of the prefork pool, in the solo pool's only process, on the asyncio pool's loop."""
        collector.relieve()
        take_turns()
        self._runtimes.here()
        if self._pipe is not None and not self._pipe.ours:
            # Every child inherits the writing end as well; the parent's must be the only one.
            self._pipe.close_writer()
            self._runtimes.here().drain_at_end_of(self._pipe.reader)

    def worker_ready(self, sender: Any, **_: Any) -> None:
        """The threads pool has no children: the loop starts here, so that it sweeps before its first task."""
        pool = type(sender.pool).__module__
        if pool == "celery.concurrency.thread":
            collector.relieve()
            take_turns()
            self._runtimes.here()
        elif pool == "celery.concurrency.prefork" and self._settings.worker_metrics_port:
            logger.warning(
                "HEADWATER_WORKER_METRICS_PORT is left out: every process of the prefork pool counts for itself. "
                "Use the asyncio pool for metrics"
            )

    def worker_shutting_down(self, **_: Any) -> None:
        """Inside a signal handler: say it and return."""
        self._runtimes.drain()
        if self._pipe is not None and self._pipe.ours:
            self._pipe.close_writer()

    def process_shutdown(self, **_: Any) -> None:
        self._runtimes.stop()


def connect(settings: Settings, runtimes: Runtimes) -> None:
    """Bind Celery's signals, which are the process's, to these runtimes."""
    hooks = Hooks(settings, runtimes)
    signals.worker_init.connect(hooks.worker_init, weak=False)
    signals.worker_process_init.connect(hooks.worker_process_init, weak=False)
    signals.worker_ready.connect(hooks.worker_ready, weak=False)
    signals.worker_shutting_down.connect(hooks.worker_shutting_down, weak=False)
    signals.worker_process_shutdown.connect(hooks.process_shutdown, weak=False)
    signals.worker_shutdown.connect(hooks.process_shutdown, weak=False)
