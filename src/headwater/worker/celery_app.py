"""The Celery app of a worker, with its tasks and its signals."""

from __future__ import annotations

from functools import cache
from typing import Any

from celery import Celery

from headwater.note import settings_of_running
from headwater.queue import make_celery
from headwater.settings import Settings
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
    # `celery -A` beside a running `headwater up` needs no settings, as our own commands do not.
    return create_app(settings_of_running())


def __getattr__(name: str) -> Any:
    if name == "app":
        return _app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
