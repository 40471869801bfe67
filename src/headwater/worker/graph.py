"""The worker's composition root: every part a run needs, made and started in order on one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from celery import Celery

from headwater.clock import Clock
from headwater.core import open_core
from headwater.journal import Journal
from headwater.runner import Runner
from headwater.service import running
from headwater.settings import Settings
from headwater.syncer import Syncer
from headwater.telemetry import Telemetry
from headwater.worker.lag import LoopLag
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
        applied = await self.syncer.sync(again=True)
        await self.journal.prune(self.clock.now_ms() - KEEP_SYNCED_MS)
        return applied


@asynccontextmanager
async def open_graph(settings: Settings, celery: Celery, *, metrics: bool = False) -> AsyncIterator[Graph]:
    """Make and start every part; stop them in reverse order. Raises JournalUnavailable, SettingsError.

    `metrics`: whether HEADWATER_WORKER_METRICS_PORT is for this process.
    """
    telemetry = Telemetry()
    async with AsyncExitStack() as stack:
        if metrics and settings.worker_metrics_port:
            await _serve_metrics(stack, telemetry, settings)
        core = await open_core(settings, telemetry, celery, stack)
        async with running(*core.services, core.runner.leases, Presence(core.log), LoopLag(telemetry)):
            yield Graph(core.runner, core.syncer, core.journal, core.clock)


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
