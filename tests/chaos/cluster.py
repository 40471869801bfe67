"""Cluster: a whole headwater in real processes, with everything it stands on, to be broken and mended.

    harness ──▶ proxy ──▶ server 1, 2 ─┐               ┌─▶ PostgreSQL (own)
                                       ├─▶ Redis (own) ┤
                          worker 1, 2 ─┘               └─▶ journal (one folder)
                               └────▶ proxy ──▶ scripted provider

Leases and graces are short, so that recovery takes seconds instead of a quarter of a minute.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import psycopg
import redis.asyncio
from psycopg.rows import dict_row

from chaos.history import History
from chaos.proxy import Proxy
from headwater.dev.child import Child
from headwater.dev.services import free_port
from headwater.queue import CHAT_QUEUE, lists_of
from headwater.streams import keys
from support.disk import CannotMount, SmallDisk, mounted
from support.own_postgres import OwnPostgres
from support.own_redis import OwnRedis
from support.stack import Process, Stack
from support.wait import eventually

#: Seconds between signs of life on a quiet stream; a reader that hears nothing for three of them leaves.
HEARTBEAT: Final = 2.0
#: Seconds of a lease, and until a run that nobody claims is enqueued again.
LEASE: Final = 2.5
GRACE: Final = 3.0

SETTINGS: Final[Mapping[str, str]] = {
    "HEADWATER_LEASE_SECONDS": str(LEASE),
    "HEADWATER_QUEUE_GRACE": str(GRACE),
    "HEADWATER_HEARTBEAT": str(HEARTBEAT),
    "HEADWATER_PROVIDER_IDLE": "4",
    "HEADWATER_RUN_DEADLINE": "60",
    "HEADWATER_MAX_ATTEMPTS": "5",
    "HEADWATER_MAX_STREAMS": "5000",
    "HEADWATER_WORKER_CONCURRENCY": "32",
}

_RUNS: Final = """
    SELECT id::text, state, attempt, idempotency_key, error ->> 'code' AS code,
        (extract(epoch FROM started_at) * 1000)::bigint AS started_at,
        (extract(epoch FROM ended_at) * 1000)::bigint AS ended_at
    FROM runs ORDER BY created_at, id
"""
_MESSAGES: Final = """
    SELECT id::text, chat_id::text, role, content, status, run_id::text FROM messages ORDER BY chat_id, created_at, id
"""
#: A traceback up to its last line, which names the exception.
_TRACEBACK: Final = re.compile(r"^Traceback .*\n(?:(?: .*)?\n)+(\S.*)$", re.MULTILINE)
#: Megabytes of a journal's disk, where it has one of its own.
_DISK: Final = 32


class Provider(Child):
    """The scripted model's API in a process of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "provider")
        self.port = free_port()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        tests = Path(__file__).parents[1]
        begin = f"import sys; sys.path.insert(0, {str(tests)!r}); from support.openai_server import main; main()"
        self._spawn([sys.executable, "-c", begin, "--port", str(self.port), "--rate", "40"])
        self._await(self._answers, "The scripted provider")

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class Cluster:
    """Everything that runs. Made by `running`."""

    def __init__(self, folder: Path, hosts: int, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.postgres = OwnPostgres(folder / "postgres")
        self.redis = OwnRedis(folder, {"appendonly": "yes"}, None)
        self.provider = Provider(folder)
        self.provider_proxy = Proxy(("127.0.0.1", self.provider.port))
        self.proxies: list[Proxy] = []
        self.stack: Stack
        #: Processes that ended although nobody ended them: a complaint each.
        self.fallen: list[str] = []
        #: The disks of the journals, where small ones can be mounted.
        self.disks: list[SmallDisk] = []
        #: Faults that cannot be dealt here, and why.
        self.missing: dict[str, str] = {}
        self._supervisor: asyncio.Task[None]
        self._resting: set[Process] = set()
        self._hosts = hosts
        self._settings = {**SETTINGS, **settings}

    @classmethod
    @asynccontextmanager
    async def running(cls, *, hosts: int = 1, settings: Mapping[str, str] | None = None) -> AsyncIterator[Cluster]:
        """Two servers and two workers, on one host or one of each on two: each host has a journal of its own."""
        # Not in pytest's folder: PostgreSQL is another user when we are root and must be let through.
        with tempfile.TemporaryDirectory(prefix="headwater-chaos-", ignore_cleanup_errors=True) as folder:
            cluster = cls(Path(folder), hosts, settings or {})
            async with AsyncExitStack() as stack:
                await cluster._open(stack)
                yield cluster

    async def _open(self, stack: AsyncExitStack) -> None:
        for start, stop in (
            (self.redis.start, self.redis.stop),
            (self.postgres.start, self.postgres.stop),
            (self.provider.start, self.provider.kill),
        ):
            # Before the start: half of one is to be ended as well.
            stack.push_async_callback(asyncio.to_thread, stop)
            await asyncio.to_thread(start)
        folders = [self.folder / "data", self.folder / "data2"][: self._hosts]
        try:
            self.disks += [stack.enter_context(mounted(folder, _DISK)) for folder in folders]
        except CannotMount as error:
            self.missing["journal_full"] = f"a small disk cannot be mounted: {error}"
        await stack.enter_async_context(self.provider_proxy.run())
        self.stack = Stack(
            self.folder,
            redis_url=self.redis.url(),
            database_url=self.postgres.url(),
            openai_url=f"http://127.0.0.1:{self.provider_proxy.port}/v1",
            settings=self._settings,
            servers=2,
            workers=2,
        )
        if self._hosts == 2:
            for process in (self.stack.servers[1], self.stack.workers[1]):
                process.change(HEADWATER_DATA_DIR=str(self.folder / "data2"))
        for server in self.stack.servers:
            proxy = Proxy(("127.0.0.1", server.port))
            self.proxies.append(await stack.enter_async_context(proxy.run()))
        stack.push_async_callback(self.stack.stop)
        await self.stack.start()
        self._supervisor = asyncio.create_task(self._supervise())
        stack.push_async_callback(_cancelled, self._supervisor)

    async def stop(self) -> None:
        """End our processes by SIGTERM. Fails when one has to be killed."""
        await _cancelled(self._supervisor)
        await self.stack.stop()

    @property
    def endpoints(self) -> Sequence[str]:
        """Addresses of the servers, by way of the proxies."""
        return [f"http://127.0.0.1:{proxy.port}" for proxy in self.proxies]

    @property
    def processes(self) -> Sequence[Process]:
        return self.stack.processes

    async def script(self, default: Mapping[str, Any] | None) -> None:
        """What the provider does with every question; None: it answers."""
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self.provider.address}/_script", json={"default": default}) as answer,
        ):
            answer.raise_for_status()

    def rows(self, history: History) -> None:
        """Take what PostgreSQL has into the history."""
        with psycopg.connect(self.postgres.url(), connect_timeout=5, row_factory=dict_row) as connection:
            history.runs = [*connection.execute(_RUNS).fetchall()]
            history.messages = [*connection.execute(_MESSAGES).fetchall()]

    async def whole(self) -> None:
        """Wait until every process takes work again."""
        await asyncio.gather(*(process.ready() for process in self.processes))

    @asynccontextmanager
    async def resting(self, *processes: Process) -> AsyncIterator[None]:
        """Whoever ends these inside the block means it; after it they run again."""
        self._resting.update(processes)
        try:
            yield
        finally:
            for process in processes:
                if not process.running:
                    process.launch()
            self._resting.difference_update(processes)
        await asyncio.gather(*(process.ready() for process in processes))

    async def _supervise(self) -> None:
        """Start again what fell, as whoever runs such a thing would, and note it."""
        while True:
            for process in self.processes:
                if not process.running and process not in self._resting:
                    last = "\n".join(line for line in process.log().splitlines()[-3:])
                    self.fallen.append(f"{process.name} ended by itself with {process.exit_code}: {last}")
                    process.launch()
            await asyncio.sleep(0.2)

    async def settled(self, history: History, timeout: float) -> bool:
        """Wait until every promised run is stored with its end; whether that came within `timeout` seconds."""

        async def ended() -> bool:
            await asyncio.to_thread(self.rows, history)
            states = {row["id"]: row["state"] for row in history.runs}
            return all(states.get(one.run_id) in {"done", "failed", "cancelled"} for one in history.promises) and all(
                state in {"done", "failed", "cancelled"} for state in states.values()
            )

        try:
            await eventually(ended, timeout, every=0.5)
        except AssertionError:
            return False
        return True

    async def autopsy(self, history: History) -> dict[str, Any]:
        """What Redis and the servers say of the runs that have not ended, for whoever looks for the cause."""
        found: dict[str, Any] = {}
        client: Any = redis.asyncio.Redis.from_url(self.redis.url(), socket_timeout=5, decode_responses=True)
        async with client:
            for row in history.runs:
                if row["state"] in {"queued", "running"}:
                    found[row["id"]] = {
                        "row": dict(row),
                        "metadata": await client.hgetall(keys.metadata(row["id"])),
                        "due": await client.zscore(keys.DUE, row["id"]),
                    }
            found["time"] = await client.time()
            lists = lists_of(CHAT_QUEUE, "jobs", "maintenance")
            found["queues"] = {name: count for name in lists if (count := await client.llen(name))}
            found["unacked"] = await client.hkeys("unacked")
            found["clients"] = [one["name"] for one in await client.client_list()]
        async with aiohttp.ClientSession() as http:
            for server in self.stack.servers:
                async with http.get(f"{server.base_url}/api/health") as answer:
                    found[server.name] = await answer.json()
        return found

    def tracebacks(self) -> Counter[str]:
        """How often each exception was logged with its traceback, by process."""
        return Counter(
            f"{process.name}: {last[:200]}"
            for process in self.processes
            for last in _TRACEBACK.findall(process.log_file.read_text(errors="replace"))
        )


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
