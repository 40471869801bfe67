"""Synchronous code around a coroutine: it runs in a greenlet, which switches out whenever the coroutine waits.

SQLAlchemy's asyncio extension made the technique known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from greenlet import getcurrent, greenlet


class Driver(Awaitable[Any]):
    """Runs a function in a greenlet and waits, as an asyncio task, for each future that it switches out."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        #: Thrown into the coroutine in place of the next CancelledError.
        self.instead: BaseException | None = None
        #: Nobody waits for the outcome any more: whatever the coroutine makes of its cancel, it ends as cancelled.
        self.abandoned = False

    def __await__(self) -> Generator[Any, Any, Any]:
        here = getcurrent()
        child = _Driven(self, self._function, here)
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


class _Driven(greenlet):  # type: ignore[misc]  # greenlet has no types
    """Where the function runs; its parent is the driver on the event loop."""

    def __init__(self, driver: Driver, function: Callable[[], Any], parent: greenlet) -> None:
        super().__init__(function, parent)
        self.driver = driver


def driven() -> bool:
    """Whether a `Driver` runs this code, so that `await_only` works."""
    return isinstance(getcurrent(), _Driven)


def await_only(awaitable: Awaitable[Any]) -> Any:
    """Await from synchronous code inside an `async def` task. Raises RuntimeError anywhere else."""
    current = getcurrent()
    if not isinstance(current, _Driven) or current.parent is None:
        raise RuntimeError("await_only works inside an `async def` task of the asyncio pool only")
    try:
        outcome = _step_through(awaitable, current.parent)
    except asyncio.CancelledError as error:
        if current.driver.abandoned:
            raise
        # To Celery it would be a lost worker, for which a message may be delivered again, and again.
        raise RuntimeError("The coroutine ended with a CancelledError, although nobody cancelled its task") from error
    except Exception as error:
        if current.driver.abandoned:
            raise asyncio.CancelledError from error
        raise
    if current.driver.abandoned:
        raise asyncio.CancelledError
    return outcome


def _step_through(awaitable: Awaitable[Any], driver: greenlet) -> Any:
    steps = awaitable.__await__()
    error: BaseException | None = None
    while True:
        try:
            future = next(steps) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value
        error = None
        try:
            driver.switch(future)
        except BaseException as thrown:  # noqa: BLE001  # a cancel or a time limit: the coroutine decides what it means
            error = thrown
