"""A coroutine that does not yield stops every other one on its event loop. This says which, and where it is."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

logger = logging.getLogger(__name__)

#: Seconds between two looks, and seconds without a turn of the loop after which it is said.
EVERY: Final = 1.0
PATIENCE: Final = 1.0


@contextmanager
def watched() -> Iterator[None]:
    """Watch the running loop, from a thread beside it, inside the `with`."""
    loop, ident, ended = asyncio.get_running_loop(), threading.get_ident(), threading.Event()
    watch = threading.Thread(target=_watch, args=(loop, ident, ended), name="loop-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(loop: asyncio.AbstractEventLoop, ident: int, ended: threading.Event) -> None:
    while not ended.wait(EVERY):
        turned = threading.Event()
        # A loop that is closed has ended, too.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(turned.set)
            begun = time.monotonic()
            if turned.wait(PATIENCE) or ended.is_set():
                continue
            task, frame = asyncio.current_task(loop), sys._current_frames().get(ident)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else "(its thread has ended)\n"
            logger.warning(
                "The event loop stands still: %s has not awaited anything for %g s, and nothing else on the loop can "
                "go on meanwhile. Give what blocks to asyncio.to_thread. It is here:\n%s",
                task.get_name() if task is not None else "a callback",
                PATIENCE,
                stack,
            )
            while not turned.wait(EVERY):
                if ended.is_set():
                    return
            logger.warning("The event loop goes on after %.1f s", time.monotonic() - begun)
