"""The queue: Celery as the doorbell. It wakes a worker; what is true about a run stands in its log and its row.

A message may get lost or come twice: the sweeper rings again for a run that nobody claims, and the
claim lets only one worker in.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import LimitExceeded, OperationalError

from headwater.errors import LogUnavailable, reason
from headwater.runs import Priority, Run
from headwater.service import Service
from headwater.settings import Settings
from headwater.streams.places import Places, refused_for_good
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Celery's names of the tasks. The task's id is the run's id.
RUN_TASK: Final = "headwater.run"
SYNC_TASK: Final = "headwater.sync"

#: Answers people wait for, long jobs, and housekeeping: three queues, so that each can have workers of its own.
CHAT_QUEUE: Final = "chat"
JOBS_QUEUE: Final = "jobs"
MAINTENANCE_QUEUE: Final = "maintenance"
QUEUES: Final = (CHAT_QUEUE, JOBS_QUEUE, MAINTENANCE_QUEUE)

#: Seconds between two of the periodic task.
SYNC_EVERY: Final = 300.0
#: Seconds a task may take over a run's own deadline: its parts start, its end is written while Redis blinks.
TASK_MARGIN: Final = 120.0

#: Messages of one owner in the broker at once, per queue and priority. What is more waits for one of them to be taken.
BELLS: Final = 16
#: Seconds after which a message that no worker took is counted no more.
BELL_SECONDS: Final = 300.0
#: Lists of one queue in Redis, by Celery's priority; the lower goes first. Two per priority of a run: the first message
#: of an owner goes before the further ones of others.
LEVELS: Final = 2 * len(Priority)

#: Runs that wait to be handed over while Redis is away. Over it the oldest is left to the sweeper.
MAX_WAITING: Final = 10_000
#: Seconds between tries: first and longest.
FIRST_BACKOFF: Final = 0.1
LAST_BACKOFF: Final = 2.0
#: Seconds `stop` waits for what is still to be handed over.
STOP_GRACE: Final = 1.5


class Enqueue(Protocol):
    """Hands a run to the queue. Returns at once, never blocks, never raises."""

    def __call__(self, run: Run) -> None: ...


def _broker_url(url: str) -> str:
    """Kombu's spelling of the same server: a unix socket has a scheme and a parameter of its own there."""
    if not url.startswith("unix://"):
        return url
    return "redis+socket://" + url.removeprefix("unix://").replace("?db=", "?virtual_host=")


def make_celery(settings: Settings) -> Celery:
    """The Celery app without its tasks: enough to send and to ask. Raises SettingsError without REDIS_URL."""
    url = settings.need_redis()
    app = Celery("headwater", set_as_current=False)
    app.conf.update(
        broker_url=_broker_url(url),
        # Tells `AsyncResult(run_id).state` from the run's own metadata; stores nothing.
        result_backend=f"headwater.worker.results:RunBackend+{url}",
        task_serializer="json",
        accept_content=["json"],
        result_serializer="json",
        timezone="UTC",
        enable_utc=True,
        **_delivery(settings),
        **_routes(),
        **_worker(settings),
    )
    return app


def _delivery(settings: Settings) -> dict[str, Any]:
    return {
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_ignore_result": True,
        # The run ends itself at its deadline. This is for one that hangs: the prefork pool kills its process, the
        # asyncio pool cancels it, and the run goes on elsewhere. No soft limit: it would take the task off the clock
        # and leave the process that hangs in the pool. The threads and solo pools cannot be limited.
        "task_time_limit": settings.run_deadline + TASK_MARGIN,
        # The dispatcher repeats; inside it a retry would only block longer.
        "task_publish_retry": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A Redis that is full or still loading answers with an error; without this the worker ends over it.
        "broker_channel_error_retry": True,
        "broker_connection_timeout": 3,
        "broker_pool_acquire_timeout": 5,
        "broker_transport_options": {
            # Workers look into the lists by level, and within a level in the order of the queues. By default the queues
            # would take turns, and a question would wait for a job.
            "priority_steps": list(range(LEVELS)),
            "queue_order_strategy": "priority",
            # A message comes again after this long. Harmless, as the claim refuses it, but pointless.
            "visibility_timeout": max(3600, round(settings.run_deadline) + 300),
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            # Longer than the broker's own blocking read of 1 s; without one a frozen Redis blocks for ever.
            "socket_timeout": 10,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    }


def _routes() -> dict[str, Any]:
    return {
        "task_queues": [_queue(name) for name in QUEUES],
        "task_default_queue": JOBS_QUEUE,
        "task_routes": {SYNC_TASK: {"queue": MAINTENANCE_QUEUE}},
        # In memory: one interval needs no file.
        "beat_scheduler": "celery.beat:Scheduler",
        "beat_schedule": {
            "sync": {"task": SYNC_TASK, "schedule": SYNC_EVERY, "options": {"expires": SYNC_EVERY}},
        },
    }


def _queue(name: str) -> Queue:
    # Named in full: by default all would share the exchange and the key of the default queue.
    return Queue(name, Exchange(name, type="direct"), routing_key=name)  # type: ignore[no-untyped-call]


def _worker(settings: Settings) -> dict[str, Any]:
    # Not the pool: Celery would take it over a `-P prefork` on its command line. Not the default number either, which
    # belongs to the pool.
    chosen = {} if settings.worker_concurrency is None else {"worker_concurrency": settings.worker_concurrency}
    return chosen | {
        "worker_prefetch_multiplier": 1,
        # An answer goes on through a blink of Redis; the fence keeps it to one writer.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # Handlers that are there already stay: `headwater worker` sets its own.
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        # Off by default, as nobody may listen; `-E` or Flower's button turn them on.
        "worker_send_task_events": False,
    }


def run_command(app: Celery, arguments: Sequence[str]) -> int:
    """Run one of Celery's own commands to its end. Returns its exit code, which `Celery.start` forgets."""
    from celery.bin.celery import celery as command

    command.params[0].default = app
    code: int | None = command.main(args=list(arguments), standalone_mode=False)
    return code or 0


def queue_of(run: Run) -> str:
    """The queue for a run's kind."""
    return CHAT_QUEUE if run.kind == "chat" else JOBS_QUEUE


def order_of(run: Run) -> float:
    """Sorts the runs of an owner: by priority, then by age."""
    return _rank(run) * 1e14 + run.created_at


def level_of(run: Run, ahead: int) -> int:
    """Celery's priority for a run of an owner who has so many messages in the queue already; 0 goes first."""
    return 2 * _rank(run) + (1 if ahead else 0)


def lists_of(*queues: str) -> list[str]:
    """The names of these queues' lists in Redis, as kombu makes them."""
    return [f"{queue}\x06\x16{level}" if level else queue for queue in queues for level in range(LEVELS)]


def _rank(run: Run) -> int:
    return list(Priority).index(run.priority)


def _bells(run: Run) -> str:
    # Per priority: what is urgent must not wait until something of the owner's background was taken.
    return f"bells:{queue_of(run)}:{run.priority}"


class Dispatcher(Service):
    """Hands runs to Celery in a thread of its own, as sending blocks: 2 ms as a rule, for ever on a frozen Redis.

    What cannot be handed over is tried again, in order, while Redis is away. What is lost here (too
    many, or the process ends) the sweeper finds.

    With `places` each owner has at most BELLS messages in the broker at once, and `answered` lets the
    next in.
    """

    def __init__(
        self, celery: Celery, *, telemetry: Telemetry, places: Places | None = None, limit: int = MAX_WAITING
    ) -> None:
        super().__init__()
        self._celery = celery
        self._telemetry = telemetry
        self._places = places
        #: Runs, each with what is to be done: ring for it, or for those that waited for its message to be taken.
        self._waiting: deque[tuple[Run, Callable[[Run], None]]] = deque()
        self._limit = limit
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def enqueue(self, run: Run) -> None:
        """From any thread."""
        self._order(run, self._send)

    def answered(self, run: Run) -> None:
        """A worker took the run's message out of the queue: its owner's next may come in. From any thread."""
        if self._places is not None:
            self._order(run, self._next_of_owner)

    def _order(self, run: Run, what: Callable[[Run], None]) -> None:
        with self._changed:
            if len(self._waiting) >= self._limit:
                dropped, _ = self._waiting.popleft()
                self._telemetry.count("headwater_enqueue_failed_total")
                logger.warning("Too many runs wait for the queue; run %s is left to the sweeper", dropped.id)
            self._waiting.append((run, what))
            self._changed.notify()

    async def open(self) -> None:
        self._stopping.clear()
        # A daemon: a send that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="dispatcher", daemon=True)
        self._thread.start()

    async def run(self) -> None:
        """Nothing to do on the loop: the thread works."""

    async def close(self) -> None:
        """Hand over what waits, if that is quick."""
        self._stopping.set()
        with self._changed:
            self._changed.notify()
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.join, STOP_GRACE)
        if self._waiting:
            logger.warning("%d runs are not handed over and left to the sweeper", len(self._waiting))

    def _work(self) -> None:
        backoff = FIRST_BACKOFF
        while (order := self._next()) is not None:
            run, what = order
            try:
                what(run)
            except (OperationalError, OSError, LimitExceeded, LogUnavailable) as error:
                if refused_for_good(error):
                    self._leave(run, error)
                    continue
                self._again(order, error, first=backoff == FIRST_BACKOFF)
                if self._stopping.wait(backoff * random.uniform(0.5, 1.0)):
                    return
                backoff = min(backoff * 2, LAST_BACKOFF)
                continue
            except Exception as error:
                # Not Redis but this run, or us. A thread that died here would end all enqueueing in silence.
                self._telemetry.count("headwater_enqueue_failed_total")
                # Nor is it us when what this works with was closed under it, as a stop does in the end.
                fault = None if self._stopping.is_set() else error
                level = logging.ERROR if fault else logging.WARNING
                logger.log(
                    level, "Run %s cannot be handed to Celery and is left to the sweeper", run.id, exc_info=fault
                )
            backoff = FIRST_BACKOFF

    def _next(self) -> tuple[Run, Callable[[Run], None]] | None:
        with self._changed:
            while not self._waiting:
                if self._stopping.is_set():
                    return None
                self._changed.wait()
            return self._waiting.popleft()

    def _next_of_owner(self, run: Run) -> None:
        assert self._places is not None
        for following in self._places.give(run, _bells(run), places=BELLS):
            self.enqueue(following)

    def _send(self, run: Run) -> None:
        started = time.monotonic()
        ahead: int | None = 0
        if self._places is not None:
            ahead = self._places.take(run, _bells(run), order_of(run), places=BELLS, seconds=BELL_SECONDS)
        if ahead is None:
            logger.debug("Run %s waits for its owner's turn", run.id)
            return
        self._celery.send_task(
            RUN_TASK,
            args=[run.to_json()],
            # What `inspect` and Flower show. By default it is the arguments, and those are what people wrote.
            argsrepr=f"<run {run.id}, {run.kind}>",
            kwargsrepr="{}",
            task_id=run.id,
            queue=queue_of(run),
            priority=level_of(run, ahead),
            ignore_result=True,
            retry=False,
        )
        self._telemetry.observe("headwater_enqueue_seconds", time.monotonic() - started)

    def _leave(self, run: Run, error: Exception) -> None:
        # The queue of another kind may be all right, and so may this one be by the time the sweeper rings.
        self._telemetry.count("headwater_enqueue_failed_total")
        logger.error(
            "Redis refuses to queue run %s for %s, it is left to the sweeper: %s. Check what REDIS_URL's user may do, "
            "and that nothing else writes the keys of the queues.",
            *(run.id, queue_of(run), reason(error)),
        )

    def _again(self, order: tuple[Run, Callable[[Run], None]], error: Exception, *, first: bool) -> None:
        self._telemetry.count("headwater_enqueue_failed_total")
        if first:
            logger.warning("Run %s cannot be handed to Celery now and is tried again: %s", order[0].id, reason(error))
        with self._changed:
            if len(self._waiting) < self._limit:
                self._waiting.appendleft(order)
