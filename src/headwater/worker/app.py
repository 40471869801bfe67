"""The Celery app of a worker, with its tasks and its signals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from celery import Celery

from headwater.queue import make_celery
from headwater.settings import Settings, load_settings
from headwater.worker import hooks, tasks
from headwater.worker.runtime import Runtimes


def create_app(settings: Settings) -> Celery:
    """A Celery app that can execute runs. One per process: Celery's signals belong to the process."""
    app = make_celery(settings)
    runtimes = Runtimes(settings, app)
    tasks.register(app, runtimes)
    hooks.connect(settings, runtimes)
    app.set_current()
    return app


@cache
def _app() -> Celery:
    return create_app(load_settings())


def __getattr__(name: str) -> Any:
    if name == "app":
        return _app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(
    settings: Settings,
    pool: str | None = None,
    concurrency: int | None = None,
    queues: Sequence[str] = (),
    extra_args: Sequence[str] = (),
) -> None:
    """Run a worker in this process until it is stopped. Does not return: exits with Celery's exit code."""
    arguments = [
        "worker",
        f"--pool={pool or settings.worker_pool}",
        f"--concurrency={concurrency or settings.worker_concurrency}",
        f"--loglevel={'DEBUG' if settings.debug else 'INFO'}",
    ]
    if queues:
        arguments.append(f"--queues={','.join(queues)}")
    sys.exit(create_app(settings).start([*arguments, *extra_args]))
