"""A server process of ours: begun, watched and ended, and never left behind.

On Linux the kernel ends the server when the process that began it is killed; elsewhere the next
start finds the leftover by its pid file and ends it first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from headwater.errors import HeadwaterError

#: Seconds a server may take to answer after its start.
START_TIMEOUT: Final = 30.0
#: Seconds a server may take to stop before it is killed.
STOP_TIMEOUT: Final = 5.0
#: A log file larger than this is set aside at the next start; one older file is kept.
LOG_LIMIT: Final = 10_000_000

_PR_SET_PDEATHSIG: Final = 1


class ServiceFailed(HeadwaterError):
    """An embedded server did not start. The message says which, why, and what to do."""

    code = "service_failed"


def dies_with_parent(how: signal.Signals) -> Callable[[], None] | None:
    """For `preexec_fn`: the kernel sends `how` when the thread that starts the process is gone. None where it cannot.

    So start it from a thread that lives as long as the process should.
    """
    if sys.platform != "linux":
        return None
    # Looked up here, ahead of the fork: between fork and exec only the call itself is safe.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def preexec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(how))
        if os.getppid() != parent:
            # The parent died between the fork and the line above, so no signal will come.
            os._exit(1)

    return preexec


def follow_parent(parent: int, grace: float = 8.0) -> None:
    """End this process with SIGTERM once `parent` is not its parent any more, and by force after `grace` seconds."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def alive(pid: int) -> bool:
    """Whether a process of that id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def command_of(pid: int) -> str:
    """The program's name of a process; empty when it is gone or may not be seen."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    found = subprocess.run(["ps", "-o", "comm=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()).name


def wake(pid: int) -> None:
    """Let a process go on that was stopped, with those it began: what stands still does not hear that it is to end."""
    began: list[str] = []
    # Linux alone has this list, and the process may end meanwhile.
    with contextlib.suppress(OSError):
        began = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in (pid, *map(int, began)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGCONT)


def end_leftover(pid_file: Path, program: str, how: signal.Signals) -> None:
    """End the server that an earlier, killed start left behind in this folder.

    The pid may belong to somebody else by now, hence the look at the program's name.
    """
    try:
        pid = int(pid_file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    if not alive(pid) or program not in command_of(pid):
        return
    wake(pid)
    for sign, patience in ((how, 8.0), (signal.SIGKILL, 2.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)
        deadline = time.monotonic() + patience
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not alive(pid):
            return


class Child:
    """A server process with a data folder and, beside that, a log file of the same name."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.process: subprocess.Popen[bytes] | None = None
        # A start in one thread and a stop in another must not leave a process between them.
        self._lock = threading.Lock()
        self._stopping = False

    @property
    def pid(self) -> int:
        if self.process is None:
            raise RuntimeError("not started")
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log_file(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}.log"

    def _spawn(self, command: list[str], uid: int | None = None, *, death: signal.Signals = signal.SIGTERM) -> None:
        if self.log_file.exists() and self.log_file.stat().st_size > LOG_LIMIT:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        self.log_file.touch(mode=0o600)
        with self._lock, self.log_file.open("ab") as log:
            if self._stopping:
                raise ServiceFailed(f"{Path(command[0]).name} was stopped while it was starting.")
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A group of its own: Ctrl-C at the terminal reaches the supervisor first, which stops in order.
                start_new_session=True,
                preexec_fn=dies_with_parent(death),  # noqa: PLW1509  one prepared system call, see there
                user=uid,
                group=None if uid is None else pwd.getpwuid(uid).pw_gid,
                extra_groups=None if uid is None else [],
            )

    def _await(self, answers: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not answers():
            if not self.running or time.monotonic() > deadline:
                failure = self._failed(what)
                self.kill()
                raise failure
            time.sleep(0.02)

    def _failed(self, what: str) -> ServiceFailed:
        tail = self.log_file.read_text(errors="replace")[-2000:] if self.log_file.exists() else ""
        return ServiceFailed(f"{what} did not start. Its log, {self.log_file}, ends with:\n{tail}")

    def _stop(self, how: signal.Signals, timeout: float) -> None:
        with self._lock:
            self._stopping = True
            process = self.process
        if process is not None and process.poll() is None:
            wake(process.pid)
            process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End it and what it started at once, without a chance to tidy up."""
        process, self.process = self.process, None
        if process is None:
            return
        # It leads its own group; the group outlives its leader while it has members.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
