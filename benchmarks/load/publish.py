"""Publishes events at an even pace over raw sockets: `publish.py SPEC`, and commands on standard input.

The specification's first line: the port, the rate (events per second and target), the tick (seconds between writes at
least), the number of connections, the characters of an event's text, and what every accepted event is answered with.
Every further line is a target: a request in which `@seq@` and `@event@` stand for an event's number and the event, and
`@seq#@` and `@event#@` for their lengths, as Redis wants them. Answer and targets are in hexadecimal.

Says `ready`; `go` begins; `stop FROM_NS TO_NS` ends and prints how many it published in that window. Standard library
only. `publish.c` does the same at a smaller price and takes this one's place where there is a C compiler.
"""

from __future__ import annotations

import bisect
import json
import re
import select
import socket
import sys
import time
from pathlib import Path

#: Events that one write may hold, and bytes that may wait for a server that takes no more: few, because an event has
#: its time already, and what waits here is not published yet.
BURST = 256
WAITING = 65_536
#: Seconds until a server that takes no more is looked at again.
FULL = 0.001
HOLE = re.compile(b"@event#?@|@seq#?@")


class Connection:
    """Requests out, answers counted."""

    def __init__(self, port: int, answer: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WAITING)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answered = 0
        self.out = bytearray()
        self._answer = answer
        self._rest = b""

    def flush(self) -> None:
        if self.out:
            try:
                del self.out[: self.socket.send(self.out)]
            except BlockingIOError:
                return

    def read(self) -> None:
        data = self.socket.recv(262_144)
        if not data:
            raise SystemExit("the server closed the publisher's connection")
        data = self._rest + data
        found = data.count(self._answer)
        self.answered += found
        # One byte short of an answer, so that none counts twice.
        self._rest = data[data.rfind(self._answer) + len(self._answer) if found else 0 :][1 - len(self._answer) :]


class Publisher:
    def __init__(self, spec: str) -> None:
        head, *lines = spec.splitlines()
        port, rate, tick, connections, size, answer = head.split()
        targets = [bytes.fromhex(line) for line in lines]
        self.targets = [HOLE.sub(b"%b", target.replace(b"%", b"%%")) for target in targets]
        self.holes = HOLE.findall(targets[0])
        self.seqs = [0] * len(self.targets)
        self.connections = [Connection(int(port), bytes.fromhex(answer)) for _ in range(int(connections))]
        self.rate = float(rate) * len(self.targets)
        self.tick = float(tick)
        self.event = b'{"seq":%d,"type":"content","at":%d,"t":%d,"text":"' + b"x" * int(size) + b'"}'
        self.sent = 0
        #: When each write was made, and how many events had gone out with it.
        self.times: list[int] = []
        self.counts: list[int] = []

    def run(self) -> tuple[int, int]:
        """Publish until `stop`; returns the window."""
        begun = time.monotonic()
        while True:
            now = time.monotonic()
            due = int((now - begun) * self.rate)
            full = sum(len(one.out) for one in self.connections) >= WAITING
            if due > self.sent and not full:
                self._write(min(due, self.sent + BURST))
            # A server that takes no more is not asked again and again at the others' cost.
            after = max(begun + (self.sent + 1) / self.rate, now + max(self.tick, FULL * full))
            if (window := self._wait(after)) is not None:
                return window

    def _write(self, until: int) -> None:
        t, at = time.monotonic_ns(), time.time_ns() // 1_000_000
        for number in range(self.sent, until):
            index = number % len(self.targets)
            seq = self.seqs[index] = self.seqs[index] + 1
            event, number_text = self.event % (seq, at, t), b"%d" % seq
            known = {
                b"@event@": event,
                b"@event#@": b"%d" % len(event),
                b"@seq@": number_text,
                b"@seq#@": b"%d" % len(number_text),
            }
            # A target keeps its connection, so its events stay in order.
            out = self.connections[index % len(self.connections)].out
            out += self.targets[index] % tuple(known[hole] for hole in self.holes)
        self.sent = until
        self.times.append(t)
        self.counts.append(until)
        for connection in self.connections:
            connection.flush()

    def _wait(self, until: float) -> tuple[int, int] | None:
        """Read answers until then; the window once `stop` was said."""
        while True:
            waiting = [one.socket for one in self.connections if one.out]
            sockets = [one.socket for one in self.connections]
            timeout = max(0.0, until - time.monotonic())
            readable, writable, _ = select.select([*sockets, sys.stdin], waiting, [], timeout)
            for connection in self.connections:
                if connection.socket in writable:
                    connection.flush()
                if connection.socket in readable:
                    connection.read()
            if sys.stdin in readable:
                words = sys.stdin.readline().split()
                if not words:
                    raise SystemExit(0)
                return int(words[1]), int(words[2])
            if time.monotonic() >= until:
                return None

    def published(self, begin: int, end: int) -> int:
        """Events that went out in the window."""
        counts = [0, *self.counts]
        return counts[bisect.bisect_left(self.times, end)] - counts[bisect.bisect_left(self.times, begin)]


def main() -> None:
    publisher = Publisher(Path(sys.argv[1]).read_text())
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    begin, end = publisher.run()
    # The last answers are on their way.
    deadline = time.monotonic() + 2.0
    while publisher.sent > sum(one.answered for one in publisher.connections) and time.monotonic() < deadline:
        for connection in publisher.connections:
            connection.flush()
            if select.select([connection.socket], [], [], 0.01)[0]:
                connection.read()
    answered = sum(one.answered for one in publisher.connections)
    print(json.dumps({"sent": publisher.sent, "answered": answered, "published": publisher.published(begin, end)}))


if __name__ == "__main__":
    main()
