"""A whole headwater for tests: real server and worker processes over real Redis and PostgreSQL.

    stack = Stack(folder, redis_url=…, database_url=…, openai_url=…)
    await stack.start()
    async with stack.client() as http: …
    stack.worker.kill()            # SIGKILL
    await stack.worker.restart()
    await stack.stop()

Each process leads a session of its own and ends with the test's process, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from headwater.dev.services import Postgres, Redis, free_port
from headwater.settings import child_environment
from headwater.store import migrate

from .wait import eventually

#: Seconds a process may take until it answers; generous, as the machine may be busy.
READY_TIMEOUT = 120.0
#: Seconds a process may take to end after SIGTERM before a test calls it stuck.
STOP_TIMEOUT = 30.0
#: The last line a worker writes before it takes work.
WORKER_READY = re.compile(r"\bready\.?$", re.MULTILINE)


class Process:
    """One headwater process. Its output goes to a file, which every further life continues."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        self._command = [sys.executable, "-P", "-m", "headwater", *arguments, "--parent", str(os.getpid())]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._begins = 0

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """As of Popen: negative for a signal; None while it runs."""
        return self._process.poll() if self._process else None

    def log(self) -> str:
        """What its present life has written."""
        return self.log_file.read_bytes()[self._begins :].decode(errors="replace") if self.log_file.exists() else ""

    def change(self, **settings: str | None) -> None:
        """Settings of its further lives; None takes one away."""
        merged: dict[str, str | None] = {**self._environment, **settings}
        self._environment = {name: value for name, value in merged.items() if value is not None}

    def launch(self) -> None:
        """Start it and return at once."""
        assert not self.running, f"{self.name} runs already"
        self._begins = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ready(self) -> None:
        """Wait until it takes work. Fails with its log when it ended instead."""

        async def answers() -> bool:
            if not self.running:
                raise ChildProcessError(f"{self.name} ended with {self.exit_code}:\n{self.log()[-4000:]}")
            return await self._answers()

        await eventually(answers, READY_TIMEOUT, every=0.05)

    async def start(self) -> None:
        self.launch()
        await self.ready()

    async def restart(self) -> None:
        """Start it again, after it was ended in whatever way."""
        await self.terminate()
        await self.start()

    async def terminate(self, timeout: float = STOP_TIMEOUT) -> None:
        """SIGTERM, and wait for the end. Fails when it does not come."""
        if self._process is None or not self.running:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end in {timeout:g} s:\n{self.log()[-4000:]}") from None

    def kill(self) -> None:
        """SIGKILL to it and to what it started, and wait for the end."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def signal(self, sign: signal.Signals) -> None:
        """E.g. SIGSTOP, SIGCONT."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sign)

    async def _answers(self) -> bool:
        raise NotImplementedError


class ServerProcess(Process):
    """A web server on a port of its own, which it keeps from life to life."""

    def __init__(self, name: str, environment: dict[str, str], folder: Path) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        super().__init__(name, ["server", "--host", "127.0.0.1", "--port", str(self.port)], environment, folder)

    async def _answers(self) -> bool:
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                return (await http.get(f"{self.base_url}/readyz", timeout=20)).status_code == 200
            except httpx.TransportError:
                return False


class WorkerProcess(Process):
    """A Celery worker."""

    def __init__(self, name: str, environment: dict[str, str], folder: Path) -> None:
        super().__init__(name, ["worker", "--name", f"{name}@%h"], environment, folder)

    async def _answers(self) -> bool:
        return WORKER_READY.search(self.log()) is not None


class BeatProcess(Process):
    """The clock of the periodic jobs."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        super().__init__("beat", ["beat"], environment, folder)

    async def _answers(self) -> bool:
        return "beat: Starting" in self.log()


class Stack:
    """Servers and workers that share a Redis, a database and a journal. Nothing runs until `start`."""

    def __init__(
        self,
        folder: Path,
        *,
        redis_url: str,
        database_url: str,
        openai_url: str | None = None,
        settings: Mapping[str, str] | None = None,
        servers: int = 1,
        workers: int = 1,
        beat: bool = False,
    ) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.database_url = database_url
        self.environment = child_environment(
            REDIS_URL=redis_url,
            DATABASE_URL=database_url,
            HEADWATER_DATA_DIR=str(folder / "data"),
            OPENAI_BASE_URL=openai_url,
            # What the machine's own environment says must not reach a test.
            **{
                **dict.fromkeys(("OPENAI_API_KEY", "HEADWATER_ACCESS_TOKEN", "HOST", "PORT", "DEBUG")),
                **(settings or {}),
            },
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.servers = [ServerProcess(f"server{n}", self.environment, folder) for n in range(1, servers + 1)]
        self.workers = [WorkerProcess(f"worker{n}", self.environment, folder) for n in range(1, workers + 1)]
        self.beat = BeatProcess(self.environment, folder) if beat else None
        #: Servers that belong to this stack alone and end with it.
        self.redis_server: Redis | None = None
        self.postgres_server: Postgres | None = None

    @property
    def server(self) -> ServerProcess:
        return self.servers[0]

    @property
    def worker(self) -> WorkerProcess:
        return self.workers[0]

    @property
    def base_url(self) -> str:
        """The first server's address, without a slash at the end."""
        return self.server.base_url

    @property
    def processes(self) -> list[Process]:
        return [*self.servers, *self.workers, *([self.beat] if self.beat else [])]

    def client(self, server: int = 0) -> httpx.AsyncClient:
        """An HTTP client of one of the servers."""
        return httpx.AsyncClient(base_url=self.servers[server].base_url, timeout=60, trust_env=False)

    async def start(self) -> None:
        """Start everything and wait until it takes work."""
        for process in self.processes:
            process.launch()
        await asyncio.gather(*(process.ready() for process in self.processes))

    async def stop(self) -> None:
        """End everything. Fails when a process has to be killed."""
        try:
            results = await asyncio.gather(*(process.terminate() for process in self.processes), return_exceptions=True)
        finally:
            for process in self.processes:
                process.kill()
            if self.redis_server is not None:
                self.redis_server.stop()
            if self.postgres_server is not None:
                self.postgres_server.stop()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def tail(self, lines: int = 40) -> str:
        """The end of every log, for a report on a test that failed."""
        parts = []
        for process in self.processes:
            text = process.log_file.read_text(errors="replace") if process.log_file.exists() else ""
            state = "runs" if process.running else f"ended with {process.exit_code}"
            parts.append(f"── {process.name} ({state}, {process.log_file})\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(parts)


class StackMaker:
    """Makes running stacks over one PostgreSQL, each with a database and a Redis of its own."""

    def __init__(
        self, folder: Path, postgres: Postgres, new_database: Callable[[], str], openai_url: str, numbers: Any = None
    ) -> None:
        self._folder = folder
        self._postgres = postgres
        self._new_database = new_database
        self._openai_url = openai_url
        self._numbers = numbers or itertools.count(1)
        self.made: list[Stack] = []

    def fresh(self) -> StackMaker:
        """The same, with nothing made yet."""
        return StackMaker(self._folder, self._postgres, self._new_database, self._openai_url, self._numbers)

    async def __call__(self, *, own_postgres: bool = False, start: bool = True, **options: Any) -> Stack:
        """A stack with these options of Stack; started, unless told not to."""
        folder = self._folder / str(next(self._numbers))
        # A Redis of its own, because other tests flush theirs.
        redis = Redis(folder / "redis", options={"appendonly": "no"})
        redis.start()
        postgres = None
        if own_postgres:
            postgres = Postgres(folder / "postgres", options={"fsync": "off"})
            postgres.start()
            await asyncio.to_thread(migrate.init, postgres.url())
        options.setdefault("openai_url", self._openai_url)
        url = postgres.url() if postgres else self._postgres.url(self._new_database())
        stack = Stack(folder, redis_url=redis.url(), database_url=url, **options)
        stack.redis_server, stack.postgres_server = redis, postgres
        self.made.append(stack)
        if start:
            await stack.start()
        return stack

    async def stop(self) -> None:
        """End everything that was made. Fails when something had to be killed, after all has ended."""
        results = await asyncio.gather(*(stack.stop() for stack in self.made), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
