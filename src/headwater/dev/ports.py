"""Take the port before anything starts, and say who has it when somebody does."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from pathlib import Path

from headwater.errors import HeadwaterError


class PortTaken(HeadwaterError):
    """The address cannot be bound. The message says why, who has it, and what to do."""

    code = "port_taken"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket to hand to a server process. Raises PortTaken.

    The supervisor keeps it open, so while the server is started again clients wait instead of being refused.
    """
    return _listen(host, port, shared=False)


def listen_each(host: str, port: int, count: int) -> list[socket.socket]:
    """A socket for each of `count` processes, all at one address. Raises PortTaken.

    The kernel spreads connections evenly over them. From one socket that all accept from, the first to wake would take
    most, and streams stay where they are.
    """
    first = listen(host, port)
    if count == 1 or sys.platform != "linux":
        # Elsewhere the kernel does not spread: there they do share one.
        return [first] * count
    # Bound alone until here, so that a port which somebody else shares as well counts as taken.
    port = first.getsockname()[1]
    first.close()
    return [_listen(host, port, shared=True) for _ in range(count)]


def leave_out(listener: socket.socket) -> None:
    """Give one socket of several at an address no connection until it listens again, which a server's start lets it.

    Whoever holds it only for a process that died would let every connection that falls to it wait for the next one.
    """
    # Gone already: a process that died again before it listened.
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RD)


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise PortTaken(f"HOST={host} is not an address of this machine ({error.strerror}). Use 127.0.0.1.") from None
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(address)
        server.listen(2048)
    except OSError as error:
        server.close()
        raise PortTaken(_why(host, port, error)) from None
    return server


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        airplay = " (on macOS the AirPlay Receiver uses it)" if sys.platform == "darwin" and port == 5000 else ""
        return (
            f"Port {port} on {host} is taken by {holder(port) or 'another process'}{airplay}. "
            f"Stop that, or choose another port: --port {port + 1} or PORT={port + 1}; 0 takes a free one."
        )
    if error.errno == errno.EACCES:
        return f"Port {port} is for root only, as all below 1024. Choose another: --port 5000 or PORT=5000."
    return f"{host}:{port} cannot be bound: {error.strerror}. Choose another with --host and --port."


def holder(port: int) -> str | None:
    """Name and id of the process that listens on the port, where the system lets us see it."""
    inodes = {line[9] for line in _sockets() if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port}
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(descriptor.readlink()) in wanted for descriptor in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return None


def _sockets() -> list[list[str]]:
    rows: list[list[str]] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            rows += [line.split() for line in Path(table).read_text().splitlines()[1:]]
    return rows
