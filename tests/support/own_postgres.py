"""A PostgreSQL server of a test's own, to freeze, stop and start again."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwater.dev.services import Postgres
from headwater.store.migrate import init


class OwnPostgres:
    """A migrated server over one data folder."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._server = self._make()

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[OwnPostgres]:
        # Not in pytest's folder: run by root, the server is another user, and every pytest that starts
        # closes that folder to other users.
        with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
            server = cls(Path(folder) / "postgres")
            server.start()
            try:
                yield server
            finally:
                server.stop()

    def _make(self) -> Postgres:
        return Postgres(self._data_dir, options={"fsync": "off"})

    def url(self, database: str = "headwater") -> str:
        return self._server.url(database)

    def start(self) -> None:
        """Start it, also again after `stop`."""
        self._server = self._make()
        self._server.start()
        init(self.url())

    def stop(self) -> None:
        self._server.stop()

    def kill(self) -> None:
        """End it at once, as a crash would; the next start recovers."""
        self._server.kill()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The server and all its sessions stand still."""
        pid = self._server.pid
        pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        _tell(pids, signal.SIGSTOP)
        try:
            yield
        finally:
            _tell(pids, signal.SIGCONT)


def _tell(pids: list[int], what: signal.Signals) -> None:
    for pid in pids:
        # A session that ended in between.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)
