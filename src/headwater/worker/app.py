"""The Celery app of a worker, with its tasks and its signals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from celery import Celery
from celery.bin.celery import celery as command

from headwater.queue import make_celery
from headwater.settings import Settings, load_settings
from headwater.worker import hooks, tasks
from headwater.worker.runtime import Runtimes


def create_app(settings: Settings) -> Celery:
    """A Celery app that can execute runs. One per process: Celery's signals belong to the process."""
    app = make_celery(settings)
    app.conf.worker_consumer = "headwater.worker.consumer:LastingConsumer"
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
    app = create_app(settings)
    # What Celery.start does, except that it forgets the exit code: a worker that fell would look like one that ended.
    command.params[0].default = app
    sys.exit(command.main(args=[*arguments, *extra_args], standalone_mode=False))
