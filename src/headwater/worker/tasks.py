"""The Celery tasks: each hands its work to the process's event loop and waits for it."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.exceptions import Reject

from headwater.queue import RUN_TASK, SYNC_TASK
from headwater.runs import Run
from headwater.worker.runtime import RuntimeGone, Runtimes


def register(app: Celery, runtimes: Runtimes) -> None:
    """Give the app its tasks."""

    def run(run_json: dict[str, Any]) -> str | None:
        """Execute a run. Returns the state it ended in, None when it was not for us."""
        try:
            return runtimes.here().execute(Run.from_json(run_json))
        except RuntimeGone as error:
            # Another process of the pool, or another worker, can still do it.
            raise Reject(str(error), requeue=True) from error

    def sync() -> int:
        """Bring the journal to PostgreSQL and forget what has long been there."""
        return runtimes.here().sync()

    # Not shared: Celery would give them, bound to these runtimes, to every other app of the process too.
    app.task(run, name=RUN_TASK, shared=False, Request="headwater.worker.request:DiscreetRequest")
    app.task(sync, name=SYNC_TASK, shared=False)
