"""The API's composition root: every part of a server process, made and started in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Final

from headwater.absence import Absence
from headwater.api.health import Checkup
from headwater.api.probes import Probes
from headwater.clock import Clock
from headwater.core import open_core
from headwater.errors import Unavailable
from headwater.hub import Hub
from headwater.intake import Intake
from headwater.queue import make_celery
from headwater.reading import Reading
from headwater.replay import Replay
from headwater.service import Service, running
from headwater.settings import Settings
from headwater.streams.base import Page, StreamLog
from headwater.telemetry import Telemetry
from headwater.transports.base import Streams
from headwater.transports.poll import Poll
from headwater.transports.sse import StreamEndpoint

logger = logging.getLogger(__name__)

#: The parts without which nothing can be accepted.
VITAL: Final = frozenset({"journal"})
#: Seconds after the start at which a worker should be there.
SETTLED: Final = 15.0


@dataclass(frozen=True, slots=True)
class Graph:
    """The parts of one server process."""

    settings: Settings
    telemetry: Telemetry
    clock: Clock
    reading: Reading
    intake: Intake
    streams: Streams
    stream: StreamEndpoint
    poll: Poll
    checkup: Checkup
    #: The members of the health document that do not change.
    about: Mapping[str, Any]


def started(graph: Graph | None) -> Graph:
    """The parts, if they are there. Raises Unavailable."""
    if graph is None:
        raise Unavailable("The server does not run now. An application that mounts it enters its `lifespan`.")
    return graph


@asynccontextmanager
async def assemble(settings: Settings, telemetry: Telemetry) -> AsyncIterator[Graph]:
    """Make the parts and start those that run. Raises SettingsError and JournalUnavailable."""
    async with AsyncExitStack() as stack:
        core = await open_core(settings, telemetry, make_celery(settings), stack)
        hub = Hub(core.log, history=core.replay, telemetry=telemetry, heartbeat=settings.heartbeat, clock=core.clock)
        absence = Absence(core.store, core.clock)
        intake = Intake(
            store=core.store,
            absence=absence,
            journal=core.journal,
            save=core.syncer.save,
            log=core.log,
            enqueue=core.dispatcher.enqueue,
            settle=core.runner.settle,
            pipelines=core.pipelines,
            clock=core.clock,
            telemetry=telemetry,
            settings=settings,
            away=lambda: core.syncer.away,
        )
        reading = Reading(core.store, core.journal, core.log, absence)
        probes = Probes(settings, core.log, core.store, core.journal, core.syncer)
        stack.push_async_callback(probes.close)
        checkup = Checkup(probes.all(), vital=VITAL, telemetry=telemetry)
        stack.push_async_callback(checkup.close)
        open_streams = Streams(limit=settings.max_streams, telemetry=telemetry)
        stack.callback(open_streams.close)
        await stack.enter_async_context(running(*core.services, intake.stops, hub, _FirstLook(checkup)))
        read = partial(_read, core.log, core.replay)
        yield Graph(
            settings=settings,
            telemetry=telemetry,
            clock=core.clock,
            reading=reading,
            intake=intake,
            streams=open_streams,
            stream=StreamEndpoint(hub, open_streams, may=reading.may_read, may_each=reading.may_read_each, read=read),
            poll=Poll(hub, open_streams, may=reading.may_read, read=read),
            checkup=checkup,
            about={
                "demo": core.provider.demo,
                "model": core.provider.model,
                "version": version("headwater"),
                "when_busy": settings.when_busy.value,
                "access": "open" if settings.access_token is None else "token",
            },
        )


async def _read(log: StreamLog, replay: Replay, run_id: str, after: int, limit: int) -> Page | None:
    """Events from the log, or from the store once the log has expired."""
    page = await log.read(run_id, after, limit)
    if page is not None:
        return page
    told = await replay.page(run_id)
    if told is None:
        return None
    return Page(told.epoch, [one for one in told.events if one.seq > after][:limit], told.count, told.closed)


class _FirstLook(Service):
    """Says once, in the log, what is missing. Beside the start, which waits for nobody."""

    def __init__(self, checkup: Checkup, settled: float = SETTLED) -> None:
        super().__init__()
        self._checkup = checkup
        self._settled = settled

    async def run(self) -> None:
        await self._say(lambda name: name != "worker")
        # The workers are often started together with the servers and take longer.
        await asyncio.sleep(self._settled)
        await self._say(lambda name: name == "worker")

    async def _say(self, which: Callable[[str], bool]) -> None:
        for name, part in (await self._checkup.parts()).items():
            if not part["ok"] and which(name):
                logger.warning("%s: %s", name, part["detail"])
