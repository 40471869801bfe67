"""Publishes events at an even pace over raw sockets: `publish.py SPEC.json`, and commands on standard input.

The specification: `port`, `rate` (events per second and target), `tick` (seconds between writes at least),
`connections`, `answer` (what every accepted event is answered with), `size` (characters of text) and
`targets`: requests in which `@seq@` and `@event@` stand for an event's number and the event, and
`@seq#@` and `@event#@` for their lengths, as Redis wants them. Standard library only.

Says `ready`; `go` begins; `stop FROM_NS TO_NS` ends and prints how many it published in that window.
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
from typing import Any

#: Events that one write may hold, and bytes that may wait for a server that takes no more: few, because an event has
#: its time already, and what waits here is not published yet.
BURST = 256
WAITING = 65_536
HOLE = re.compile("@event#?@|@seq#?@")


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
    def __init__(self, spec: dict[str, Any]) -> None:
        self.targets = [HOLE.sub("%b", target.replace("%", "%%")).encode() for target in spec["targets"]]
        self.holes = HOLE.findall(spec["targets"][0])
        self.seqs = [0] * len(self.targets)
        self.connections = [Connection(spec["port"], spec["answer"].encode()) for _ in range(spec["connections"])]
        self.rate = spec["rate"] * len(self.targets)
        self.tick = spec["tick"]
        self.event = b'{"seq":%d,"type":"content","at":%d,"t":%d,"text":"' + b"x" * spec["size"] + b'"}'
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
            if due > self.sent and sum(len(one.out) for one in self.connections) < WAITING:
                self._write(min(due, self.sent + BURST))
            after = max(begun + (self.sent + 1) / self.rate, now + self.tick)
            if (window := self._wait(after)) is not None:
                return window

    def _write(self, until: int) -> None:
        t, at = time.monotonic_ns(), time.time_ns() // 1_000_000
        for number in range(self.sent, until):
            index = number % len(self.targets)
            seq = self.seqs[index] = self.seqs[index] + 1
            event, number_text = self.event % (seq, at, t), b"%d" % seq
            known = {
                "@event@": event,
                "@event#@": b"%d" % len(event),
                "@seq@": number_text,
                "@seq#@": b"%d" % len(number_text),
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
    publisher = Publisher(json.loads(Path(sys.argv[1]).read_text()))
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
