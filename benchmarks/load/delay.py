"""A network that takes its time: a proxy that hands everything on later, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


class Delay:
    """`port` on loopback leads to a unix socket; `seconds` is what every byte takes, each way."""

    def __init__(self) -> None:
        self.port = 0
        self.seconds = 0.0


class _End(asyncio.Protocol):
    """One of the two ends of a connection."""

    def __init__(self, delay: Delay) -> None:
        self.delay = delay
        self.other: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early.append(data)
        elif self.delay.seconds:
            asyncio.get_running_loop().call_later(self.delay.seconds, self.other.write, data)
        else:
            self.other.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None:
            self.other.close()

    def meet(self, other: asyncio.Transport) -> None:
        self.other = other
        for data in self.early:
            other.write(data)


class _Front(_End):
    def __init__(self, delay: Delay, path: str) -> None:
        super().__init__(delay)
        self.path = path

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Kept, as the loop holds tasks weakly.
        self.reaching = asyncio.get_running_loop().create_task(self._reach())

    async def _reach(self) -> None:
        back = _End(self.delay)
        await asyncio.get_running_loop().create_unix_connection(lambda: back, self.path)
        back.meet(self.transport)
        self.meet(back.transport)


@asynccontextmanager
async def delayed(path: str) -> AsyncIterator[Delay]:
    """A proxy in front of the unix socket, at first without a delay."""
    delay = Delay()
    server = await asyncio.get_running_loop().create_server(lambda: _Front(delay, path), "127.0.0.1", 0)
    delay.port = server.sockets[0].getsockname()[1]
    try:
        yield delay
    finally:
        server.close()
