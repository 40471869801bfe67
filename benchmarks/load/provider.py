"""provider.c in Python, for machines without a C compiler: the same arguments, bytes and addresses on more CPU."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
ROLE = b'"role":"assistant","content":"","refusal":null'


class Provider:
    """Every stream of the process, and the one timer they share."""

    def __init__(self, rate: int, tokens: int, every: int) -> None:
        self.rate, self.tokens, self.every = rate, tokens, every
        self.streams: set[Stream] = set()
        self.total = self.stamps = self.asked = 0

    def stats(self) -> dict[str, int]:
        return {"active": len(self.streams), "tokens": self.total, "stamps": self.stamps, "asked": self.asked}

    def tick(self) -> None:
        now = time.monotonic_ns()
        for stream in [*self.streams]:
            if stream.due <= now:
                stream.speak(now)
        asyncio.get_running_loop().call_later(0.001, self.tick)


class Stream(asyncio.Protocol):
    """One connection, and the answer it has at the moment."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.received = b""
        self.due = self.gap = self.sent = self.length = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        self.provider.streams.discard(self)

    def data_received(self, data: bytes) -> None:
        self.received += data
        while self not in self.provider.streams and b"\r\n\r\n" in self.received:
            head, _, body = self.received.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            size = int(length[1]) if length else 0
            if len(body) < size:
                return
            self.received = body[size:]
            self._answer(head, body[:size])

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET /_stats"):
            self._json(self.provider.stats())
        elif head.startswith(b"GET /_finish"):
            for stream in [*self.provider.streams]:
                stream.end()
            self._json({})
        elif head.startswith(b"POST "):
            self._begin(body)
        else:
            self._json({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    def _begin(self, body: bytes) -> None:
        tokens, rate = re.search(rb"\[\[tokens:(\d+)", body), re.search(rb"\[\[rate:(\d+)", body)
        self.length = int(tokens[1]) if tokens else self.provider.tokens
        self.gap = 1_000_000_000 // (int(rate[1]) if rate else self.provider.rate)
        self.sent, self.due = 0, time.monotonic_ns()
        self.provider.asked += 1
        self.provider.streams.add(self)
        head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self.transport.write(head + self._frame(ROLE))
        self.speak(self.due)

    def speak(self, now: int) -> None:
        """Say what is due."""
        while self.due <= now:
            if self.length and self.sent >= self.length:
                self.end()
                return
            text = f"~t={self.due};" if self.sent % self.provider.every == 0 else f"~{chr(97 + self.sent % 26)}o "
            self.provider.stamps += self.sent % self.provider.every == 0
            self.provider.total += 1
            self.sent += 1
            self.due += self.gap
            self.transport.write(self._frame(b'"content":"%b"' % text.encode()))

    def end(self) -> None:
        self.provider.streams.discard(self)
        usage = {"prompt_tokens": 9, "completion_tokens": self.sent, "total_tokens": self.sent + 9}
        last = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "scripted", "choices": []}
        rest = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps({**last, "usage": usage}).encode()
        self.transport.write(self._frame(b"", b'"stop"', rest) + b"0\r\n\r\n")

    def _json(self, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
        self.transport.write(head + raw)

    @staticmethod
    def _frame(delta: bytes, finish: bytes = b"null", rest: bytes = b"") -> bytes:
        frame = (
            b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1767225600,"model":"scripted",'
            b'"service_tier":"default","system_fingerprint":"fp_0","choices":[{"index":0,"delta":{%b},"logprobs":null,'
            b'"finish_reason":%b}],"usage":null}\n\n%b' % (delta, finish, rest)
        )
        return b"%x\r\n%b\r\n" % (len(frame), frame)


async def main() -> None:
    provider = Provider(*map(int, sys.argv[1:]))
    server = await asyncio.get_running_loop().create_server(lambda: Stream(provider), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    provider.tick()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
