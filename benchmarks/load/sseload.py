"""`sseload.c` in Python, for machines without a C compiler: the same arguments, the same words, the same JSON line.

Standard library only and one loop without tasks, so that it costs a few microseconds per read.
"""

from __future__ import annotations

import json
import re
import resource
import select
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

#: Streams that have no answer after so many seconds never get one.
OPEN_LIMIT = 60.0
#: A number counts once something follows it; it may go on in the next read.
STAMP = re.compile(rb'"t":(\d+)(?=\D)')
#: Longer than `"t":` and the digits that a read can cut.
CARRY = 64


@dataclass(slots=True)
class Stream:
    socket: socket.socket
    request: str
    state: str = "connecting"
    carry: bytes = b""


@dataclass(slots=True)
class Counts:
    open: int = 0
    refused: int = 0
    ended: int = 0
    events: int = 0
    delivered: int = 0
    read_bytes: int = 0
    from_ns: int = 0
    to_ns: int = 0
    #: Microseconds → events.
    latencies: Counter[int] = field(default_factory=Counter)

    def scan(self, stream: Stream, data: bytes) -> None:
        at = time.monotonic_ns()
        data = stream.carry + data
        last = 0
        for match in STAMP.finditer(data):
            t, last = int(match[1]), match.end()
            if self.from_ns <= t < self.to_ns:
                self.delivered += 1
            if self.from_ns <= at < self.to_ns:
                self.events += 1
                self.latencies[max(0, (at - t) // 1000)] += 1
        # What is left of a counted number cannot count again: its key is gone.
        stream.carry = data[max(last, len(data) - CARRY) :]

    def quantile(self, q: float) -> int:
        wanted, seen = q * self.events, 0
        for latency in sorted(self.latencies):
            seen += self.latencies[latency]
            if seen > wanted:
                return latency
        return 0


class Load:
    def __init__(self, host: str, port: int, requests: list[str], connections: int, per_second: float) -> None:
        self.counts = Counts()
        self._where = (host, port)
        self._requests = requests
        self._connections = connections
        self._per_second = per_second
        self._streams: dict[int, Stream] = {}
        self._epoll = select.epoll()
        self._begun = time.monotonic()
        self._next = 0

    @property
    def settled(self) -> bool:
        """Every stream was answered, or will never be."""
        counts = self.counts
        answered = counts.open + counts.refused + counts.ended
        return answered >= self._connections or time.monotonic() - self._begun > OPEN_LIMIT

    def turn(self) -> None:
        """Open what is due and read what is there."""
        while self._next < self._connections and (time.monotonic() - self._begun) * self._per_second >= self._next:
            self._connect()
        for descriptor, _ in self._epoll.poll(0.001 if self._next < self._connections else 0.01):
            stream = self._streams[descriptor]
            try:
                if stream.state == "connecting":
                    self._send(descriptor, stream)
                else:
                    self._read(stream)
            except BlockingIOError:
                continue
            except OSError:
                self._close(stream)

    def _connect(self) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(self._where)
        request = self._requests[self._next % len(self._requests)]
        self._streams[connection.fileno()] = Stream(connection, request)
        self._epoll.register(connection.fileno(), select.EPOLLOUT)
        self._next += 1

    def _send(self, descriptor: int, stream: Stream) -> None:
        host, port = self._where
        http = f"GET {stream.request} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n\r\n"
        stream.socket.send((http if stream.request.startswith("/") else f"{stream.request}\r\n").encode())
        stream.state = "header"
        self._epoll.modify(descriptor, select.EPOLLIN)

    def _read(self, stream: Stream) -> None:
        data = stream.socket.recv(65_536)
        refused = stream.state == "header" and stream.request.startswith("/") and b" 200 " not in data
        if not data or refused:
            self._close(stream)
            return
        if stream.state == "header":
            stream.state = "body"
            self.counts.open += 1
        if self.counts.from_ns <= time.monotonic_ns() < self.counts.to_ns:
            self.counts.read_bytes += len(data)
        self.counts.scan(stream, data)

    def _close(self, stream: Stream) -> None:
        if stream.state == "body":
            self.counts.open -= 1
            self.counts.ended += 1
        else:
            self.counts.refused += 1
        stream.socket.close()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    host, port, requests, connections, warmup, measure, grace, per_second = sys.argv[1:]
    load = Load(host, int(port), Path(requests).read_text().split("\n"), int(connections), float(per_second))
    counts = load.counts
    while not load.settled:
        load.turn()
    counts.from_ns = time.monotonic_ns() + round(float(warmup) * 1e9)
    counts.to_ns = counts.from_ns + round(float(measure) * 1e9)
    say(f"open {counts.open}")
    while time.monotonic_ns() < counts.from_ns:
        load.turn()
    cpu = cpu_seconds()
    say("measure")
    while time.monotonic_ns() < counts.to_ns:
        load.turn()
    cpu = cpu_seconds() - cpu
    say("measured")
    end = counts.to_ns + round(float(grace) * 1e9)
    while time.monotonic_ns() < end:
        load.turn()
    names = ("open", "refused", "ended", "events", "delivered", "read_bytes", "from_ns", "to_ns")
    quantiles = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p999_us": 0.999}
    print(
        json.dumps(
            {name: getattr(counts, name) for name in names}
            | {name: counts.quantile(q) for name, q in quantiles.items()}
            | {"client_cpu_s": round(cpu, 3)}
        )
    )


if __name__ == "__main__":
    main()
