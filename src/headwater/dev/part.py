"""A part of the stack under supervision: begun, its log shown, begun again with a back-off when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from headwater.dev.console import Console
from headwater.dev.ports import leave_out
from headwater.dev.services import Postgres, Redis
from headwater.errors import HeadwaterError
from headwater.settings import Settings

#: Seconds before the first restart; doubles up to MAX_BACKOFF.
FIRST_BACKOFF: Final = 0.5
MAX_BACKOFF: Final = 15.0
#: A part that ran for so many seconds begins anew with the first back-off.
STEADY: Final = 30.0
#: Lines of a part that are repeated when it cannot start.
TAIL: Final = 12
#: The last line a Celery worker writes before it takes work.
_WORKER_READY: Final = re.compile(r"\bready\.?$")
#: What uvicorn says once it takes requests. Several at one address cannot be asked one by one.
_SERVER_READY: Final = re.compile(r"Application startup complete")

Ready = Callable[[], Awaitable[None]]


class PartFailed(HeadwaterError):
    """A part of the stack did not come up. The message has its last words."""

    code = "part_failed"


class Part(ABC):
    """What the stack starts, watches and stops. Its supervision ends with PartFailed only while it was never ready."""

    def __init__(self, name: str, console: Console) -> None:
        self.name = name
        self.ready = asyncio.Event()
        self._console = console
        self._stopping = asyncio.Event()

    async def supervise(self) -> None:
        """Keep it running until `stop`. Raises PartFailed when it dies before it was ever ready."""
        loop = asyncio.get_running_loop()
        backoff = FIRST_BACKOFF
        while not self._stopping.is_set():
            begun = loop.time()
            ending = await self._live()
            if self._stopping.is_set():
                return
            if loop.time() - begun > STEADY:
                backoff = FIRST_BACKOFF
            self._console.say(self.name, f"{ending}; starting it again in {backoff:g} s", "warning")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff)
            backoff = min(backoff * 2, MAX_BACKOFF)

    @abstractmethod
    async def _live(self) -> str:
        """One life, from start to death. Returns how it ended, as a phrase."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """End it: politely, and by force after `grace` seconds."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once."""


class Server(Part):
    """An embedded PostgreSQL or Redis."""

    def __init__(self, name: str, child: Postgres | Redis, console: Console) -> None:
        super().__init__(name, console)
        self.child = child

    async def start(self) -> None:
        """Start it and wait until it answers. Raises ServiceFailed."""
        # The executor's threads live as long as the process, so the server does not take the end
        # of its starting thread for the end of its parent.
        await asyncio.to_thread(self.child.start)
        self.ready.set()

    async def _live(self) -> str:
        if not self.child.running:
            try:
                await self.start()
            except HeadwaterError as error:
                return str(error)
            self._console.say(self.name, f"is back (process {self.child.pid})")
        process = self.child.process
        return ended(await asyncio.to_thread(process.wait) if process else 0)

    async def stop(self, grace: float) -> None:
        self._stopping.set()
        await asyncio.to_thread(self.child.stop, grace)

    def kill(self) -> None:
        self._stopping.set()
        self.child.kill()


class Program(Part):
    """A headwater process of its own, e.g. the worker. What it writes becomes lines of the one log."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        console: Console,
        *,
        becomes_ready: Ready | None = None,
        ready_line: re.Pattern[str] | None = None,
        descriptors: Sequence[int] = (),
        at_death: Callable[[], None] | None = None,
    ) -> None:
        """It is ready when `becomes_ready` returns, or once it writes a line that matches.

        `at_death` is called when it has ended, before it is started again.
        """
        super().__init__(name, console)
        # -P: a file named like a module in the current folder must not come before the real one.
        self._command = [sys.executable, "-P", "-m", "headwater", *arguments, "--parent", str(os.getpid())]
        self._environment = environment
        self._descriptors = tuple(descriptors)
        self._at_death = at_death
        self._becomes_ready = becomes_ready
        self._ready_line = ready_line
        self._process: asyncio.subprocess.Process | None = None
        self.tail: deque[str] = deque(maxlen=TAIL)
        #: The process whose number was said last.
        self._told = 0

    async def _live(self) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=self._descriptors,
                start_new_session=True,
            )
        except OSError as error:
            # No memory or no process left: what goes on beside it must not end for that.
            if not self.ready.is_set():
                raise PartFailed(f"The {self.name} could not start: {error}.") from error
            return f"could not be started: {error}"
        self._process = process
        if self._stopping.is_set():
            # Stopped while it was being forked: nobody else knows this process yet.
            self.kill()
        pump = asyncio.create_task(self._pump(process))
        readiness = asyncio.create_task(self._await_ready())
        try:
            code = await process.wait()
        finally:
            readiness.cancel()
            _kill_group(process.pid)
            if self._at_death is not None:
                self._at_death()
            await pump
        if not self.ready.is_set() and not self._stopping.is_set():
            last = "\n  ".join(self.tail) or "(it said nothing)"
            raise PartFailed(f"The {self.name} could not start; it {ended(code)}. Its last lines:\n  {last}")
        return ended(code)

    async def stop(self, grace: float) -> None:
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace)
        except TimeoutError:
            self._console.say(self.name, f"did not end in {grace:g} s and is killed", "warning")
            self.kill()
            await process.wait()

    def kill(self) -> None:
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process.pid)

    async def _await_ready(self) -> None:
        if self._becomes_ready is not None:
            await self._becomes_ready()
            self._is_ready()

    async def _pump(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise RuntimeError("the process was started without a pipe")
        rest = b""
        # By chunks, not by readline: a line longer than asyncio's limit must not end the pump.
        while chunk := await process.stdout.read(65_536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._show(line)
        if rest:
            self._show(rest)

    def _show(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        if not line:
            return
        self.tail.append(line)
        level, _, _ = line.partition(" ")
        self._console.say(
            self.name, line, "error" if level in {"ERROR", "CRITICAL"} else "warning" if level == "WARNING" else ""
        )
        if self._ready_line is not None and self._ready_line.search(line):
            self._is_ready()

    def _is_ready(self) -> None:
        process = self._process
        if process is not None and process.pid != self._told:
            # The number is what a person needs to look at the process, or to kill it and see what happens.
            self._told = process.pid
            self._console.say(self.name, f"ready (process {process.pid})")
        self.ready.set()


def server_programs(
    listeners: Sequence[socket.socket],
    environment: dict[str, str],
    console: Console,
    first_answers: Ready | None = None,
) -> list[Program]:
    """The web server's processes, one for each socket. A single one is ready when `first_answers` returns."""
    alone = len(listeners) == 1
    # Not a socket that others accept from as well, and not the only one: there clients wait for the next life.
    apart = not alone and len({one.fileno() for one in listeners}) == len(listeners)
    return [
        Program(
            "server" if alone else f"server-{number}",
            # One that is not told its number would make several of itself by the environment's setting.
            ["server", "--workers", "1", "--fd", str(one.fileno()), *([] if alone else ["--process", str(number)])],
            environment,
            console,
            becomes_ready=first_answers if alone else None,
            ready_line=None if alone else _SERVER_READY,
            descriptors=[one.fileno()],
            at_death=partial(leave_out, one) if apart else None,
        )
        for number, one in enumerate(listeners, 1)
    ]


def worker_programs(
    settings: Settings,
    environment: dict[str, str],
    console: Console,
    name: str = "worker@%h",
    options: Sequence[str] = (),
) -> list[Program]:
    """HEADWATER_WORKER_PROCESSES workers with these options, each with a name and a metrics port of its own."""
    if settings.worker_processes == 1:
        return [Program("worker", ["worker"], environment, console, ready_line=_WORKER_READY)]
    node, _, host = name.rpartition("@")
    programs = []
    for number in range(1, settings.worker_processes + 1):
        port = settings.worker_metrics_port + number - 1 if settings.worker_metrics_port else 0
        own = {**environment, "HEADWATER_WORKER_METRICS_PORT": str(port)}
        # One that is not told its number would make several of itself by the environment's setting.
        arguments = ["worker", "--processes", "1", "--name", f"{node or 'celery'}-{number}@{host}", *options]
        programs.append(Program(f"worker-{number}", arguments, own, console, ready_line=_WORKER_READY))
    return programs


def ended(code: int) -> str:
    """How a process ended, as a phrase: `ended with exit code 1`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _kill_group(leader: int) -> None:
    # The leader is gone or going; its own children, such as a worker pool's, must not outlive it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
