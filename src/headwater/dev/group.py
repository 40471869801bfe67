"""Several processes of one command under one supervisor, which is all that its own process does."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Final

from headwater.dev.console import Console
from headwater.dev.part import Program

#: Seconds each may take to end. A supervisor above usually waits five.
GRACE: Final = 4.5


class Group:
    """Begun together, each begun again when it dies, ended together; without their supervisor they end themselves."""

    def __init__(self, programs: Sequence[Program], console: Console, *, grace: float = GRACE) -> None:
        self._programs = programs
        self._console = console
        self._grace = grace
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Stay until SIGTERM or Ctrl-C. Raises PartFailed when a process dies before it was ever ready."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._signalled)
        stop = asyncio.create_task(self._stop.wait())
        lives = [asyncio.create_task(program.supervise(), name=program.name) for program in self._programs]
        try:
            await asyncio.wait([stop, *lives], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            await asyncio.gather(*(program.stop(self._grace) for program in self._programs))
            results = await asyncio.gather(*lives, return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._console.say("group", "asked once more: everything is killed", "warning")
            for program in self._programs:
                program.kill()
        self._stop.set()
