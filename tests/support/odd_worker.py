"""A worker whose chats do what a question tells it, for tests of what a worker must survive.

    python odd_worker.py worker …        the arguments of `headwater`; a server as well

    [[odd:die PATH]]        its process ends as by SIGKILL, as long as a file is at PATH
    [[odd:die late PATH]]   the same, after the first words
    [[odd:memory]]          it asks for more memory than its limit
    [[odd:raise NAME]]      it says a word and raises the exception of that name
    [[odd:on]]              its process ends as by SIGKILL after the first words, and the next attempt says the rest

Its kind of run is interrupted, not begun again, when a worker was lost that had said something; ODD_POLICY
in the environment says otherwise. ODD_CLOCK is a file: the seconds in it are what its wall clock is wrong by.
"""

from __future__ import annotations

import asyncio
import builtins
import os
import re
import resource
import signal
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from headwater import cli, events, pipelines
from headwater.events import Event
from headwater.pipelines.base import OnWorkerLost
from headwater.pipelines.chat import ChatPipeline
from headwater.runs import Run
from headwater.transcript import Transcript

ODD = re.compile(r"\[\[odd:(die late|die|memory|raise|on) ?(.*?)\]\]")


ENVIRONMENT = os.environ  # noqa: TID251 - not headwater's: what a test tells this process


class OddPipeline(ChatPipeline):
    on_worker_lost = OnWorkerLost(ENVIRONMENT.get("ODD_POLICY", "interrupt"))

    async def events(self, run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        told = ODD.search(run.input["messages"][-1]["content"])
        if told is None or (told[1].startswith("die") and not _exists(told[2])):
            async for event in super().events(run, said):
                yield event
            return
        what, argument = told.groups()
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if said.content:
            yield events.content(" and half")
            return
        yield events.content("Half")
        if what in {"die late", "on"}:
            # So that what was said is in the log: nobody can keep what nobody heard.
            await asyncio.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "memory":
            too_much()
        raise vars(builtins)[argument]("the oddity")


def _exists(path: str) -> bool:
    return Path(path).exists()


def too_much() -> None:
    """Raises MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 50_000_000, before[1]))
    try:
        bytearray(500_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bend_time(path: Path) -> None:
    """The wall clock of this process jumps whenever the file changes. What only goes forward goes on as before."""
    true = time.time_ns  # noqa: TID251 - the clock behind the Clock

    def false() -> int:
        wrong = float(path.read_text()) if path.exists() else 0.0
        return true() + round(wrong * 1e9)

    vars(time)["time_ns"] = false
    vars(time)["time"] = lambda: false() / 1e9


if __name__ == "__main__":
    if "ODD_CLOCK" in ENVIRONMENT:
        bend_time(Path(ENVIRONMENT["ODD_CLOCK"]))
    vars(pipelines)["ChatPipeline"] = OddPipeline
    cli.main()
