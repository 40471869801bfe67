"""A house for tests: intake, reading and a runner in one process, over a real Redis, PostgreSQL and journal."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwater import streams
from headwater.absence import Absence
from headwater.access import LOCAL_OWNER, Caller
from headwater.clock import SystemClock
from headwater.intake import Intake
from headwater.journal import Journal
from headwater.overlay import Overlay
from headwater.pipelines.chat import ChatPipeline
from headwater.providers.base import ChatRequest, Delta
from headwater.providers.scripted import ScriptedProvider, Step
from headwater.reading import Reading
from headwater.replay import Replay
from headwater.runner import Runner
from headwater.runs import Run
from headwater.service import running
from headwater.settings import Settings
from headwater.store import Store
from headwater.streams.base import StreamLog
from headwater.syncer import Syncer
from headwater.telemetry import Telemetry

ME = Caller(LOCAL_OWNER)
STRANGER = Caller("somebody-else")


@dataclass
class House:
    """The parts, and what became of the runs."""

    settings: Settings
    telemetry: Telemetry
    store: Store
    journal: Journal
    syncer: Syncer
    log: StreamLog
    runner: Runner
    intake: Intake
    reading: Reading
    overlay: Overlay
    absence: Absence
    replay: Replay
    #: Runs that were handed to the queue, in order.
    queue: list[Run]
    #: Lets an answer that waits go on to its end.
    gate: asyncio.Event
    #: What the model was asked, in order.
    asked: list[ChatRequest]
    _working: list[asyncio.Task[Run | None]] = field(default_factory=list)

    async def work(self) -> Run:
        """Execute the oldest queued run to its end."""
        ended = await self.begin()
        assert ended is not None
        return ended

    def begin(self) -> asyncio.Task[Run | None]:
        """Let a worker take the oldest queued run."""
        run = self.queue.pop(0)
        task = asyncio.create_task(self.runner.execute(run, f"worker-{run.id}"))
        self._working.append(task)
        return task

    async def counts(self) -> tuple[int, int]:
        """Records in the journal's file for all chats, and those that wait for PostgreSQL."""
        waiting = (await self.journal.backlog()).count
        return len(await self.journal.kept_chats(LOCAL_OWNER)), waiting

    async def synced(self) -> bool:
        """Whether PostgreSQL has everything."""
        return (await self.journal.backlog()).count == 0

    async def leave(self) -> None:
        self.gate.set()
        await asyncio.gather(*self._working, return_exceptions=True)


def script(asked: list[ChatRequest], gate: asyncio.Event) -> Any:
    """Answers `You said: <question>`; waits in the middle when the question has the word `wait`, fails at `fail`."""

    def play(request: ChatRequest) -> Iterable[Step]:
        asked.append(request)
        question = str(request.messages[-1]["content"])
        yield Delta(reasoning="Hm.")
        yield Delta(content="You said: ")
        if "wait" in question:
            yield gate
        if "fail" in question:
            yield RuntimeError("scripted")
        yield Delta(content=question)
        yield Delta(usage=(7, 3))

    return play


@asynccontextmanager
async def make_house(
    redis_url: str, database_url: str, folder: Path, *, intake_log: StreamLog | None = None, **changes: Any
) -> AsyncIterator[House]:
    """A running house. `intake_log`: another log for intake and reading than the worker's."""
    settings = Settings(_env_file=None, redis_url=redis_url, data_dir=folder, **changes)
    telemetry, clock = Telemetry(), SystemClock()
    store = Store(database_url, pool_size=settings.db_pool_size, wait=settings.db_wait, clock=clock)
    journal = Journal(settings.journal_file, clock=clock, telemetry=telemetry)
    await journal.open()
    log = streams.connect(redis_url)
    front = intake_log or log
    syncer = Syncer(journal, store, telemetry=telemetry, clock=clock)
    asked: list[ChatRequest] = []
    gate = asyncio.Event()
    pipelines = {"chat": ChatPipeline(ScriptedProvider(script(asked, gate)), settings)}
    overlay = Overlay(store, journal)
    replay = Replay(overlay.run, overlay.message)
    queue: list[Run] = []
    runner = Runner(
        log,
        pipelines,
        syncer.save,
        clock=clock,
        telemetry=telemetry,
        settings=settings,
        known=overlay.run,
        requeue=queue.append,
        history=replay.page,
    )
    absence = Absence(store, clock)
    intake = Intake(
        store=store,
        absence=absence,
        journal=journal,
        save=syncer.save,
        log=front,
        enqueue=lambda run: queue.append(run),
        settle=runner.settle,
        pipelines=pipelines,
        clock=clock,
        telemetry=telemetry,
        settings=settings,
        away=lambda: syncer.away,
    )
    house = House(
        settings,
        telemetry,
        store,
        journal,
        syncer,
        log,
        runner,
        intake,
        Reading(store, journal, front, absence),
        overlay,
        absence,
        replay,
        queue,
        gate,
        asked,
    )
    try:
        async with running(syncer, runner.leases, intake.stops):
            yield house
            await house.leave()
    finally:
        await log.close()
        await journal.close()
        await store.close()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process and all below it, stopped as by a debugger: it neither answers nor closes a connection."""
    family = [pid, *_below(pid)]
    _tell(family, signal.SIGSTOP)
    try:
        yield
    finally:
        _tell(family, signal.SIGCONT)


def _tell(family: list[int], what: signal.Signals) -> None:
    for each in family:
        # A session of PostgreSQL's may end in between.
        with suppress(ProcessLookupError):
            os.kill(each, what)


def _below(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for child in children for each in (child, *_below(child))]
