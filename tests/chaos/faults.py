"""Faults: what can break in a cluster, each with a name. Entering one breaks, leaving it mends."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson
import psycopg
import redis.asyncio

from chaos.cluster import LEASE, Cluster
from headwater.queue import CHAT_QUEUE, RUN_TASK, lists_of, make_celery
from headwater.runs import Run
from headwater.settings import load_settings
from support.openai_scenarios import builtin_scenarios
from support.own_redis import frozen
from support.stack import Process

Break = Callable[[Cluster, random.Random], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break. Two faults of the same part never hold at once."""

    name: str
    part: str
    #: Seconds it lasts: least and most.
    lasts: tuple[float, float]
    hold: Break


FAULTS: Final[dict[str, Fault]] = {}
#: Seconds after SIGTERM in which a process ends also on a machine with much else to do; after them it is stuck.
ENDS: Final = 30.0


def fault(part: str, least: float = 0.0, most: float = 0.0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an async generator function of the cluster and a source of chance: broken up to its yield."""

    def register(act: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS[act.__name__] = Fault(act.__name__, part, (least, most), asynccontextmanager(act))
        return act

    return register


# --- our own processes -------------------------------------------------------------------------


@fault("workers", 0, 3)
async def worker_killed(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    worker = chance.choice(cluster.stack.workers)
    async with cluster.resting(worker):
        worker.kill()
        yield


@fault("workers", 0, 3)
async def all_workers_killed(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    async with cluster.resting(*cluster.stack.workers):
        for worker in cluster.stack.workers:
            worker.kill()
        yield


@fault("workers", 0, 2)
async def worker_terminated(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    worker = chance.choice(cluster.stack.workers)
    async with cluster.resting(worker):
        # Fails when it does not end in time.
        await worker.terminate(ENDS)
        yield


@fault("workers", LEASE * 1.5, LEASE * 3)
async def worker_frozen(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    async with _frozen(chance.choice(cluster.stack.workers)):
        yield


@fault("servers", 0, 3)
async def server_killed(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    server = chance.choice(cluster.stack.servers)
    async with cluster.resting(server):
        server.kill()
        yield


@fault("servers", 0, 2)
async def server_terminated(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    server = chance.choice(cluster.stack.servers)
    async with cluster.resting(server):
        await server.terminate(ENDS)
        yield


@fault("servers", 2, 8)
async def server_frozen(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    async with _frozen(chance.choice(cluster.stack.servers)):
        yield


# --- Redis -------------------------------------------------------------------------------------


@fault("redis", 0, 3)
async def redis_killed(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    cluster.redis.kill()
    yield
    await asyncio.to_thread(cluster.redis.start)


@fault("redis", 0, 2)
async def redis_restarted_empty(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    cluster.redis.kill()
    cluster.redis.forget()
    yield
    await asyncio.to_thread(cluster.redis.start)


@fault("redis")
async def redis_flushed(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    await _redis(cluster, "FLUSHALL")
    yield


@fault("redis", 1, 6)
async def redis_frozen(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    with frozen(cluster.redis):
        yield


@fault("redis", 1, 4)
async def redis_full(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    await _redis(cluster, "CONFIG", "SET", "maxmemory", "1")
    yield
    await _redis(cluster, "CONFIG", "SET", "maxmemory", "0")


@fault("redis")
async def redis_pubsub_cut(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    for _ in range(chance.randrange(1, 6)):
        await _redis(cluster, "CLIENT", "KILL", "TYPE", "pubsub")
        await asyncio.sleep(chance.uniform(0, 0.3))
    yield


@fault("redis")
async def redis_scripts_forgotten(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    await _redis(cluster, "SCRIPT", "FLUSH")
    yield


@fault("redis")
async def orders_lost(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    """The broker loses what waits, as it may between taking an order from the list and noting who took it."""
    for _ in range(20):
        await _redis(cluster, "DEL", *lists_of(CHAT_QUEUE))
        await asyncio.sleep(0.05)
    yield


@fault("redis")
async def orders_doubled(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    """Every run that Redis knows is ordered again, twice."""
    runs = await _runs(cluster)
    await asyncio.to_thread(_order, cluster, [run for run in runs for _ in range(2)])
    yield


# --- PostgreSQL --------------------------------------------------------------------------------


@fault("postgres", 1, 8)
async def postgres_frozen(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    with cluster.postgres.frozen():
        yield


@fault("postgres", 0, 6)
async def postgres_killed(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    await asyncio.to_thread(cluster.postgres.kill)
    yield
    await asyncio.to_thread(cluster.postgres.start)


@fault("postgres", 1, 6)
async def postgres_locked(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    connection = await psycopg.AsyncConnection.connect(cluster.postgres.url())
    async with connection:
        await connection.execute("LOCK TABLE messages, runs IN ACCESS EXCLUSIVE MODE")
        yield


@fault("postgres", 1, 6)
async def postgres_read_only(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    await _postgres(cluster, "ALTER SYSTEM SET default_transaction_read_only = on")
    yield
    await _postgres(cluster, "ALTER SYSTEM RESET default_transaction_read_only")


# --- the journal ---------------------------------------------------------------------------


@fault("journal", 1, 6)
async def journal_full(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    """Not a byte is left on the disk of one host's journal."""
    disk = chance.choice(cluster.disks)
    disk.fill()
    yield
    disk.give_back()


# --- the network -------------------------------------------------------------------------------


@fault("network")
async def connections_cut(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    for _ in range(chance.randrange(1, 8)):
        for proxy in cluster.proxies:
            proxy.cut()
        await asyncio.sleep(chance.uniform(0, 0.5))
    yield


@fault("network", 2, 6)
async def connections_cut_after_bytes(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    for proxy in cluster.proxies:
        proxy.cut()
        proxy.cut_after = chance.randrange(100, 3000)
    yield
    for proxy in cluster.proxies:
        proxy.cut_after = None


@fault("network", 2, 6)
async def server_unreachable(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    proxy = chance.choice(cluster.proxies)
    proxy.refusing = True
    proxy.cut()
    yield
    proxy.refusing = False


@fault("network", 1, 8)
async def network_stalled(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    """Connections stand, nothing moves: replies are late or never come."""
    proxy = chance.choice(cluster.proxies)
    proxy.flowing.clear()
    yield
    proxy.flowing.set()


# --- the model's API ---------------------------------------------------------------------------


@fault("provider", 0.5, 4)
async def provider_refuses(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    await cluster.script(asdict(builtin_scenarios()[chance.choice(("busy", "down"))]))
    yield
    await cluster.script(None)


@fault("provider", 1, 7)
async def provider_stalled(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    cluster.provider_proxy.flowing.clear()
    yield
    cluster.provider_proxy.flowing.set()


@fault("provider")
async def provider_cut(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    cluster.provider_proxy.cut()
    yield


# --- more of the same --------------------------------------------------------------------------


@fault("syncers")
async def two_more_syncers(cluster: Cluster, chance: random.Random) -> AsyncIterator[None]:
    """Beside those of every server and worker."""
    command = [sys.executable, "-m", "headwater", "journal", "sync"]
    environment = cluster.stack.environment
    quiet = asyncio.subprocess.DEVNULL
    syncers = [
        await asyncio.create_subprocess_exec(*command, env=environment, stdout=quiet, stderr=quiet) for _ in range(2)
    ]
    for syncer in syncers:
        await syncer.wait()
    yield


# --- how ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _frozen(process: Process) -> AsyncIterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


async def _redis(cluster: Cluster, *command: Any) -> Any:
    client: Any = redis.asyncio.Redis.from_url(cluster.redis.url(), socket_timeout=5)
    async with client:
        return await client.execute_command(*command)


async def _runs(cluster: Cluster) -> list[Run]:
    client: Any = redis.asyncio.Redis.from_url(cluster.redis.url(), socket_timeout=5)
    async with client:
        keys = [key async for key in client.scan_iter(match="stream:{*}:run")]
        raws = await client.mget(keys) if keys else []
    return [Run.from_json(orjson.loads(raw)) for raw in raws if raw is not None]


def _order(cluster: Cluster, runs: list[Run]) -> None:
    settings = load_settings(_env_file=None, REDIS_URL=cluster.redis.url())
    with make_celery(settings) as celery:
        for run in runs:
            celery.send_task(RUN_TASK, args=[run.to_json()], task_id=run.id, queue=CHAT_QUEUE, ignore_result=True)


async def _postgres(cluster: Cluster, statement: str) -> None:
    connection = await psycopg.AsyncConnection.connect(cluster.postgres.url(), autocommit=True)
    async with connection:
        await connection.execute(statement.encode())
        await connection.execute("SELECT pg_reload_conf()")
        with suppress(psycopg.Error):
            # Sessions learn of it at their next transaction; ours need not wait for that.
            await connection.execute("SELECT 1")
