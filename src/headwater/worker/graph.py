"""The worker's composition root: every part a run needs, made and started in order on one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from celery import Celery

from headwater import providers, streams
from headwater.clock import Clock, SystemClock
from headwater.journal import Journal
from headwater.overlay import Overlay
from headwater.pipelines.base import Pipeline
from headwater.pipelines.chat import ChatPipeline
from headwater.queue import Dispatcher
from headwater.replay import Replay
from headwater.runner import Runner
from headwater.service import running
from headwater.settings import Settings
from headwater.store import Store
from headwater.sweeper import BATCH, Sweeper
from headwater.syncer import Syncer
from headwater.telemetry import Telemetry, arm
from headwater.worker.presence import Presence

logger = logging.getLogger(__name__)

#: Milliseconds a journalled record stays after PostgreSQL has it.
KEEP_SYNCED_MS: Final = 7 * 86_400_000


@dataclass(frozen=True, slots=True)
class Graph:
    """The parts of one worker process."""

    runner: Runner
    syncer: Syncer
    journal: Journal
    clock: Clock

    async def sync(self) -> int:
        """Bring the journal to PostgreSQL and delete what has long been there. Raises StoreUnavailable."""
        applied = await self.syncer.sync()
        await self.journal.prune(self.clock.now_ms() - KEEP_SYNCED_MS)
        return applied


@asynccontextmanager
async def open_graph(settings: Settings, celery: Celery, *, metrics: bool = False) -> AsyncIterator[Graph]:
    """Make and start every part; stop them in reverse order. Raises JournalUnavailable, SettingsError.

    `metrics`: whether HEADWATER_WORKER_METRICS_PORT is for this process.
    """
    telemetry, clock = Telemetry(), SystemClock()
    arm(telemetry, settings.failpoint)
    async with AsyncExitStack() as stack:
        if metrics and settings.worker_metrics_port:
            await _serve_metrics(stack, telemetry, settings)
        log = streams.connect(settings.need_redis(), ttl=settings.stream_ttl, lease_seconds=settings.lease_seconds)
        stack.push_async_callback(log.close)
        journal = Journal(settings.journal_file, clock=clock, telemetry=telemetry)
        stack.push_async_callback(journal.close)
        await journal.open()
        store = Store(settings.need_database(), pool_size=settings.db_pool_size, wait=settings.db_wait)
        stack.push_async_callback(store.close)
        provider = providers.connect(settings, telemetry)
        stack.push_async_callback(provider.close)
        pipelines: dict[str, Pipeline] = {ChatPipeline.kind: ChatPipeline(provider, settings)}
        syncer = Syncer(journal, store, telemetry=telemetry, clock=clock)
        overlay = Overlay(store, journal)
        dispatcher = Dispatcher(celery, telemetry=telemetry)
        runner = Runner(
            log,
            pipelines,
            lambda records: syncer.keep(records, wait=settings.db_wait),
            clock=clock,
            telemetry=telemetry,
            settings=settings,
            known=overlay.run,
            requeue=dispatcher.enqueue,
            history=Replay(overlay.run, overlay.message).page,
        )
        sweeper = Sweeper(
            log,
            unfinished=lambda: overlay.unfinished(older_than=settings.queue_grace, limit=BATCH),
            enqueue=dispatcher.enqueue,
            repair=runner.repair,
            clock=clock,
            telemetry=telemetry,
            grace=settings.queue_grace,
        )
        async with running(syncer, dispatcher, runner.leases, sweeper, Presence(log)):
            yield Graph(runner, syncer, journal, clock)


async def _serve_metrics(stack: AsyncExitStack, telemetry: Telemetry, settings: Settings) -> None:
    host, port = settings.host, settings.worker_metrics_port
    try:
        end = await asyncio.to_thread(telemetry.serve, host, port)
    except OSError as error:
        # Runs matter more than their figures.
        logger.critical(
            "No metrics: HEADWATER_WORKER_METRICS_PORT=%d cannot be bound: %s. Give each worker its own", port, error
        )
        return
    stack.push_async_callback(asyncio.to_thread, end)
    logger.info("metrics at %s port %d", host, port)
