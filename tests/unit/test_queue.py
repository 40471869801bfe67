"""The queue's settings, and the dispatcher over a Celery app that a test holds in its hand."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from headwater.errors import SettingsError
from headwater.queue import RUN_TASK, SYNC_TASK, Dispatcher, level_of, make_celery, order_of, queue_of
from headwater.runs import Priority
from headwater.service import running
from headwater.settings import Settings
from headwater.telemetry import Telemetry
from support.runs import new_run
from support.wait import eventually

URL = "redis://:secret@127.0.0.1:1/3"


@pytest.fixture
def app() -> Celery:
    return make_celery(Settings(redis_url=URL, run_deadline=7200))


def test_a_message_outlives_the_death_of_its_worker(app: Celery) -> None:
    assert app.conf.task_acks_late
    assert app.conf.task_reject_on_worker_lost
    assert app.conf.worker_prefetch_multiplier == 1


def test_nothing_but_json_is_accepted(app: Celery) -> None:
    assert app.conf.accept_content == ["json"]
    assert (app.conf.task_serializer, app.conf.result_serializer) == ("json", "json")


def test_a_message_is_not_delivered_again_while_its_run_may_last(app: Celery) -> None:
    assert app.conf.broker_transport_options["visibility_timeout"] == 7500


def test_nothing_waits_for_a_frozen_redis_for_ever(app: Celery) -> None:
    options = app.conf.broker_transport_options
    assert options["socket_timeout"] > 0
    assert options["socket_connect_timeout"] > 0
    assert app.conf.broker_pool_acquire_timeout > 0
    assert app.conf.broker_connection_max_retries is None


def test_runs_and_housekeeping_have_queues_of_their_own(app: Celery) -> None:
    queues = app.amqp.queues
    assert set(queues) == {"chat", "jobs", "maintenance"}
    assert {(name, queue.exchange.name, queue.routing_key) for name, queue in queues.items()} == {
        (name, name, name) for name in queues
    }
    assert queue_of(new_run("chat")) == "chat"
    assert queue_of(new_run("shorts")) == "jobs"
    assert app.amqp.router.route({}, SYNC_TASK)["queue"].name == "maintenance"


def test_a_process_that_hangs_is_killed_after_the_runs_deadline_and_before_its_message_comes_again(app: Celery) -> None:
    visibility = app.conf.broker_transport_options["visibility_timeout"]
    assert 7200 + 60 < app.conf.task_time_limit < visibility
    # It would free the process's place in the pool, and the kill would never come.
    assert app.conf.task_soft_time_limit is None


def test_a_number_of_runs_that_was_set_holds_for_celerys_own_command_too() -> None:
    def conf(**settings: Any) -> Any:
        return make_celery(Settings(redis_url=URL, **settings)).conf

    assert conf(worker_concurrency=7).worker_concurrency == 7
    # The default of ours belongs to the asyncio pool; Celery's own pool would start 1000 processes.
    assert conf().worker_concurrency is None
    assert conf(worker_pool="threads").worker_pool == "prefork"


def test_beat_syncs_and_leaves_no_stale_orders_behind(app: Celery) -> None:
    schedule = app.conf.beat_schedule
    assert {entry["task"] for entry in schedule.values()} == {SYNC_TASK}
    assert all(entry["options"]["expires"] <= entry["schedule"] for entry in schedule.values())


def test_the_result_backend_is_found_and_hides_the_password(app: Celery) -> None:
    from headwater.worker.results import RunBackend

    assert isinstance(app.backend, RunBackend)
    assert app.backend.url == URL
    assert "secret" not in app.backend.as_uri()


def test_without_redis_it_says_what_to_set() -> None:
    with pytest.raises(SettingsError, match="REDIS_URL"):
        make_celery(Settings(redis_url=None))


class HeldCelery:
    """A Celery app whose sending can fail or hang."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.errors: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()
        self.trying = threading.Event()

    def send_task(self, name: str, **options: Any) -> None:
        self.trying.set()
        self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.sent.append({"name": name, **options})

    @property
    def ids(self) -> list[str]:
        return [each["task_id"] for each in self.sent]


class Post:
    def __init__(self, limit: int = 100) -> None:
        self.celery = HeldCelery()
        self.telemetry = Telemetry()
        self.counts: list[str] = []
        self.telemetry.listen(lambda name, value, labels: self.counts.append(name))
        self.dispatcher = Dispatcher(self.celery, telemetry=self.telemetry, limit=limit)


async def test_a_run_is_sent_under_its_own_id_with_its_input() -> None:
    post, run = Post(), new_run("chat")
    async with running(post.dispatcher):
        post.dispatcher.enqueue(run)
        await eventually(lambda: post.celery.sent)
    (sent,) = post.celery.sent
    assert (sent["name"], sent["task_id"], sent["queue"]) == (RUN_TASK, run.id, "chat")
    assert sent["args"] == [run.to_json()]
    assert (sent["argsrepr"], sent["kwargsrepr"]) == (f"<run {run.id}, chat>", "{}")


async def test_what_fails_is_sent_again_in_order() -> None:
    post, runs = Post(), [new_run() for _ in range(5)]
    post.celery.errors = [OperationalError("away"), ConnectionResetError("gone")]
    async with running(post.dispatcher):
        for run in runs:
            post.dispatcher.enqueue(run)
        await eventually(lambda: len(post.celery.sent) == 5)
    assert post.celery.ids == [run.id for run in runs]
    assert post.counts.count("headwater_enqueue_failed_total") == 2


async def test_a_run_that_can_never_be_sent_does_not_hold_up_the_next() -> None:
    post, bad, good = Post(), new_run(), new_run()
    post.celery.errors = [TypeError("not JSON")]
    async with running(post.dispatcher):
        post.dispatcher.enqueue(bad)
        post.dispatcher.enqueue(good)
        await eventually(lambda: post.celery.sent)
    assert post.celery.ids == [good.id]


async def test_over_the_limit_the_oldest_is_left_to_the_sweeper() -> None:
    post, runs = Post(limit=2), [new_run() for _ in range(4)]
    post.celery.gate.clear()
    async with running(post.dispatcher):
        post.dispatcher.enqueue(runs[0])
        await asyncio.to_thread(post.celery.trying.wait)
        for run in runs[1:]:
            post.dispatcher.enqueue(run)
        post.celery.gate.set()
        await eventually(lambda: len(post.celery.sent) == 3)
    assert post.celery.ids == [runs[0].id, runs[2].id, runs[3].id]


async def test_what_waits_is_sent_before_it_stops() -> None:
    post, runs = Post(), [new_run() for _ in range(3)]
    async with running(post.dispatcher):
        for run in runs:
            post.dispatcher.enqueue(run)
    assert post.celery.ids == [run.id for run in runs]


async def test_a_send_that_hangs_does_not_keep_it_from_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.queue.STOP_GRACE", 0.05)
    post = Post()
    post.celery.gate.clear()
    async with running(post.dispatcher):
        post.dispatcher.enqueue(new_run())
        await asyncio.to_thread(post.celery.trying.wait)
    assert post.celery.sent == []
    post.celery.gate.set()
    await eventually(lambda: post.celery.sent)


async def test_what_is_closed_under_a_send_that_hangs_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headwater.queue.STOP_GRACE", 0.05)
    post, run = Post(), new_run()
    post.celery.gate.clear()
    async with running(post.dispatcher):
        post.dispatcher.enqueue(run)
        await asyncio.to_thread(post.celery.trying.wait)
    post.celery.errors = [TypeError("argument must be an int, or have a fileno() method.")]
    post.celery.gate.set()
    said = await eventually(lambda: caplog.records)
    assert [(record.levelname, record.exc_info) for record in said] == [("WARNING", None)]
    assert run.id in said[0].getMessage()


async def test_it_can_be_started_again() -> None:
    post = Post()
    for _ in range(2):
        post.celery.sent.clear()
        async with running(post.dispatcher):
            post.dispatcher.enqueue(new_run())
            await eventually(lambda: post.celery.sent)


def test_a_broker_on_a_unix_socket_has_kombus_spelling() -> None:
    conf = make_celery(Settings(redis_url="unix:///run/redis.sock?db=3")).conf
    assert conf.broker_url == "redis+socket:///run/redis.sock?virtual_host=3"


def test_urgent_goes_before_background_and_an_owners_first_before_the_further_ones_of_others(app: Celery) -> None:
    order = [
        level_of(new_run(priority=priority), ahead)
        for priority in (Priority.URGENT, Priority.NORMAL, Priority.BACKGROUND)
        for ahead in (0, 7)
    ]
    steps = app.conf.broker_transport_options["priority_steps"]
    assert order == sorted(set(order)) == steps, "kombu takes the lowest first"
    assert app.conf.broker_transport_options["queue_order_strategy"] == "priority"


def test_of_an_owners_runs_the_urgent_have_the_next_turn_and_then_the_older() -> None:
    background = new_run(priority=Priority.BACKGROUND, created_at=1)
    old, young = new_run(created_at=2), new_run(created_at=3)
    urgent = new_run(priority=Priority.URGENT, created_at=4)
    assert sorted([young, background, urgent, old], key=order_of) == [urgent, old, young, background]
