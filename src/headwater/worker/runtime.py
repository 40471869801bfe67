"""The parts of a worker process on its event loop: one loop per process, shared by all its runs.

With the asyncio pool it is the pool's own loop, on which the tasks run as well. Celery's other pools are
synchronous and have none: there it is a loop in a thread beside them, and a task hands its coroutine over
and blocks. It is made in the process that uses it, never before a fork.
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
from headwater.worker.pool import new_event_loop
from headwater.worker.stalls import watched

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
    """The parts that live on one event loop, kept open until `stop`."""

    def __init__(self, settings: Settings, celery: Celery, *, metrics: bool = False) -> None:
        self._settings = settings
        self._celery = celery
        self._metrics = metrics
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._graph: asyncio.Future[Graph]
        self._drain: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self._main is not None and not self._main.done() and (self._thread is None or self._thread.is_alive())

    @property
    def graph(self) -> Graph | None:
        """The parts, once they are open."""
        opened = self._main is not None and self._graph.done() and not self._graph.cancelled()
        return self._graph.result() if opened else None

    def start(self) -> None:
        """Begin on the running loop; where none runs, on one in a thread of its own. The parts follow."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            begun = threading.Event()
            self._thread = threading.Thread(target=self._work, args=(begun,), name="headwater", daemon=True)
            self._thread.start()
            begun.wait()
        else:
            self._begin()

    # --- on the loop ----------------------------------------------------------------------------

    async def execute(self, run: Run) -> str | None:
        """Execute a run. Returns the state it ended in, None when it was not ours. Raises RuntimeGone."""
        graph = await self._opened()
        # A name of its own for every execution: the same message delivered twice is two holders.
        ended = await graph.runner.execute(run, f"{self._name}:{new_id()}")
        return ended.state.value if ended is not None else None

    async def sync(self) -> int:
        """Sync once; 0 while PostgreSQL is away. Raises RuntimeGone."""
        try:
            return await (await self._opened()).sync()
        except StoreUnavailable as error:
            logger.warning("The journal waits for PostgreSQL: %s", error)
            return 0

    async def _opened(self) -> Graph:
        try:
            # Shielded: a task that gives up must not take the parts from the others.
            return await asyncio.wait_for(asyncio.shield(self._graph), START_PATIENCE)
        except TimeoutError:
            raise RuntimeGone("The parts of this worker do not start; its log says why.") from None
        except asyncio.CancelledError:
            if not self._graph.cancelled():
                raise
            raise RuntimeGone("The worker ends before its parts have started.") from None

    def _begin(self) -> asyncio.Task[None]:
        self._loop = asyncio.get_running_loop()
        self._graph = self._loop.create_future()
        self._main = self._loop.create_task(self._keep_open(), name="headwater")
        return self._main

    async def _keep_open(self) -> None:
        try:
            while not self._graph.cancelled():
                try:
                    await self._live()
                except HeadwaterError as error:
                    if self._graph.done():
                        raise
                    # Its message says what to do; a traceback would hide it.
                    logger.critical("The worker's parts cannot start, next try in %g s: %s", RETRY_START, error)
                    await asyncio.wait({self._graph}, timeout=RETRY_START)
        except Exception:
            logger.exception("The worker's parts have failed")
        finally:
            self._graph.cancel()

    async def _live(self) -> None:
        async with open_graph(self._settings, self._celery, metrics=self._metrics) as graph:
            if self._graph.cancelled():
                return
            self._graph.set_result(graph)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await graph.runner.drain()

    def _begin_drain(self) -> None:
        # Parts that are not open yet have nothing to hand over, and whoever waits for them goes back to the queue.
        graph = None if self._graph.cancel() else self.graph
        if graph is not None and self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(graph.runner.drain())

    def _watch(self, reader: int) -> None:
        loop = asyncio.get_running_loop()

        def at_end() -> None:
            loop.remove_reader(reader)
            self._begin_drain()

        loop.add_reader(reader, at_end)

    # --- from other threads ---------------------------------------------------------------------

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and block until it ends. Raises RuntimeGone."""
        if self._loop is None or not self.alive:
            work.close()
            raise RuntimeGone("The worker's event loop has ended.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not future.done():
            # Not for ever: a loop that died takes every future with it, unfinished.
            concurrent.futures.wait([future], WATCH)
            if not future.done() and not self.alive:
                raise RuntimeGone("The worker's event loop died under the task.")
        if future.cancelled():
            raise RuntimeGone("The worker's event loop ended under the task.")
        return future.result()

    def drain(self) -> None:
        """Hand every run over. Returns at once; safe inside a signal handler."""
        self._call(self._begin_drain)

    def drain_at_end_of(self, reader: int) -> None:
        """Drain once the other end of this pipe is closed."""
        self._call(lambda: self._watch(reader))

    def stop(self) -> None:
        """Drain and close every part. Waits some seconds for the loop's thread; a pool's loop waits by itself."""
        if self._main is not None:
            self._call(self._main.cancel)
        if self._thread is not None:
            self._thread.join(STOP_GRACE)
            if self._thread.is_alive():
                logger.warning("The event loop did not end within %g s and is left behind", STOP_GRACE)

    def _call(self, callback: Callable[[], object]) -> None:
        if self._loop is None:
            return
        # A loop that is closed already has nothing left to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _work(self, begun: threading.Event) -> None:
        async def main() -> None:
            keeping = self._begin()
            begun.set()
            with watched():
                await asyncio.wait({keeping})

        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(main())
        except Exception:
            logger.exception("The worker's event loop died")
        finally:
            begun.set()


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
