"""`headwater up`: everything on one machine, in one log, ended together.

    port ─▶ data folder ─▶ PostgreSQL + Redis ─▶ schema ─▶ worker, beat, server ─▶ ready
    server ─▶ worker, beat ─▶ Redis ─▶ PostgreSQL                                 at the end

What can be known to fail is tried before anything is started. DATABASE_URL and REDIS_URL, when
given, are used and nothing is embedded for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import signal
import socket
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from headwater.dev.console import Console
from headwater.dev.part import Part, Program, Server, server_programs, worker_programs
from headwater.dev.place import Place
from headwater.dev.ports import listen_each
from headwater.dev.services import Postgres, Redis
from headwater.errors import HeadwaterError
from headwater.note import Note
from headwater.settings import Settings, child_environment

#: Seconds each part may take to end; together less than ten.
GRACE: Final = {"server": 3.0, "worker": 3.0, "beat": 2.0, "redis": 1.0, "postgres": 2.0}
#: Seconds the programs may take from their start until they answer.
READY_TIMEOUT: Final = 60.0
_BEAT_READY: Final = re.compile(r"beat: Starting")


class NotReady(HeadwaterError):
    """The parts run but do not answer in time. The message says which."""

    code = "not_ready"


@dataclass(slots=True)
class _Running:
    """What is up so far, to be taken down again."""

    listeners: list[socket.socket] = field(default_factory=list)
    place: Place | None = None
    #: In the order they were started.
    parts: list[Part] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Stack:
    """One `headwater up`, from start to end."""

    def __init__(self, settings: Settings, console: Console, *, beat: bool = True) -> None:
        self._settings = settings
        self._console = console
        self._beat = beat
        self._up = _Running()
        self._stop = asyncio.Event()
        self._stop_reason = ""

    async def run(self) -> None:
        """Start everything, stay until a signal, end everything. Raises HeadwaterError when a part cannot start."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # `nohup` ignores SIGHUP on purpose.
            if signal.getsignal(sign) is not signal.SIG_IGN or sign is not signal.SIGHUP:
                loop.add_signal_handler(sign, self._signalled, sign)
        try:
            await self._until_stopped(self._start())
            await self._until_stopped(self._watch())
        finally:
            if self._stop_reason:
                self._console.say("up", f"{self._stop_reason}: ending everything; once more ends it at once")
            await self._take_down()

    def _signalled(self, sign: signal.Signals) -> None:
        if self._stop.is_set():
            self._console.say("up", f"{sign.name} again: everything is killed", "warning")
            for part in self._up.parts:
                part.kill()
        self._stop_reason = sign.name
        self._stop.set()

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """The work, given up when a signal comes or a part fails for good."""
        if self._stop.is_set():
            work.close()
            return
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        try:
            while not task.done() and not stop.done():
                done, _ = await asyncio.wait(
                    {task, stop, *self._up.tasks}, return_when=asyncio.FIRST_COMPLETED, timeout=0.5
                )
                for finished in done - {task, stop}:
                    # A supervision that ends before the stop ends with a PartFailed.
                    finished.result()
            if task.done():
                task.result()
        finally:
            for each in (task, stop):
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError, HeadwaterError):
                    await each

    async def _start(self) -> None:
        begun = asyncio.get_running_loop().time()
        settings = self._settings
        settings.check_exposed()
        self._up.listeners = listeners = listen_each(settings.host, settings.port, settings.server_workers)
        self._up.place = place = Place.hold(settings.data_dir)
        redis_url, database_url = await self._servers(place)
        url = _address(settings.host, listeners[0])
        place.write_note(Note(pid=os.getpid(), url=url, redis_url=redis_url, database_url=database_url))
        environment = self._programs(listeners, redis_url, database_url)
        await self._all_ready()
        self._banner(url, asyncio.get_running_loop().time() - begun)
        if self._beat:
            # Nobody waits for the periodic jobs, so they do not compete with what people wait for.
            self._supervise(Program("beat", ["beat"], environment, self._console, ready_line=_BEAT_READY))

    async def _servers(self, place: Place) -> tuple[str, str]:
        """The URLs of Redis and PostgreSQL, both answering and the schema up to date."""
        given_redis, given_postgres = self._settings.redis_url, self._settings.database_url
        # Those that were given first: it is cheap to say that one does not answer while nothing else runs.
        if given_redis is not None:
            await self._reach(given_redis)
        if given_postgres is not None:
            await self._schema(given_postgres.get_secret_value(), embedded=False)
        servers: list[Server] = []
        redis = Redis(place.folder / "redis", password=place.secret("redis-password"))
        if given_redis is None:
            servers.append(Server("redis", redis, self._console))
        postgres = Postgres(place.folder / "postgres")
        if given_postgres is None:
            servers.append(Server("postgres", postgres, self._console))
        self._up.parts.extend(servers)
        # The schema's library takes longer to import than the servers to start, so it is imported beside.
        library = asyncio.to_thread(importlib.import_module, "headwater.store.migrate")
        await asyncio.gather(*(self._begin(server) for server in servers), library)
        if given_postgres is None:
            await self._schema(postgres.url(), embedded=True)
        return given_redis or redis.url(), given_postgres.get_secret_value() if given_postgres else postgres.url()

    async def _begin(self, server: Server) -> None:
        begun = asyncio.get_running_loop().time()
        await server.start()
        took = asyncio.get_running_loop().time() - begun
        self._console.say(
            server.name, f"ready in {took:.1f} s (process {server.child.pid}, log {server.child.log_file})"
        )
        if isinstance(server.child, Postgres) and server.child.opened:
            folders = ", ".join(str(folder) for folder in server.child.opened)
            self._console.say(
                server.name,
                f"does not run as root, so other users may pass through (chmod o+x, not list) from now on: {folders}",
                "warning",
            )
        self._up.tasks.append(asyncio.create_task(server.supervise(), name=server.name))

    async def _reach(self, redis_url: str) -> None:
        from headwater.streams.probe import redis_facts

        facts = await redis_facts(redis_url)
        self._console.say("redis", f"REDIS_URL answers (version {facts.version})")

    async def _schema(self, database_url: str, *, embedded: bool) -> None:
        from headwater.store import migrate

        await asyncio.to_thread(migrate.init if embedded else migrate.upgrade, database_url)
        if not embedded:
            self._console.say("postgres", "DATABASE_URL answers, its schema is up to date")

    def _programs(self, listeners: list[socket.socket], redis_url: str, database_url: str) -> dict[str, str]:
        """Begin the worker and the server. Returns the environment they have."""
        settings = self._settings
        environment = child_environment(
            REDIS_URL=redis_url,
            DATABASE_URL=database_url,
            HOST=settings.host,
            PORT=str(listeners[0].getsockname()[1]),
            HEADWATER_DATA_DIR=str(settings.data_dir),
            PYTHONUNBUFFERED="1",
        )
        for program in (
            *worker_programs(settings, environment, self._console),
            *server_programs(listeners, environment, self._console, lambda: _answers(listeners[0])),
        ):
            self._supervise(program)
        return environment

    def _supervise(self, program: Program) -> None:
        self._up.parts.append(program)
        self._up.tasks.append(asyncio.create_task(program.supervise(), name=program.name))

    async def _all_ready(self) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                for part in self._up.parts:
                    await part.ready.wait()
        except TimeoutError:
            late = ", ".join(part.name for part in self._up.parts if not part.ready.is_set())
            raise NotReady(
                f"Not ready after {READY_TIMEOUT:g} s: {late}. The log above says what it waits for."
            ) from None

    async def _watch(self) -> None:
        await self._stop.wait()

    async def _take_down(self) -> None:
        up = self._up
        kinds = [(part.name.partition("-")[0], part) for part in up.parts]
        # The server first, so that nothing new comes in; the stores last, so that nothing said is lost.
        for names in (("server",), ("worker", "beat"), ("redis",), ("postgres",)):
            await asyncio.gather(*(part.stop(GRACE[kind]) for kind, part in kinds if kind in names))
        results = await asyncio.gather(*up.tasks, return_exceptions=True)
        for task, result in zip(up.tasks, results, strict=True):
            if isinstance(result, Exception) and not isinstance(result, HeadwaterError):
                self._console.say(task.get_name(), f"its supervision failed: {result!r}", "error")
        for listener in up.listeners:
            listener.close()
        if up.place is not None:
            up.place.release()
        if self._stop_reason:
            self._console.say("up", "everything has ended")

    def _banner(self, url: str, took: float) -> None:
        settings = self._settings
        if settings.demo:
            model = (
                "DEMO: a built-in script answers, no AI. For a real model set OPENAI_API_KEY\n"
                "           (or OPENAI_BASE_URL for a local one) in the environment or in .env"
            )
        else:
            model = f"{settings.openai_model} at {settings.openai_base_url or 'api.openai.com'}"
        lines = [
            "",
            f"  headwater is ready in {took:.1f} s",
            "",
            f"  Page     {url}/",
            f"  API      {url}/docs",
            f"  Model    {model}",
            f"  Data     {settings.data_dir}",
        ]
        if settings.access_token is not None:
            lines.append("  Sign in  with HEADWATER_ACCESS_TOKEN")
        lines += ["  Stop     Ctrl-C", ""]
        self._console.write("\n".join(lines))


def _address(host: str, listener: socket.socket) -> str:
    """A URL a browser on this machine can open."""
    port = listener.getsockname()[1]
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104  read, not bound
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _answers(listener: socket.socket) -> None:
    """Ask /readyz until it says 200."""
    host, port = listener.getsockname()[:2]
    loopback = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    target = loopback if host in {"0.0.0.0", "::"} else host  # noqa: S104  read, not bound
    while True:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(2.0):
                if await _status(target, port, "/readyz") == 200:
                    return
        await asyncio.sleep(0.05)


async def _status(host: str, port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        name = f"[{host}]" if ":" in host else host
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        return int(line.split()[1])
    except IndexError:
        raise ValueError("no HTTP answer") from None
    finally:
        writer.close()
