"""The event loop of a worker process, in a thread beside Celery's pool.

Celery's pools are synchronous. A task hands its coroutine to the loop and blocks; all runs of a
process share the loop, its connections and its one lease keeper. The loop is made in the process that
uses it, never before a fork.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from celery import Celery

from headwater.errors import HeadwaterError, StoreUnavailable
from headwater.ids import new_id
from headwater.runs import Run
from headwater.settings import Settings
from headwater.worker.graph import Graph, open_graph

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds until a failed start is tried again.
RETRY_START: Final = 2.0
#: Seconds a task waits for the loop's parts; over it the task goes back to the queue.
START_PATIENCE: Final = 15.0
#: Seconds `stop` waits for the loop's thread.
STOP_GRACE: Final = 4.0
#: Seconds between looks whether the loop still lives, while a task waits for it.
WATCH: Final = 2.0


class RuntimeGone(HeadwaterError):
    """This process's event loop has ended or cannot start. Another process can take the task."""

    code = "runtime_gone"


class Runtime:
    """One event loop in a daemon thread, and the parts that live on it."""

    def __init__(self, settings: Settings, celery: Celery, *, metrics: bool = False) -> None:
        self._settings = settings
        self._celery = celery
        self._metrics = metrics
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        self._ready: concurrent.futures.Future[Graph] = concurrent.futures.Future()
        self._stopping = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._work, name="headwater", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin. Returns once the loop runs; its parts follow."""
        self._thread.start()
        self._begun.wait()

    # --- for Celery's threads -------------------------------------------------------------------

    def execute(self, run: Run) -> str | None:
        """Execute a run and wait. Returns the state it ended in, None when it was not ours. Raises RuntimeGone."""
        # A name of its own for every execution: the same message delivered twice is two holders.
        holder = f"{self._name}:{new_id()}"
        ended = self._wait(lambda graph: graph.runner.execute(run, holder))
        return ended.state.value if ended is not None else None

    def sync(self) -> int:
        """Sync once; 0 while PostgreSQL is away. Raises RuntimeGone."""
        try:
            return self._wait(lambda graph: graph.sync())
        except StoreUnavailable as error:
            logger.warning("The journal waits for PostgreSQL: %s", error)
            return 0

    def drain(self) -> None:
        """Hand every run over. Returns at once; safe inside a signal handler."""
        self._call(self._begin_drain)

    def drain_at_end_of(self, reader: int) -> None:
        """Drain once the other end of this pipe is closed."""
        self._call(lambda: self._watch(reader))

    def stop(self) -> None:
        """Drain, stop every part and end the loop. Waits some seconds for it."""
        self._call(self._stopping.set)
        self._thread.join(STOP_GRACE)
        if self.alive:
            logger.warning("The event loop did not end within %g s and is left behind", STOP_GRACE)

    def _wait(self, work: Callable[[Graph], Coroutine[Any, Any, T]]) -> T:
        try:
            graph = self._ready.result(START_PATIENCE)
        except (TimeoutError, concurrent.futures.CancelledError):
            raise RuntimeGone("The parts of this worker do not start; its log says why.") from None
        if self._loop is None or not self.alive:
            raise RuntimeGone("The worker's event loop has ended.")
        future = asyncio.run_coroutine_threadsafe(work(graph), self._loop)
        while not future.done():
            # Not for ever: a loop that died takes every future with it, unfinished.
            concurrent.futures.wait([future], WATCH)
            if not future.done() and not self.alive:
                raise RuntimeGone("The worker's event loop died under the task.")
        if future.cancelled():
            raise RuntimeGone("The worker's event loop ended under the task.")
        return future.result()

    def _call(self, callback: Callable[[], object]) -> None:
        if self._loop is None:
            return
        # A loop that is closed already has nothing left to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    # --- on the loop ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._main())
        except Exception:
            logger.exception("The worker's event loop died")
        finally:
            self._begun.set()
            self._ready.cancel()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        while not self._stopping.is_set():
            try:
                await self._live()
            except HeadwaterError as error:
                if self._ready.done():
                    raise
                # Its message says what to do; a traceback would hide it.
                logger.critical("The worker's parts cannot start, next try in %g s: %s", RETRY_START, error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), RETRY_START)

    async def _live(self) -> None:
        async with open_graph(self._settings, self._celery, metrics=self._metrics) as graph:
            self._ready.set_result(graph)
            await self._stopping.wait()
            await graph.runner.drain()

    def _begin_drain(self) -> None:
        if self._drain is None and self._ready.done() and not self._ready.cancelled():
            self._drain = asyncio.get_running_loop().create_task(self._ready.result().runner.drain())

    def _watch(self, reader: int) -> None:
        loop = asyncio.get_running_loop()

        def at_end() -> None:
            loop.remove_reader(reader)
            self._begin_drain()

        loop.add_reader(reader, at_end)


class Runtimes:
    """The runtime of the process that asks. Made at the first call, again after a fork, and again if its loop died."""

    def __init__(self, settings: Settings, celery: Celery) -> None:
        self._settings = settings
        self._celery = celery
        self._lock = threading.Lock()
        self._maker = os.getpid()
        self._pid = 0
        self._runtime: Runtime | None = None

    def here(self) -> Runtime:
        """This process's runtime, started."""
        with self._lock:
            if self._runtime is None or self._pid != os.getpid() or not self._runtime.alive:
                self._pid = os.getpid()
                # Children of a pool would fight over the one port, and the winner's figures would pass for all.
                alone = self._pid == self._maker
                self._runtime = Runtime(self._settings, self._celery, metrics=alone)
                self._runtime.start()
            return self._runtime

    def drain(self) -> None:
        """Hand over what this process runs. Takes no lock: it is called inside a signal handler."""
        if self._runtime is not None and self._pid == os.getpid():
            self._runtime.drain()

    def stop(self) -> None:
        """End this process's runtime, if it has one."""
        if self._runtime is not None and self._pid == os.getpid():
            self._runtime.stop()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows has none.
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
