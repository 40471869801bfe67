"""The API's composition root: every part of a server process, made and started in order.

Nothing here needs Redis or PostgreSQL to be there: a server that starts while they are away says
so and serves what it can. Only a journal that cannot be used stops the start, because accepting
a message means writing it there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Final, TypedDict

from headwater import providers, streams
from headwater.api.health import Checkup
from headwater.api.probes import Probes
from headwater.clock import Clock, SystemClock
from headwater.hub import Hub
from headwater.intake import Intake
from headwater.journal import Journal
from headwater.overlay import Overlay
from headwater.pipelines.chat import ChatPipeline
from headwater.providers.base import Provider
from headwater.queue import Dispatcher, make_celery
from headwater.reading import Reading
from headwater.replay import Replay
from headwater.runner import Runner
from headwater.service import Service, running
from headwater.settings import Settings
from headwater.store import Store
from headwater.streams.base import Page, StreamLog
from headwater.sweeper import BATCH, Sweeper
from headwater.syncer import Syncer
from headwater.telemetry import Telemetry, arm
from headwater.transports.base import Read, Streams
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


@dataclass(frozen=True, slots=True)
class Servers:
    """The ways out of this process: Redis, PostgreSQL, the local disk, the model's API."""

    log: StreamLog
    store: Store
    journal: Journal
    provider: Provider

    @property
    def about(self) -> Mapping[str, Any]:
        return {"demo": self.provider.demo, "model": self.provider.model, "version": version("headwater")}

    def reader(self, replay: Replay) -> Read:
        """Events from the log, or from the store once the log has expired."""

        async def read(run_id: str, after: int, limit: int) -> Page | None:
            page = await self.log.read(run_id, after, limit)
            if page is not None:
                return page
            told = await replay.page(run_id)
            if told is None:
                return None
            return Page(told.epoch, [one for one in told.events if one.seq > after][:limit], told.count, told.closed)

        return read


class _Common(TypedDict):
    """What almost every part is given."""

    clock: Clock
    telemetry: Telemetry
    settings: Settings


@asynccontextmanager
async def assemble(settings: Settings, telemetry: Telemetry) -> AsyncIterator[Graph]:
    """Make the parts and start those that run. Raises SettingsError and JournalUnavailable."""
    clock = SystemClock()
    arm(telemetry, settings.failpoint)
    async with AsyncExitStack() as stack:
        servers = await _servers(settings, telemetry, clock, stack)
        log, store, journal = servers.log, servers.store, servers.journal
        common: _Common = {"clock": clock, "telemetry": telemetry, "settings": settings}
        overlay = Overlay(store, journal)
        replay = Replay(overlay.run, overlay.message)
        hub = Hub(log, history=replay, telemetry=telemetry, heartbeat=settings.heartbeat)
        syncer = Syncer(journal, store, telemetry=telemetry, clock=clock)
        dispatcher = Dispatcher(make_celery(settings), telemetry=telemetry)
        kinds = {ChatPipeline.kind: ChatPipeline(servers.provider, settings)}
        runner = Runner(
            log,
            kinds,
            partial(syncer.keep, wait=settings.db_wait),
            known=overlay.run,
            history=replay.page,
            **common,
        )
        intake = Intake(
            store=store,
            journal=journal,
            save=syncer.save,
            log=log,
            enqueue=dispatcher.enqueue,
            settle=runner.settle,
            pipelines=kinds,
            **common,
            away=lambda: syncer.away,
        )
        # Here as well as in the workers: runs are taken over also when the only worker was restarted.
        sweeper = Sweeper(
            log,
            unfinished=partial(overlay.unfinished, older_than=settings.queue_grace, limit=BATCH),
            enqueue=dispatcher.enqueue,
            repair=runner.repair,
            clock=clock,
            telemetry=telemetry,
            grace=settings.queue_grace,
        )
        reading = Reading(store, journal, log)
        probes = Probes(settings, log, store, journal, syncer)
        stack.push_async_callback(probes.close)
        checkup = Checkup(probes.all(), vital=VITAL, telemetry=telemetry)
        stack.push_async_callback(checkup.close)
        open_streams = Streams(limit=settings.max_streams, telemetry=telemetry)
        stack.callback(open_streams.close)
        await stack.enter_async_context(running(syncer, dispatcher, intake.stops, hub, sweeper, _FirstLook(checkup)))
        read = servers.reader(replay)
        yield Graph(
            **common,
            reading=reading,
            intake=intake,
            streams=open_streams,
            stream=StreamEndpoint(hub, open_streams, may=reading.may_read, may_each=reading.may_read_each, read=read),
            poll=Poll(hub, open_streams, may=reading.may_read, read=read),
            checkup=checkup,
            about={**servers.about, "access": "open" if settings.access_token is None else "token"},
        )


async def _servers(settings: Settings, telemetry: Telemetry, clock: Clock, stack: AsyncExitStack) -> Servers:
    log = streams.connect(settings.need_redis(), ttl=settings.stream_ttl, lease_seconds=settings.lease_seconds)
    stack.push_async_callback(log.close)
    url = settings.need_database()
    store = Store(url, pool_size=settings.db_pool_size, wait=settings.db_wait)
    stack.push_async_callback(store.close)
    provider = providers.connect(settings, telemetry)
    stack.push_async_callback(provider.close)
    journal = Journal(settings.journal_file, clock=clock, telemetry=telemetry)
    stack.push_async_callback(journal.close)
    await journal.open()
    return Servers(log, store, journal, provider)


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
