"""Readers and publishers as processes of their own, so that what they cost is never the server's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.load.programs import command_of
from benchmarks.machine import pinned
from headwater.dev.child import dies_with_parent


class _Process:
    """A child that says words on one of its pipes. An async context manager; it never outlives its block."""

    def __init__(self, command: Sequence[str], core: int | None) -> None:
        self._command = pinned(command, core)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGKILL),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # Not by the process object: that looks whether it has ended, and takes the news from asyncio.
                os.kill(self.process.pid, signal.SIGKILL)
        await self.process.wait()

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process

    async def _line(self, pipe: asyncio.StreamReader | None, begins: str = "") -> str:
        assert pipe is not None
        line = (await pipe.readline()).decode().strip()
        if not line or not line.startswith(begins):
            rest = self.process.stderr and (await self.process.stderr.read()).decode()
            raise RuntimeError(f"{self._command} said {line!r} for {begins!r}: {rest}")
        return line


class Readers(_Process):
    """`sseload`: opens its streams at once."""

    def __init__(
        self,
        port: int,
        requests: Sequence[str],
        connections: int,
        *,
        warmup: float,
        seconds: float,
        grace: float = 0.5,
        per_second: float = 2000,
        core: int | None = None,
    ) -> None:
        descriptor, name = tempfile.mkstemp(prefix="headwater-requests-")
        os.write(descriptor, "\n".join(requests).encode())
        os.close(descriptor)
        self._file = Path(name)
        numbers = [str(number) for number in (connections, warmup, seconds, grace, per_second)]
        super().__init__([*command_of("sseload"), "127.0.0.1", str(port), name, *numbers], core)

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        self._file.unlink(missing_ok=True)

    async def said(self, word: str) -> str:
        """The next line on its stderr: `open N`, `measure`, `measured`, in this order."""
        return await self._line(self.process.stderr, word)

    async def result(self) -> dict[str, Any]:
        """What it counted, once it is through."""
        return dict(json.loads(await self._line(self.process.stdout, "{")))


@dataclass(frozen=True, slots=True)
class Spec:
    """What is published: see `publish.py`."""

    port: int
    #: Events per second and target.
    rate: float
    #: Seconds between writes at least.
    tick: float
    connections: int
    answer: str
    #: Characters of text in an event.
    size: int
    targets: Sequence[str]

    def text(self) -> str:
        """As the publishers read it."""
        answer = self.answer.encode().hex()
        head = f"{self.port} {self.rate} {self.tick} {self.connections} {self.size} {answer}"
        return "\n".join([head, *(target.encode().hex() for target in self.targets)])


class Publisher(_Process):
    """`publish`: connected when the block begins, publishing from `go` on."""

    def __init__(self, spec: Spec, core: int | None = None) -> None:
        descriptor, name = tempfile.mkstemp(prefix="headwater-publish-")
        os.close(descriptor)
        self._file = Path(name)
        self._file.write_text(spec.text())
        super().__init__([*command_of("publish"), name], core)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self._line(self.process.stdout, "ready")
        return self

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        self._file.unlink(missing_ok=True)

    def go(self) -> None:
        self._write("go\n")

    async def stop(self, begin: int, end: int) -> dict[str, int]:
        """`sent`, `answered` and, in the window, `published`."""
        self._write(f"stop {begin} {end}\n")
        return dict(json.loads(await self._line(self.process.stdout, "{")))

    def _write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
