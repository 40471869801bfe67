"""The worker's Celery app as other programs find it, and what it shows of its tasks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.utils.imports import symbol_by_name

from headwater.dev.services import free_port
from headwater.queue import RUN_TASK, make_celery
from headwater.settings import Settings, child_environment
from headwater.worker import tasks
from headwater.worker.hooks import EXIT_CONFIG, Hooks
from headwater.worker.runtime import Runtimes
from support.runs import new_run

URL = "redis://127.0.0.1:1/0"


@pytest.mark.parametrize(
    "before",
    [
        "import headwater.worker.celery_app",
        "import headwater.cli.run; from headwater.worker.celery_app import create_app",
        "from headwater.worker import app",
    ],
)
def test_the_package_gives_the_celery_app_whatever_was_imported_before(before: str, tmp_path: Path) -> None:
    script = (
        f"{before}\n"
        "from celery.app.utils import find_app\n"
        "from headwater.worker import app\n"
        "print(app.AsyncResult('0190').id, type(app).__name__, find_app('headwater.worker') is app)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment(REDIS_URL=URL, DATABASE_URL=None, HEADWATER_DATA_DIR=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.stdout.split(), ended.stderr) == (["0190", "Celery", "True"], "")


@pytest.fixture
def celery() -> Celery:
    settings = Settings(redis_url=URL)
    app = make_celery(settings)
    tasks.register(app, Runtimes(settings, app))
    return app


class Message:
    """A message as the broker delivers it."""

    def __init__(self, headers: dict[str, Any], body: tuple[Any, ...]) -> None:
        self.headers, self.payload, self.body = headers, body, body
        self.properties: dict[str, Any] = {}
        self.delivery_info: dict[str, Any] = {}
        self.content_type, self.content_encoding = "application/json", "utf-8"
        self.decoded = True


@pytest.mark.parametrize("safe", [False, True])
def test_a_request_shows_the_description_and_never_the_conversation(celery: Celery, safe: bool) -> None:
    run = new_run(input={"messages": [{"role": "user", "content": "a secret"}]})
    task = celery.tasks[RUN_TASK]
    message = celery.amqp.as_task_v2(run.id, RUN_TASK, [run.to_json()], {}, argsrepr="<a run>", kwargsrepr="{}")
    request = symbol_by_name(task.Request)(Message(message.headers, message.body), app=celery, task=task, decoded=True)
    shown = request.info(safe=safe)
    assert (shown["id"], shown["args"], shown["kwargs"]) == (run.id, "<a run>", "{}")
    assert "a secret" not in repr(shown)
    # The task itself still gets them.
    assert request.args == [run.to_json()]


def test_a_metrics_port_that_others_could_reach_needs_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"redis_url": URL, "database_url": "postgresql://127.0.0.1:1/none", "host": "0.0.0.0"}
    settings = Settings(**given, worker_metrics_port=free_port())
    with pytest.raises(SystemExit) as ended:
        Hooks(settings, Runtimes(settings, make_celery(settings))).worker_init()
    assert ended.value.code == EXIT_CONFIG
    assert "HEADWATER_ACCESS_TOKEN" in capsys.readouterr().err
