"""The hub over a real Redis whose connections and whole life are cut while readers follow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from headwater.errors import LogLost
from headwater.events import Cursor, Event
from headwater.hub import Hub, Subscription
from headwater.streams import keys
from headwater.streams.batch import Batch
from headwater.streams.feed import RedisFeed
from headwater.streams.redis import RedisStreamLog
from headwater.telemetry import Telemetry
from support.own_redis import OwnRedis, frozen, own_redis
from support.streams import RedisWorld, end, new_run, numbered, seqs
from support.wait import eventually

#: Seconds for a whole stream, faults and all.
BOUND = 60


class Counted(Telemetry):
    def value(self, name: str) -> float:
        return self.registry.get_sample_value(name) or 0.0


@asynccontextmanager
async def a_hub(url: str, **settings: float) -> AsyncIterator[tuple[Hub, Counted]]:
    """A process of its own, with its own connections."""
    log, telemetry = RedisStreamLog(url, ttl=3600, lease_seconds=10), Counted()
    hub = Hub(log, history=None, telemetry=telemetry, **settings)  # type: ignore[arg-type]
    await hub.start()
    try:
        yield hub, telemetry
    finally:
        await hub.stop()
        await log.close()


async def rest(reader: Subscription, resets: list[str] | None = None) -> list[Event]:
    """Events to the end of the stream, from the last reset on."""
    events: list[Event] = []
    async with asyncio.timeout(BOUND):
        while (batch := await reader.next()) is not None:
            if batch.reset:
                assert resets is not None
                resets.append(batch.epoch)
                events.clear()
            events += batch.events
    return events


async def take(reader: Subscription, last: int) -> None:
    async with asyncio.timeout(BOUND):
        while (batch := await reader.next()) is not None:
            if batch.events and batch.events[-1].seq >= last:
                return
    raise AssertionError("the stream ended")


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[RedisWorld]:
    world = RedisWorld(redis_url)
    yield world
    await world.close()


async def test_readers_of_several_processes_get_the_same_from_wherever_they_join(world: RedisWorld) -> None:
    run = new_run()
    async with a_hub(world.url) as (one, _), a_hub(world.url) as (two, _):
        lease = await world.log.claim(run, "worker")
        following: list[asyncio.Task[list[Event]]] = []
        for seq in range(1, 301):
            if seq % 20 == 1:
                # At the same moment on both, from the beginning and from the middle.
                for hub, after in ((one, 0), (two, 0), (one, seq // 2), (two, seq - 1)):
                    reader = hub.subscribe(run.id, Cursor(lease.epoch, after))
                    following.append(asyncio.create_task(rest(reader), name=str(after)))
            await world.log.append(lease, numbered(seq, seq))
        await world.log.append(lease, [end(301)])
        for task in following:
            assert seqs(await task) == list(range(int(task.get_name()) + 1, 302))


async def test_cutting_the_push_again_and_again_loses_nothing(world: RedisWorld) -> None:
    run = new_run()
    async with a_hub(world.url) as (hub, telemetry):
        readers = [hub.subscribe(run.id, None) for _ in range(3)]
        following = [asyncio.create_task(rest(reader)) for reader in readers]
        lease = await world.log.claim(run, "worker")
        cuts = 0.0

        def cut() -> bool:
            return telemetry.value("headwater_hub_reconnects_total") > cuts

        for seq in range(1, 401):
            await world.log.append(lease, numbered(seq, seq))
            if seq % 80 == 40:
                cuts = telemetry.value("headwater_hub_reconnects_total")
                # It may just be connecting after the last cut; then there is nothing to kill.
                if await world.raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub"):
                    await eventually(cut)
        await world.log.append(lease, [end(401)])
        for task in following:
            assert seqs(await task) == list(range(1, 402))
        assert telemetry.value("headwater_hub_reconnects_total") >= 1


async def test_a_reader_that_never_reads_is_bounded_and_gets_everything_in_the_end(world: RedisWorld) -> None:
    run = new_run()
    async with a_hub(world.url, max_pending=4_096) as (hub, _):
        slow, quick = hub.subscribe(run.id, None), hub.subscribe(run.id, None)
        following = asyncio.create_task(rest(quick))
        lease = await world.log.claim(run, "worker")
        for first in range(1, 3_001, 10):
            await world.log.append(lease, numbered(first, first + 9))
            assert slow._pending_bytes <= 4_096
        await world.log.append(lease, [end(3_001)])
        assert seqs(await following) == list(range(1, 3_002))
        assert seqs(await rest(slow)) == list(range(1, 3_002))


async def test_channels_come_and_go_with_their_readers(world: RedisWorld) -> None:
    runs = [new_run() for _ in range(3)]
    async with a_hub(world.url) as (hub, telemetry):
        readers = [hub.subscribe(run.id, None) for run in runs for _ in range(2)]

        async def channels() -> list[str]:
            return sorted(await world.raw.pubsub_channels("stream:*"))

        async def all_there() -> bool:
            return await channels() == sorted(f"stream:{{{run.id}}}" for run in runs)

        async def one_left() -> bool:
            return await channels() == [f"stream:{{{runs[0].id}}}"]

        await eventually(all_there)
        assert telemetry.value("headwater_readers") == 6
        # However many run and however many read them: one connection.
        assert len([client for client in await world.raw.client_list() if client["name"] == "headwater-feed"]) == 1
        for reader in readers[1:]:
            reader.close()
        await eventually(one_left)
        assert telemetry.value("headwater_readers") == 1


async def test_a_server_that_restarts_empty_and_a_worker_that_is_gone_mean_a_reset(tmp_path: Path) -> None:
    with own_redis(tmp_path) as server:
        world, run = RedisWorld(server.url()), new_run()
        async with a_hub(server.url(), watchdog=0.5) as (hub, _):
            reader = hub.subscribe(run.id, None)
            first = await world.written(run, 5, "one")
            await take(reader, 5)
            server.restart()
            second = await world.log.claim(new_run(id=run.id, attempt=1), "two")
            await world.log.append(second, [*numbered(1, 2, "again "), end(3)])
            resets: list[str] = []
            events = await rest(reader, resets)
            assert resets == [second.epoch] != [first.epoch]
            assert events == [*numbered(1, 2, "again "), end(3)]
        await world.close()


async def test_a_server_that_restarts_empty_and_a_worker_that_still_holds_the_run_go_on_as_if_nothing_happened(
    tmp_path: Path,
) -> None:
    with own_redis(tmp_path) as server:
        world, run = RedisWorld(server.url()), new_run()
        async with a_hub(server.url(), watchdog=0.5) as (hub, _):
            reader, late = hub.subscribe(run.id, None), hub.subscribe(run.id, None)
            lease = await world.written(run, 5)
            await take(reader, 5)
            server.restart()
            await world.log.restore(lease, run, numbered(1, 8))
            await world.log.append(lease, [end(9)])
            assert seqs(await rest(reader)) == [6, 7, 8, 9]
            assert seqs(await rest(late)) == list(range(1, 10))
        await world.close()


@asynccontextmanager
async def failing_over(folder: Path, run_id: str) -> AsyncIterator[tuple[OwnRedis, Callable[[], Awaitable[None]]]]:
    """A server with a replica. The first call cuts the two apart, the second has the replica take its place."""
    with (
        own_redis(folder / "one", **{"repl-diskless-sync-delay": "0"}) as master,
        own_redis(folder / "two", replicaof=f"127.0.0.1 {master.port}") as replica,
    ):
        async with Redis.from_url(replica.url()) as raw:

            async def has_all() -> bool:
                return int(await raw.llen(keys.chunks(run_id))) == 5

            async def cut_apart() -> None:
                await eventually(has_all, BOUND)
                await raw.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]

            async def exchange() -> None:
                master.kill()
                await raw.execute_command("CONFIG", "SET", "port", master.port)  # type: ignore[no-untyped-call]

            steps = iter((cut_apart, exchange))
            yield master, lambda: next(steps)()


async def test_a_replica_that_takes_over_without_the_newest_events_gets_them_from_the_worker(tmp_path: Path) -> None:
    run = new_run()
    async with failing_over(tmp_path, run.id) as (master, go_on):
        world = RedisWorld(master.url())
        async with a_hub(master.url(), watchdog=0.5) as (hub, _):
            reader, late = hub.subscribe(run.id, None), hub.subscribe(run.id, None)
            lease = await world.written(run, 5)
            await go_on()
            await world.log.append(lease, numbered(6, 9))
            await take(reader, 9)
            await go_on()
            with pytest.raises(LogLost):
                await world.log.append(lease, numbered(10, 10))
            await world.log.restore(lease, run, numbered(1, 10))
            await world.log.append(lease, [end(11)])
            assert seqs(await rest(reader)) == [10, 11]
            assert seqs(await rest(late)) == list(range(1, 12))
        await world.close()


async def test_a_replica_that_takes_over_without_the_newest_events_of_a_worker_that_is_gone_means_a_reset(
    tmp_path: Path,
) -> None:
    run = new_run()
    async with failing_over(tmp_path, run.id) as (master, go_on):
        world = RedisWorld(master.url())
        brief = world.another(lease_seconds=0.1)
        async with a_hub(master.url(), watchdog=0.5) as (hub, _):
            reader = hub.subscribe(run.id, None)
            first = await brief.claim(run, "one")
            await brief.append(first, numbered(1, 5))
            await go_on()
            await brief.append(first, numbered(6, 9))
            await take(reader, 9)
            away = Cursor(first.epoch, 9)
            await go_on()
            await world.lease_runs_out(run.id)
            # More than was lost, so that nothing but the epoch tells a reader at 9 that these are others.
            second = await world.log.claim(new_run(id=run.id, attempt=1), "two")
            await world.log.append(second, [*numbered(second.length + 1, 20, "again "), end(21)])
            told = [*numbered(second.length + 1, 20, "again "), end(21)]
            for each in (reader, hub.subscribe(run.id, away)):
                resets: list[str] = []
                assert await rest(each, resets) == told
                assert resets == [second.epoch] != [first.epoch]
        await world.close()


async def test_readers_wait_while_the_server_is_frozen_and_then_go_on(tmp_path: Path) -> None:
    with own_redis(tmp_path) as server:
        world, run = RedisWorld(server.url()), new_run()
        async with a_hub(server.url(), watchdog=0.5, heartbeat=0.3) as (hub, _):
            reader = hub.subscribe(run.id, None)
            lease = await world.written(run, 5)
            await take(reader, 5)
            with frozen(server):
                late = hub.subscribe(run.id, Cursor(lease.epoch, 2))
                for waiting in (reader, late):
                    async with asyncio.timeout(BOUND):
                        beat = await waiting.next()
                    assert beat is not None
                    assert (list(beat.events), beat.reset) == ([], False)
            await world.log.append(lease, [*numbered(6, 6), end(7)])
            assert seqs(await rest(reader)) == [6, 7]
            assert seqs(await rest(late)) == [3, 4, 5, 6, 7]
        await world.close()


class Ear:
    def __init__(self) -> None:
        self.told: list[str] = []

    def subscribed(self) -> None:
        self.told.append("subscribed")

    def published(self, batch: Batch) -> None:
        self.told.append("published")

    def lost(self) -> None:
        self.told.append("lost")


async def test_a_feed_notices_a_frozen_server_by_its_silence_and_confirms_anew_afterwards(tmp_path: Path) -> None:
    with own_redis(tmp_path) as server:
        ear, feed = Ear(), RedisFeed(server.url(), ping_after=0.1, dead_after=0.5)
        await feed.start(ear.lost)
        feed.follow("run", ear)
        await eventually(lambda: ear.told == ["subscribed"])
        with frozen(server):
            await eventually(lambda: ear.told == ["subscribed", "lost"])
        await eventually(lambda: ear.told[-2:] == ["lost", "subscribed"])
        await feed.stop()


async def test_a_quiet_connection_is_kept_by_its_pings(tmp_path: Path) -> None:
    with own_redis(tmp_path) as server:
        world, ear = RedisWorld(server.url()), Ear()
        feed = RedisFeed(server.url(), ping_after=0.02, dead_after=0.3)
        await feed.start(ear.lost)
        feed.follow("run", ear)

        async def pings() -> int:
            stats = await world.raw.info("commandstats")
            return int(stats.get("cmdstat_ping", {}).get("calls", 0))

        begun = await pings()

        async def many_pings() -> bool:
            return await pings() > begun + 30

        # More of them than fit into the time after which silence counts as death.
        await eventually(many_pings)
        assert ear.told == ["subscribed"]
        await feed.stop()
        await world.close()


async def test_a_feed_that_may_not_sign_in_says_so_and_tries_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with own_redis(tmp_path) as server:
        world, ear = RedisWorld(server.url()), Ear()
        await world.raw.config_set("requirepass", "right")
        feed = RedisFeed(server.url().replace("redis://", "redis://:wrong@"), ping_after=0.1)
        with caplog.at_level(logging.WARNING):
            await feed.start(ear.lost)
            feed.follow("run", ear)
            await eventually(lambda: "WRONGPASS" in caplog.text)
        await world.raw.config_set("requirepass", "wrong")
        await eventually(lambda: ear.told == ["subscribed"])
        await feed.stop()
        await world.close()


async def test_a_feed_started_before_its_server_connects_when_it_is_there(tmp_path: Path) -> None:
    with own_redis(tmp_path) as server:
        server.stop()
        ear, feed = Ear(), RedisFeed(server.url())
        await feed.start(ear.lost)
        feed.follow("run", ear)
        server.start()
        await eventually(lambda: ear.told == ["subscribed"])
        await feed.stop()
