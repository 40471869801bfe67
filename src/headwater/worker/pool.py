"""An asyncio pool for Celery: `async def` tasks, thousands at once, in one process, without patching Celery.

    CELERY_CUSTOM_WORKER_POOL=headwater.worker.pool:AsyncPool celery -A your.app worker --pool custom -c 1000

    app = Celery(..., task_cls="headwater.worker.pool:AsyncTask")

    @app.task(bind=True)
    async def answer(self, question): ...

Usable by any Celery project; knows nothing of the rest of headwater.

How it works. Celery traces a task in a synchronous function, which calls the task's body and then
sets states, sends signals and events. For an `async def` task that function runs in a greenlet on
the event loop's thread. `AsyncTask` steps the body's coroutine in that greenlet; whenever the
coroutine waits for a future, the greenlet switches out with the future to its driver, an asyncio
task, which waits for it and switches back in. So everything around the body is Celery's own code,
and `self.request` works inside the coroutine, because Celery's request stack is kept per greenlet.
(In tasks that the coroutine itself creates it does not: hand the request over.) SQLAlchemy's
asyncio extension made the technique known.

The signals `worker_process_init` and `worker_process_shutdown` are sent on the running loop. What tasks
share, such as an HTTP client, is opened by a task that a handler creates there (`asyncio.create_task`);
it is cancelled when the worker ends, once all of Celery's tasks have ended.

Ordinary `def` tasks run in threads beside the loop, SYNC_THREADS at once, and cannot block it.
Their time limits are reported but nothing can stop a thread.

What Celery does around the body, such as a result backend's write or a signal's handlers, runs on
the loop's thread: keep results off (`ignore_result`) or their backend quick.

Acknowledgements and events are sent from the worker's main thread, where its connection lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from billiard.einfo import ExceptionInfo
from celery import Task, signals
from celery.concurrency.base import BasePool
from celery.exceptions import ImproperlyConfigured, SoftTimeLimitExceeded, WorkerLostError
from celery.platforms import EX_FAILURE, EX_OK
from celery.worker import state

from headwater.worker.greenlets import Driver, await_only, driven
from headwater.worker.stalls import watched

logger = logging.getLogger(__name__)

#: Threads for `def` tasks, at most.
SYNC_THREADS: Final = 16
#: Seconds a cold shutdown waits for cancelled tasks to unwind.
UNWIND_SECONDS: Final = 3.0
#: Seconds the loop has at its end for what is left on it, such as shared clients that close.
END_SECONDS: Final = 5.0


class AsyncTask(Task):  # type: ignore[misc]  # Celery has no types
    """Base of tasks whose body may be `async def`. For Celery it is a function that ends when the coroutine does."""

    abstract = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        body = cls.__dict__.get("run")
        static = isinstance(body, staticmethod)
        function = body.__func__ if isinstance(body, staticmethod) else body
        if function is None or not inspect.iscoroutinefunction(inspect.unwrap(function)):
            return

        # Under the name that Celery's `autoretry_for` wraps, so that it sees what the coroutine raises.
        @functools.wraps(function)
        def run(self: AsyncTask, *args: Any, **kwargs: Any) -> Any:
            work = function(*args, **kwargs) if static else function(self, *args, **kwargs)
            return await_only(work) if driven() else self.run_apart(work)

        cls.run = run

    def run_apart(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run the body in any other pool, or in a plain call: in an event loop of its own."""
        return asyncio.run(work)


class _Job:
    """One task on its way through the pool. Celery keeps a weak reference and may call `terminate`."""

    def __init__(self, ident: int, pool: AsyncPool, callbacks: dict[str, Any]) -> None:
        self.ident = ident
        self.pool = pool
        self.callbacks = callbacks
        self.name = str(callbacks.get("correlation_id"))
        self.accepted = False
        self.task: asyncio.Task[tuple[str, Any]] | None = None
        self.driver: Driver | None = None
        #: Celery has been told its end already: revoked, or over its hard limit.
        self.abandoned = False

    def terminate(self, signal: int | None = None) -> None:
        self.pool.terminate_job(self.ident, signal)

    def cancel(self) -> None:
        """On the loop: cancel the coroutine, whose outcome nobody waits for any more."""
        self.abandoned = True
        if self.driver is not None:
            self.driver.abandoned = True
        if self.task is not None:
            self.task.cancel()


class AsyncPool(BasePool):  # type: ignore[misc]  # Celery has no types
    """Runs `async def` tasks on one event loop in a thread of its own, `limit` (`--concurrency`) at once.

    `max_tasks_per_child` and `max_memory_per_child` are refused: there is no child to replace.
    """

    signal_safe = False
    body_can_be_buffer = True
    #: What is over `--concurrency` waits with Celery, where it can be revoked and is given back by a shutdown.
    uses_semaphore = True

    def __init__(self, limit: int | None = None, **options: Any) -> None:
        super().__init__(limit, **options)
        for name in ("maxtasksperchild", "max_memory_per_child"):
            if options.get(name):
                raise ImproperlyConfigured(
                    f"The asyncio pool has no child processes to replace, so it cannot honour {name}. "
                    "Leave it unset, and let a process manager restart the worker."
                )
        self._time_limits = (options.get("soft_timeout"), options.get("timeout"))
        self._jobs: dict[int, _Job] = {}
        self._idents = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        # The bound itself: Celery's forgets who holds it when a connection breaks, and with some brokers there is none.
        self._slots = asyncio.Semaphore(limit or 1)
        self._celerys_slots: Any = options.get("semaphore")
        self._thread: threading.Thread | None = None
        self._stop = asyncio.Event()
        self._threads = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="sync-task")
        self._hub: Any = None
        #: The main thread makes its calls itself, and takes no new task to the pool.
        self._stopping = False
        #: Calls for the main thread, in order; the hub's own set of ready callbacks keeps none.
        self._outbox: deque[Callable[[], None]] = deque()
        self._told = threading.Condition()

    # --- life -------------------------------------------------------------------------------------

    def on_start(self) -> None:
        begun = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(begun,), name="asyncio-pool", daemon=True)
        self._thread.start()
        begun.wait()

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub
        # After a lost connection: what could not be told meanwhile.
        hub.call_soon(self._deliver)

    def on_stop(self) -> None:
        """Warm: every accepted task ends first. What was cancelled already, by a cold shutdown, gets a moment."""
        self._stopping = True
        thread = self._thread
        # A loop that died ends nothing more.
        while thread and thread.is_alive() and any(not job.abandoned for job in list(self._jobs.values())):
            self._await_told(0.5)
        self._unwind()

    def on_terminate(self) -> None:
        """Cold: cancel everything and give it a moment to unwind."""
        self._stopping = True
        for ident in list(self._jobs):
            self.terminate_job(ident)
        self._unwind()

    def _unwind(self) -> None:
        deadline = time.monotonic() + UNWIND_SECONDS
        while self._jobs and time.monotonic() < deadline:
            self._await_told(0.1)
        self._deliver()
        if self._jobs and self._thread is not None:
            names = ", ".join(job.name for job in self._jobs.values())
            logger.error("Tasks that were cancelled go on and are left behind: %s", names)
        self._end()

    def _work(self, begun: threading.Event) -> None:
        try:
            # At its end it cancels what is left on the loop and waits until that has unwound.
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._main(begun))
        except BaseException:  # also a SystemExit in a task's task: a thread ends by it in silence
            logger.critical("The pool's event loop died: the worker ends", exc_info=True)
            state.should_stop = EX_FAILURE
        finally:
            begun.set()

    async def _main(self, begun: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        # On the loop, so that a handler may open what its tasks share: see the module's first lines.
        signals.worker_process_init.send(sender=None)
        begun.set()
        with watched():
            await self._stop.wait()
        signals.worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=EX_OK)

    def _end(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            self._require_loop().call_soon_threadsafe(self._stop.set)
            thread.join(END_SECONDS)

    def _require_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("the pool is not started")
        return self._loop

    # --- one task ---------------------------------------------------------------------------------

    def on_apply(self, target: Callable[..., Any], args: Any = (), kwargs: Any = None, **options: Any) -> _Job:
        job = _Job(next(self._idents), self, options)
        self._jobs[job.ident] = job
        self._require_loop().call_soon_threadsafe(self._admit, job, lambda: target(*args, **(kwargs or {})), args)
        return job

    def _admit(self, job: _Job, trace: Callable[[], Any], args: Any) -> None:
        job.task = asyncio.get_running_loop().create_task(self._run(job, trace, self._is_async(args)))
        # Not at the end of the coroutine itself: a task that is cancelled before its first step never begins.
        job.task.add_done_callback(lambda task: self._done(job, task))
        job.task.set_name(f"{args[0]}[{job.name}]" if args else job.name)

    async def _run(self, job: _Job, trace: Callable[[], Any], is_async: bool) -> tuple[str, Any]:
        """One of Celery's callbacks and what it is told."""
        limits: list[asyncio.TimerHandle] = []
        try:
            async with self._slots:
                if self._stopping:
                    # Never accepted, so its broker gives it to another worker.
                    return "", None
                self._accept(job)
                limits = self._arm(job)
                if is_async:
                    job.driver = Driver(trace)
                    return "callback", await job.driver
                context = contextvars.copy_context()
                threads = asyncio.get_running_loop().run_in_executor(self._threads, context.run, trace)
                return "callback", await threads
        except BaseException as error:  # noqa: BLE001  # as in Celery's own pools: the worker is told whatever it was
            return "error_callback", _lost(error)
        finally:
            for limit in limits:
                limit.cancel()

    def _accept(self, job: _Job) -> None:
        job.accepted = True
        self._tell(job, "accept_callback", job.ident, time.monotonic())

    def _done(self, job: _Job, task: asyncio.Task[tuple[str, Any]]) -> None:
        if job.abandoned:
            if not job.accepted:
                # Revoked while it waited: Celery announces that once the task is accepted.
                self._accept(job)
        elif task.cancelled():
            self._tell(job, "error_callback", _lost(asyncio.CancelledError()))
        else:
            self._tell(job, *task.result())
        self._post(lambda: self._forget(job))

    def _is_async(self, args: Any) -> bool:
        """Celery's trace functions take the task's name first."""
        task = self.app.tasks.get(args[0]) if args and self.app is not None else None
        return task is not None and inspect.iscoroutinefunction(inspect.unwrap(task.run))

    def _arm(self, job: _Job) -> list[asyncio.TimerHandle]:
        loop = asyncio.get_running_loop()
        soft = job.callbacks.get("soft_timeout") or self._time_limits[0]
        hard = job.callbacks.get("timeout") or self._time_limits[1]
        limits = []
        if soft:
            limits.append(loop.call_later(soft, self._soft_limit, job, soft))
        if hard:
            limits.append(loop.call_later(hard, self._hard_limit, job, hard))
        return limits

    def _soft_limit(self, job: _Job, seconds: float) -> None:
        if job.abandoned:
            return
        self._tell(job, "timeout_callback", True, seconds)
        if job.driver is not None and job.task is not None:
            job.driver.instead = SoftTimeLimitExceeded(seconds)
            job.task.cancel()

    def _hard_limit(self, job: _Job, seconds: float) -> None:
        if job.abandoned:
            return
        self._tell(job, "timeout_callback", False, seconds)
        job.cancel()

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Cancel the coroutine. `pid` is what `on_accepted` was told: the job's number."""
        job = self._jobs.get(pid)
        # Celery asks twice, by the number and by the job; a second cancel would break into the tidying up.
        if job is not None and not job.abandoned:
            job.abandoned = True
            # A loop that is closed has nothing left to cancel.
            with contextlib.suppress(RuntimeError):
                self._require_loop().call_soon_threadsafe(job.cancel)

    def _forget(self, job: _Job) -> None:
        if self._jobs.pop(job.ident, None) is not None and self._celerys_slots is not None:
            self._celerys_slots.release()

    # --- calls on the main thread -----------------------------------------------------------------

    def _tell(self, job: _Job, name: str, *args: Any) -> None:
        callback = job.callbacks.get(name)
        if callback is not None:
            self._post(lambda: callback(*args))

    def _post(self, call: Callable[[], None]) -> None:
        with self._told:
            self._outbox.append(call)
            self._told.notify_all()
        if self._stopping:
            return
        if self._hub is not None:
            self._hub.call_soon(self._deliver)
        else:
            # A worker without kombu's hub reads its connection in a blocking loop: as its thread pool does, call here.
            self._deliver()

    def _deliver(self) -> None:
        while True:
            with self._told:
                if not self._outbox:
                    return
                call = self._outbox.popleft()
            try:
                call()
            except Exception:
                logger.exception("A callback of the worker failed")

    def _await_told(self, seconds: float) -> None:
        with self._told:
            if not self._outbox:
                self._told.wait(seconds)
        self._deliver()

    # --- what Celery asks -------------------------------------------------------------------------

    def grow(self, n: int = 1) -> None:
        self.limit += n
        if self._celerys_slots is not None:
            self._celerys_slots.grow(n)
        for _ in range(n):
            self._require_loop().call_soon_threadsafe(self._slots.release)

    def shrink(self, n: int = 1) -> None:
        """Take places away; those of running tasks once the tasks have ended. Raises ValueError for the last one."""
        if n >= self.limit:
            raise ValueError(f"The pool has {self.limit} places and keeps at least one.")
        self.limit -= n
        if self._celerys_slots is not None:
            self._celerys_slots.shrink(n)
        for _ in range(n):
            asyncio.run_coroutine_threadsafe(self._slots.acquire(), self._require_loop())

    def _get_info(self) -> dict[str, Any]:
        return {**super()._get_info(), "running": len(self._jobs), "sync-threads": SYNC_THREADS}

    @property
    def num_processes(self) -> int:
        return self.limit or 1


def _lost(error: BaseException) -> ExceptionInfo:
    """What Celery's callback for errors takes. Whatever is no Exception, such as a cancel, is a lost worker to it."""
    known = error if isinstance(error, Exception) else WorkerLostError(repr(error))
    return ExceptionInfo((type(known), known, error.__traceback__))


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
