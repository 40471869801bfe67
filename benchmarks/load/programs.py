"""The load programs as child processes. Compiled at first use; without a C compiler their Python twins run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
#: The load programs may take a while to write their figures.
_PATIENCE = 10.0


def command_of(name: str) -> list[str]:
    """How to start a load program. Its binary is kept under its source's hash."""
    source = _HERE / f"{name}.c"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return [sys.executable, "-m", f"benchmarks.load.{name}"]
    binary = Path(tempfile.gettempdir()) / f"headwater-{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not binary.exists():
        fresh = binary.with_suffix(".new")
        subprocess.run([compiler, "-O2", "-o", fresh, source], check=True)
        fresh.replace(binary)
    return [str(binary)]


@dataclass(slots=True)
class Provider:
    """A running provider."""

    pid: int
    port: int

    @property
    def url(self) -> str:
        """For OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def stats(self) -> dict[str, int]:
        """`active` streams, and since its start `asked` answers, `tokens` and `stamps` due."""
        return await asyncio.to_thread(self._get, "/_stats")

    async def finish(self) -> None:
        """End every answer now."""
        await asyncio.to_thread(self._get, "/_finish")

    async def streaming(self, answers: int, timeout: float) -> int:
        """Wait until so many answers stream; how many do at the end of `timeout` seconds."""
        end = asyncio.get_running_loop().time() + timeout
        while (active := (await self.stats())["active"]) < answers and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        return active

    def _get(self, path: str) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=_PATIENCE) as answer:
            figures: dict[str, int] = json.load(answer)
        return figures


@asynccontextmanager
async def provider(rate: int, *, tokens: int = 0, every: int = 10) -> AsyncIterator[Provider]:
    """A model that says `rate` tokens a second for `tokens` tokens (0: until `finish`), every `every`-th stamped."""
    command = [*command_of("provider"), str(rate), str(tokens), str(every)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(await asyncio.to_thread(process.stdout.readline))
        yield Provider(process.pid, port)
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class Seen:
    """A stamp and when it arrived, in ns of CLOCK_MONOTONIC."""

    reader: int
    stamp: int
    arrival: int

    @property
    def lag(self) -> float:
        """Seconds."""
        return (self.arrival - self.stamp) / 1e9


class Tap:
    """A running reader of sockets."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        #: After the end.
        self.seen: list[Seen] = []
        self.marks = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self, number: int, port: int, request: bytes) -> None:
        """Connect to loopback, send the request and note what arrives under `number`."""
        self.read_all([(number, port, request)])

    def read_all(self, readers: Iterable[tuple[int, int, bytes]]) -> None:
        assert self._process.stdin is not None
        lines = "".join(f"{number} {port} {request.hex()}\n" for number, port, request in readers)
        self._process.stdin.write(lines.encode())
        self._process.stdin.flush()


@asynccontextmanager
async def tap() -> AsyncIterator[Tap]:
    """Reads until the block ends; then `seen` holds every stamp and `marks` the count of tokens."""
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder:
        file = Path(folder) / "seen"
        process = subprocess.Popen([*command_of("tap"), str(file)], stdin=subprocess.PIPE)
        try:
            running = Tap(process)
            yield running
            assert process.stdin is not None
            process.stdin.close()
            if await asyncio.to_thread(process.wait, _PATIENCE) != 0:
                raise RuntimeError("The reader of sockets failed; it says why above.")
            *running.seen, total = (Seen(*numbers) for numbers in struct.iter_unpack("=3q", file.read_bytes()))
            running.marks = total.stamp
        finally:
            process.kill()
            process.wait()
