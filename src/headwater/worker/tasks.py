"""The Celery tasks: coroutines on the process's event loop, whichever pool there is."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.exceptions import Reject

from headwater.queue import RUN_TASK, SYNC_TASK
from headwater.runs import Run
from headwater.worker.oneline import OneLine
from headwater.worker.pool import AsyncTask
from headwater.worker.runtime import RuntimeGone, Runtimes


class GivenBack(Reject):  # type: ignore[misc]  # Celery has no types
    """The message goes back into its queue: this process ends, or cannot begin, which its log tells by itself."""


def register(app: Celery, runtimes: Runtimes) -> None:
    """Give the app its tasks."""

    class OnTheLoop(AsyncTask):
        """The asyncio pool's tasks are on the loop already; those of a synchronous pool wait for it in their thread."""

        abstract = True

        def run_apart(self, work: Coroutine[Any, Any, Any]) -> Any:
            with _given_back():
                return runtimes.here().wait(work)

    async def run(run_json: dict[str, Any]) -> str | None:
        """Execute a run. Returns the state it ended in, None when it was not for us."""
        with _given_back():
            return await runtimes.here().execute(Run.from_json(run_json))

    async def sync() -> int:
        """Bring the journal to PostgreSQL and forget what has long been there."""
        with _given_back():
            return await runtimes.here().sync()

    logging.getLogger("celery.app.trace").addFilter(OneLine((GivenBack,)))
    # Not shared: Celery would give them, bound to these runtimes, to every other app of the process too.
    options: dict[str, Any] = {"base": OnTheLoop, "shared": False}
    app.task(run, name=RUN_TASK, Request="headwater.worker.request:DiscreetRequest", **options)
    app.task(sync, name=SYNC_TASK, **options)


@contextmanager
def _given_back() -> Iterator[None]:
    try:
        yield
    except RuntimeGone as error:
        # Another process of the pool, or another worker, can still do it.
        raise GivenBack(str(error), requeue=True) from error
