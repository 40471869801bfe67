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
import contextvars
import inspect
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from billiard.einfo import ExceptionInfo
from celery import Task, signals
from celery.concurrency.base import BasePool
from celery.exceptions import ImproperlyConfigured, SoftTimeLimitExceeded, WorkerLostError
from celery.platforms import EX_FAILURE, EX_OK
from celery.worker import state
from greenlet import getcurrent, greenlet

logger = logging.getLogger(__name__)

#: Threads for `def` tasks, at most.
SYNC_THREADS: Final = 16
#: Seconds a cold shutdown waits for cancelled tasks to unwind.
UNWIND_SECONDS: Final = 3.0
#: Seconds the loop has at its end for what is left on it, such as shared clients that close.
END_SECONDS: Final = 5.0


class _TraceGreenlet(greenlet):  # type: ignore[misc]  # greenlet has no types
    """Where Celery traces one task; its parent is the driver on the event loop."""


def in_coroutine() -> bool:
    """Whether the asyncio pool runs this synchronous code around a coroutine, so that `await_only` works."""
    return isinstance(getcurrent(), _TraceGreenlet)


def await_only(awaitable: Awaitable[Any]) -> Any:
    """Await from synchronous code inside an `async def` task. Raises RuntimeError anywhere else."""
    current = getcurrent()
    if not isinstance(current, _TraceGreenlet) or current.parent is None:
        raise RuntimeError("await_only works inside an `async def` task of the asyncio pool only")
    steps = awaitable.__await__()
    error: BaseException | None = None
    while True:
        try:
            future = next(steps) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value
        error = None
        try:
            current.parent.switch(future)
        except BaseException as thrown:  # noqa: BLE001  # a cancel or a time limit: the coroutine decides what it means
            error = thrown


class AsyncTask(Task):  # type: ignore[misc]  # Celery has no types
    """Base of tasks whose body may be `async def`."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.run(*args, **kwargs)
        if not inspect.iscoroutine(result):
            return result
        return await_only(result) if in_coroutine() else self.run_apart(result)

    def run_apart(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run the body in any other pool, or in a plain call: in an event loop of its own."""
        return asyncio.run(work)


class _Driver(Awaitable[Any]):
    """Runs a function in a greenlet and waits, as an asyncio task, for each future that it switches out."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        #: Thrown into the coroutine in place of the next CancelledError.
        self.instead: BaseException | None = None

    def __await__(self) -> Generator[Any, Any, Any]:
        here = getcurrent()
        child = _TraceGreenlet(self._function, here)
        child.gr_context = here.gr_context
        step = child.switch()
        while not child.dead:
            try:
                yield step
            except asyncio.CancelledError as cancelled:
                error, self.instead = self.instead or cancelled, None
                if error is not cancelled and (task := asyncio.current_task()) is not None:
                    task.uncancel()
                step = child.throw(error)
            except BaseException as error:  # noqa: BLE001  # whatever is thrown in goes on inward
                step = child.throw(error)
            else:
                step = child.switch()
        return step


class _Job:
    """One task on its way through the pool. Celery keeps a weak reference and may call `terminate`."""

    def __init__(self, ident: int, pool: AsyncPool, callbacks: dict[str, Any]) -> None:
        self.ident = ident
        self.pool = pool
        self.callbacks = callbacks
        self.task: asyncio.Task[None] | None = None
        self.driver: _Driver | None = None
        #: Celery has been told its end already: revoked, or over its hard limit.
        self.abandoned = False

    def terminate(self, signal: int | None = None) -> None:
        self.pool.terminate_job(self.ident, signal)


class AsyncPool(BasePool):  # type: ignore[misc]  # Celery has no types
    """Runs `async def` tasks on one event loop in a thread of its own, `limit` (`--concurrency`) at once.

    `max_tasks_per_child` and `max_memory_per_child` are refused: there is no child to replace.
    """

    signal_safe = False
    task_join_will_block = False
    body_can_be_buffer = True

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
        self._slots = asyncio.Semaphore(limit or 1)
        self._thread: threading.Thread | None = None
        self._stop = asyncio.Event()
        self._threads = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="sync-task")
        self._hub: Any = None
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

    def on_stop(self) -> None:
        """Warm: every accepted task ends first. The hub rests by now, so this thread makes its calls itself."""
        self._hub = None
        while self._jobs:
            self._await_told(0.5)
        self._deliver()
        self._end()

    def on_terminate(self) -> None:
        """Cold: cancel everything and give it a moment to unwind."""
        self._hub = None
        for job in list(self._jobs.values()):
            self._abandon(job)
        deadline = time.monotonic() + UNWIND_SECONDS
        while self._jobs and time.monotonic() < deadline:
            self._await_told(0.1)
        self._end()

    def _work(self, begun: threading.Event) -> None:
        try:
            # At its end it cancels what is left on the loop and waits until that has unwound.
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._main(begun))
        except Exception:
            logger.critical("The pool's event loop died: the worker ends", exc_info=True)
            state.should_stop = EX_FAILURE
        finally:
            begun.set()

    async def _main(self, begun: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        # On the loop, so that a handler may open what its tasks share: see the module's first lines.
        signals.worker_process_init.send(sender=None)
        begun.set()
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
        if job.abandoned:
            job.task.cancel()

    async def _run(self, job: _Job, trace: Callable[[], Any], is_async: bool) -> None:
        limits: list[asyncio.TimerHandle] = []
        try:
            async with self._slots:
                self._tell(job, "accept_callback", job.ident, time.monotonic())
                limits = self._arm(job)
                if is_async:
                    job.driver = _Driver(trace)
                    outcome = await job.driver
                else:
                    context = contextvars.copy_context()
                    outcome = await asyncio.get_running_loop().run_in_executor(self._threads, context.run, trace)
        except BaseException as error:  # noqa: BLE001  # as in Celery's own pools: the worker is told whatever it was
            self._end_of(job, "error_callback", _lost(error))
        else:
            self._end_of(job, "callback", outcome)
        finally:
            for limit in limits:
                limit.cancel()

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
        self._tell(job, "timeout_callback", True, seconds)
        if job.driver is not None and job.task is not None:
            job.driver.instead = SoftTimeLimitExceeded(seconds)
            job.task.cancel()

    def _hard_limit(self, job: _Job, seconds: float) -> None:
        self._tell(job, "timeout_callback", False, seconds)
        job.abandoned = True
        if job.task is not None:
            job.task.cancel()

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Cancel the coroutine. `pid` is what `on_accepted` was told: the job's number."""
        job = self._jobs.get(pid)
        if job is not None:
            self._abandon(job)

    def _abandon(self, job: _Job) -> None:
        job.abandoned = True
        loop = self._require_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: job.task.cancel() if job.task is not None else None)

    def _end_of(self, job: _Job, callback: str, outcome: Any) -> None:
        if job.abandoned:
            self._post(lambda: self._forget(job))
        else:
            self._tell(job, callback, outcome)
            self._post(lambda: self._forget(job))

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job.ident, None)

    # --- calls on the main thread -----------------------------------------------------------------

    def _tell(self, job: _Job, name: str, *args: Any) -> None:
        callback = job.callbacks.get(name)
        if callback is not None:
            self._post(lambda: callback(*args))

    def _post(self, call: Callable[[], None]) -> None:
        with self._told:
            self._outbox.append(call)
            self._told.notify_all()
        hub = self._hub
        if hub is not None:
            hub.call_soon(self._deliver)
        elif self._state == self.RUN:
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
        for _ in range(n):
            self._require_loop().call_soon_threadsafe(self._slots.release)

    def shrink(self, n: int = 1) -> None:
        self.limit -= n
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
