"""The API's composition root: every part of a server process, made and started in order.

Nothing here needs Redis or PostgreSQL to be there: a server that starts while they are away says
so and serves what it can. Only a journal that cannot be used stops the start, because accepting
a message means writing it there.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from headwater import providers, streams
from headwater.api.health import Checkup
from headwater.api.probes import Probes
from headwater.clock import Clock, SystemClock
from headwater.hub import Hub
from headwater.intake import Intake
from headwater.journal import Journal
from headwater.overlay import Overlay
from headwater.pipelines.chat import ChatPipeline
from headwater.queue import Dispatcher, make_celery
from headwater.reading import Reading
from headwater.replay import Replay
from headwater.runner import Runner
from headwater.service import running
from headwater.settings import Settings
from headwater.store import Store
from headwater.streams.base import Page, StreamLog
from headwater.sweeper import Sweeper
from headwater.syncer import Syncer
from headwater.telemetry import Telemetry
from headwater.transports.base import Streams
from headwater.transports.poll import Poll
from headwater.transports.sse import StreamEndpoint

logger = logging.getLogger(__name__)


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


@asynccontextmanager
async def assemble(settings: Settings, telemetry: Telemetry) -> AsyncIterator[Graph]:
    """Make the parts and start those that run. Raises SettingsError and JournalUnavailable."""
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        log = streams.connect(settings.need_redis(), ttl=settings.stream_ttl, lease_seconds=settings.lease_seconds)
        stack.push_async_callback(log.close)
        store = Store(
            settings.need_database(), pool_size=settings.db_pool_size, wait=settings.db_wait, telemetry=telemetry
        )
        stack.push_async_callback(store.close)
        provider = providers.connect(settings)
        stack.push_async_callback(provider.close)
        journal = Journal(settings.journal_file, clock=clock, telemetry=telemetry)
        await journal.open()
        stack.push_async_callback(journal.close)

        overlay = Overlay(store, journal)
        replay = Replay(overlay.run, overlay.message)
        hub = Hub(log, history=replay, telemetry=telemetry, heartbeat=settings.heartbeat)
        syncer = Syncer(journal, store, telemetry=telemetry, clock=clock)
        dispatcher = Dispatcher(make_celery(settings), telemetry=telemetry)
        kinds = {ChatPipeline.kind: ChatPipeline(provider, settings)}
        save = partial(syncer.save, wait=settings.db_wait)
        runner = Runner(log, kinds, save, clock=clock, telemetry=telemetry, settings=settings, known=overlay.run)
        intake = Intake(
            store=store,
            journal=journal,
            save=syncer.save,
            log=log,
            enqueue=dispatcher.enqueue,
            settle=runner.settle,
            pipelines=kinds,
            clock=clock,
            telemetry=telemetry,
            settings=settings,
            away=lambda: syncer.away,
        )
        reading = Reading(store, journal, log)
        sweeper = Sweeper(
            log,
            unfinished=partial(store.runs.unfinished, older_than=settings.queue_grace, limit=500),
            enqueue=dispatcher.enqueue,
            repair=runner.repair,
            clock=clock,
            telemetry=telemetry,
            grace=settings.queue_grace,
        )
        open_streams = Streams(limit=settings.max_streams, telemetry=telemetry)
        stack.callback(open_streams.close)
        checkup = Checkup(
            Probes(settings, log, store, journal, syncer).all(), vital=frozenset({"journal"}), telemetry=telemetry
        )
        stack.push_async_callback(checkup.close)
        await stack.enter_async_context(running(syncer, dispatcher, hub, sweeper))
        await _say_how_it_is(checkup)
        read = _reader(log, replay)
        yield Graph(
            settings=settings,
            telemetry=telemetry,
            clock=clock,
            reading=reading,
            intake=intake,
            streams=open_streams,
            stream=StreamEndpoint(hub, open_streams, may=reading.may_read, read=read),
            poll=Poll(hub, open_streams, may=reading.may_read, read=read),
            checkup=checkup,
            about={"demo": provider.demo, "model": provider.model, "version": version("headwater")},
        )


def _reader(log: StreamLog, replay: Replay) -> Any:
    async def read(run_id: str, after: int, limit: int) -> Page | None:
        page = await log.read(run_id, after, limit)
        if page is not None:
            return page
        told = await replay.page(run_id)
        if told is None:
            return None
        events = [event for event in told.events if event.seq > after][:limit]
        return Page(told.epoch, events, told.count, told.closed)

    return read


async def _say_how_it_is(checkup: Checkup) -> None:
    for name, part in (await checkup.parts()).items():
        if not part["ok"]:
            logger.warning("%s: %s", name, part["detail"])
