"""Servers for one benchmark, in one temporary folder; all of them end with it, and with this process however it ends.

with Parts() as parts:
    redis = parts.redis()
    server = parts.headwater("server", HEADWATER_MAX_STREAMS="9999", REDIS_URL=redis.url(), core=0)
"""

from __future__ import annotations

import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.machine import family, pinned
from headwater.dev.child import STOP_TIMEOUT, Child
from headwater.dev.services import Postgres, Redis, free_port
from headwater.store.migrate import init


class Program(Child):
    """Any program as a server on a port, held on one core."""

    def __init__(self, folder: Path, name: str, port: int, core: int | None = None) -> None:
        super().__init__(folder / name)
        self.name = name
        self.port = port
        self._core = core

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return family(self.pid)

    def start(self, command: Sequence[str], environment: Mapping[str, str], ready: Callable[[], bool]) -> None:
        """Start it and wait until it is ready. Raises ServiceFailed."""
        self.data_dir.mkdir(exist_ok=True)
        settings = [f"{name}={value}" for name, value in environment.items()]
        self._spawn(pinned(["/usr/bin/env", *settings, *command], self._core))
        self._await(ready, self.name)

    def stop(self) -> None:
        import signal

        self._stop(signal.SIGTERM, STOP_TIMEOUT)


class _Redis(Redis):
    """The embedded server, held on one core."""

    def __init__(self, data_dir: Path, core: int | None) -> None:
        super().__init__(data_dir, options={"maxclients": "15000"})
        self._core = core

    def _spawn(self, command: list[str], uid: int | None = None, **death: object) -> None:
        super()._spawn(pinned(command, self._core), uid)


class Parts(AbstractContextManager["Parts"]):
    """Starts servers, and stops them in the reverse order."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="headwater-bench-")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def redis(self, core: int | None = None) -> Redis:
        """A Redis of its own, as `headwater up` starts one."""
        server = _Redis(self.folder / f"redis-{free_port()}", core)
        self._stack.callback(server.stop)
        server.start()
        return server

    def postgres(self) -> Postgres:
        """A PostgreSQL of its own with headwater's tables; `url()` is its address."""
        server = Postgres(self.folder / "postgres")
        self._stack.callback(server.stop)
        server.start()
        init(server.url())
        return server

    def program(
        self,
        name: str,
        port: int,
        command: Sequence[str],
        *,
        ready: Callable[[], bool],
        core: int | None = None,
        **environment: str,
    ) -> Program:
        """Any server; its log is `<folder>/<name>.log`."""
        server = Program(self.folder, name, port, core)
        self._stack.callback(server.stop)
        server.start(command, environment, ready)
        return server

    def headwater(self, what: str, *arguments: str, core: int | None = None, **settings: str) -> Program:
        """`headwater server` or `headwater worker`. Ready once the server answers; a worker is started and returned."""
        port = free_port()
        base = f"http://127.0.0.1:{port}"
        settings = {"HEADWATER_DATA_DIR": str(self.folder / "data"), "HOST": "127.0.0.1", "PORT": str(port)} | settings
        command = [sys.executable, "-P", "-m", "headwater", what, *arguments, "--parent", str(os.getpid())]
        ready = (lambda: answers(f"{base}/api/health")) if what == "server" else (lambda: True)
        return self.program(f"{what}-{port}", port, command, ready=ready, core=core, **settings)


def answers(url: str) -> bool:
    """Whether anything answers there over HTTP, be it an error."""
    try:
        with urllib.request.urlopen(url, timeout=5.0):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
