"""What every process that knows runs is made of, a server as well as a worker: opened in order on one event loop.

Nothing here needs Redis or PostgreSQL to be there: a process that starts while they are away says so
and does what it can. Only a journal that cannot be used stops the start, because accepting a message
and ending a run mean writing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from celery import Celery

from headwater import pipelines, providers, streams
from headwater.clock import Clock, SystemClock
from headwater.events import Event, EventType
from headwater.ids import new_id
from headwater.journal import Journal
from headwater.overlay import Overlay
from headwater.pipelines.base import Pipeline
from headwater.providers.base import Provider
from headwater.queue import Dispatcher
from headwater.replay import Replay
from headwater.runner import Runner
from headwater.service import Service
from headwater.settings import Settings
from headwater.shares import Shares
from headwater.store import Store
from headwater.streams.base import StreamLog
from headwater.streams.places import Places
from headwater.sweeper import BATCH, Sweeper
from headwater.syncer import Syncer
from headwater.telemetry import Telemetry, arm


@dataclass(frozen=True, slots=True)
class Core:
    """The ways out of a process (Redis, PostgreSQL, the local disk, the model's API) and the parts on them."""

    settings: Settings
    telemetry: Telemetry
    clock: Clock
    log: StreamLog
    store: Store
    journal: Journal
    provider: Provider
    pipelines: Mapping[str, Pipeline]
    syncer: Syncer
    overlay: Overlay
    replay: Replay
    dispatcher: Dispatcher
    shares: Shares
    runner: Runner
    #: In servers as well as in workers: runs are taken over also when the only worker was restarted.
    sweeper: Sweeper

    @property
    def services(self) -> tuple[Service, ...]:
        """What must run beside, in the order of starting."""
        return (self.syncer, self.dispatcher, self.shares, self.sweeper)


async def open_core(settings: Settings, telemetry: Telemetry, celery: Celery, stack: AsyncExitStack) -> Core:
    """Make the parts; `stack` closes them. Nothing runs yet. Raises SettingsError and JournalUnavailable."""
    clock = SystemClock()
    arm(telemetry, settings.failpoint)
    log = streams.connect(
        settings.need_redis(),
        ttl=settings.stream_ttl,
        lease_seconds=settings.lease_seconds,
        compress_over=settings.compress_over,
    )
    stack.push_async_callback(log.close)
    store = Store(settings.need_database(), pool_size=settings.db_pool_size, wait=settings.db_wait, clock=clock)
    stack.push_async_callback(store.close)
    provider = providers.connect(settings, telemetry)
    stack.push_async_callback(provider.close)
    journal = Journal(settings.journal_file, clock=clock, telemetry=telemetry)
    stack.push_async_callback(journal.close)
    await journal.open()
    kinds = pipelines.built_in(provider, settings)
    syncer = Syncer(journal, store, telemetry=telemetry, clock=clock)
    overlay = Overlay(store, journal)
    replay = Replay(overlay.run, overlay.message)
    places = Places(settings.need_redis())
    stack.callback(places.close)
    dispatcher = Dispatcher(celery, telemetry=telemetry, places=places)
    shares = Shares(places, limit=settings.owner_runs, lease_seconds=settings.lease_seconds, ring=dispatcher.enqueue)
    runner = Runner(
        log,
        kinds,
        partial(syncer.keep, wait=settings.db_wait),
        clock=clock,
        telemetry=telemetry,
        settings=settings,
        known=overlay.run,
        requeue=dispatcher.enqueue,
        history=replay.page,
        answered=dispatcher.answered,
        shares=shares,
        promised=journal.cancelled,
    )
    sweeper = Sweeper(
        log,
        unfinished=partial(overlay.unfinished, older_than=settings.queue_grace, limit=BATCH),
        enqueue=dispatcher.enqueue,
        repair=runner.repair,
        cancel=lambda run: runner.settle(run, f"sweeper:{new_id()}", Event(EventType.CANCELLED, {})),
        clock=clock,
        telemetry=telemetry,
        grace=settings.queue_grace,
    )
    return Core(
        settings=settings,
        telemetry=telemetry,
        clock=clock,
        log=log,
        store=store,
        journal=journal,
        provider=provider,
        pipelines=kinds,
        syncer=syncer,
        overlay=overlay,
        replay=replay,
        dispatcher=dispatcher,
        shares=shares,
        runner=runner,
        sweeper=sweeper,
    )
