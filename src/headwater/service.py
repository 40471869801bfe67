"""Service: one law for everything that lives long.

    start()   fails fast, and is harmless the second time
    started   can be awaited
    drain()   take nothing new, finish what is quick
    stop()    waits for the end; tolerates not-started and a second stop

A service runs one coroutine, `run`, under supervision: an exception is logged and `run` begins
again after a back-off that grows, so a fault in a helper never ends the process in silence.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

logger = logging.getLogger(__name__)

#: Seconds before the first restart; doubles up to MAX_BACKOFF.
FIRST_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 5.0
#: Seconds after which a service that was told to stop, and goes on, is told again.
CANCEL_AGAIN: Final = 5.0


class Service:
    """Base of long-lived parts. Subclasses override `run`, and `open`/`close` for what must exist before and after."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name or type(self).__name__
        self._task: asyncio.Task[None] | None = None
        #: Set once `open` returned and `run` is under way.
        self.started = asyncio.Event()
        #: Set when the service should take nothing new.
        self.draining = asyncio.Event()

    async def open(self) -> None:
        """What must work before `start` returns. An exception here fails the start."""

    async def run(self) -> None:
        """The work. Returning ends it; raising restarts it. Cancelled by `stop`."""

    async def close(self) -> None:
        """Give back what `open` took. Called once, also after a failed `run`."""

    async def start(self) -> None:
        if self._task is not None:
            return
        self.draining.clear()
        await self.open()
        self._task = asyncio.create_task(self._supervise(), name=self.name)
        self.started.set()

    async def drain(self) -> None:
        self.draining.set()

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        self.draining.set()
        try:
            while not task.done():
                # Once is enough, unless a library loses it.
                task.cancel()
                await asyncio.wait([task], timeout=CANCEL_AGAIN)
            if not task.cancelled():
                task.result()
        finally:
            # Also when whoever stops it is cancelled: nobody comes again.
            self.started.clear()
            await self.close()

    async def _supervise(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            begun = asyncio.get_running_loop().time()
            try:
                return await self.run()
            except Exception:
                logger.exception("%s failed and is started again", self.name)
            if asyncio.get_running_loop().time() - begun > MAX_BACKOFF:
                backoff = FIRST_BACKOFF
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
            backoff = min(backoff * 2, MAX_BACKOFF)


@asynccontextmanager
async def running(*services: Service) -> AsyncIterator[None]:
    """Start the services in order, drain all and stop them in reverse order at the end."""
    # A stack, so that one that cannot be closed keeps no other from its end.
    async with AsyncExitStack() as stops:
        for service in services:
            await service.start()
            stops.push_async_callback(service.stop)
        try:
            yield
        finally:
            for service in reversed(services):
                await service.drain()
