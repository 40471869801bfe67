"""A TCP proxy that misbehaves on command: cuts after n bytes, stalls, delays, refuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """Forwards loopback connections to `target`, a `(host, port)` or the path of a unix socket."""

    def __init__(self, target: tuple[str, int] | str) -> None:
        self.target = target
        self.port = 0
        #: Bytes towards the client after which a connection is cut; None lets it live.
        self.cut_after: int | None = None
        #: Seconds that every chunk in either direction is held back.
        self.delay = 0.0
        #: Clear: nothing moves, connections stay open, as with a frozen peer.
        self.flowing = asyncio.Event()
        self.refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def run(self, port: int = 0) -> AsyncIterator[Proxy]:
        """Listen on 127.0.0.1 until the block ends."""
        self.flowing.set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.flowing.set()
            self.cut()
            await server.wait_closed()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> int:
        """Reset every open connection; how many there were."""
        writers, self._writers = self._writers, set()
        for writer in writers:
            # abort, not close: the peer sees the connection break, not end.
            writer.transport.abort()
        return len(writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.refusing:
            writer.transport.abort()
            return
        try:
            if isinstance(self.target, str):
                up_reader, up_writer = await asyncio.open_unix_connection(self.target)
            else:
                up_reader, up_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        limit = self.cut_after
        try:
            await asyncio.gather(self._pump(reader, up_writer, None), self._pump(up_reader, writer, limit))
        except OSError:
            pass  # one side is gone; the other is told below
        finally:
            self._writers -= {writer, up_writer}
            for end in (writer, up_writer):
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> None:
        sent = 0
        while data := await reader.read(65536):
            await self.flowing.wait()
            if self.delay:
                await asyncio.sleep(self.delay)
            if limit is not None and sent + len(data) >= limit:
                writer.write(data[: limit - sent])
                with contextlib.suppress(OSError):
                    await writer.drain()
                raise ConnectionResetError("cut on command")
            sent += len(data)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
