"""Waiting for a condition, for tests that cannot await the event itself."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

#: Seconds; no measure of speed. A condition that comes is seen at once, so only a test that fails waits for so long.
PATIENCE = 30.0


@overload
async def eventually(check: Callable[[], Awaitable[T]], timeout: float = PATIENCE, every: float = 0.01) -> T: ...
@overload
async def eventually(check: Callable[[], T], timeout: float = PATIENCE, every: float = 0.01) -> T: ...
async def eventually(check: Callable[[], T | Awaitable[T]], timeout: float = PATIENCE, every: float = 0.01) -> T:
    """Ask `check`, plain or async, until it gives something true, and give that. An AssertionError counts as not yet.

    Raises AssertionError after `timeout` seconds, from what `check` last said.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    while True:
        last: object
        try:
            asked = check()
            result: T = await asked if inspect.isawaitable(asked) else asked
            if result:
                return result
            last = result
        except AssertionError as error:
            last = error
        if loop.time() > end:
            raise AssertionError(f"not within {timeout:g} s; last seen: {last!r}") from (
                last if isinstance(last, BaseException) else None
            )
        await asyncio.sleep(every)
