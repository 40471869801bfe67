"""A Redis of one's own, to be stopped, frozen and filled; and what can stand in front of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from headwater.dev.services import Redis

CERTIFICATE = Path(__file__).with_name("tls") / "cert.pem"
KEY = Path(__file__).with_name("tls") / "key.pem"


class OwnRedis:
    """It can be stopped and started again, at the same address and over the same data."""

    def __init__(self, folder: Path, options: dict[str, str], password: str | None) -> None:
        self._folder = folder / "own-redis"
        self._options = options
        self._password = password
        self._server = Redis(self._folder, options=options, password=password)
        self.port = self._server.port

    @property
    def pid(self) -> int:
        return self._server.pid

    def url(self, database: int = 0) -> str:
        return self._server.url(database)

    def start(self) -> None:
        self._server = Redis(self._folder, self.port, options=self._options, password=self._password)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL. `start` makes it go on with what its file had."""
        self._server.kill()

    def forget(self) -> None:
        """Remove its data, while it does not run."""
        shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)


@contextmanager
def own_redis(folder: Path, *, password: str | None = None, **options: str) -> Iterator[OwnRedis]:
    """It forgets all when it stops, unless `appendonly="yes"`."""
    server = OwnRedis(folder, {"appendonly": "no", **options}, password)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def frozen(server: OwnRedis) -> Iterator[None]:
    """Connected, but it answers nothing."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@asynccontextmanager
async def tls_in_front_of(port: int) -> AsyncIterator[int]:
    """The port of a TLS end that passes everything on to `port`; its certificate is CERTIFICATE."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE, KEY)
    open_: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        open_.update((writer, inner_writer))
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in open_:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
