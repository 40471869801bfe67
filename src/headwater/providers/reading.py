"""Reading one streamed answer from its connection: bytes, deltas, silence, the end and what is not an end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import aiohttp

from headwater.errors import ProviderError
from headwater.providers import faults
from headwater.providers.base import Delta
from headwater.providers.chunks import ApiError, ChunkReader, Malformed
from headwater.providers.sse import FrameTooLarge, SseParser

#: A stream that says nothing but signs of life for so many idle times is given up.
STUCK: Final = 5
#: Seconds a finished answer is waited on for its usage and its end mark.
AFTER_FINISH: Final = 5.0
#: Seconds the end of the body may take after the end mark. Only a body read to its end leaves a
#: connection that can be used again.
LINGER: Final = 0.05
#: Servers that set no or a wrong content type still stream; what cannot be a stream is refused at once.
VAGUE: Final = frozenset({"text/plain", "application/octet-stream"})


class Reading:
    """One streamed body, read piece by piece."""

    def __init__(self, response: aiohttp.ClientResponse, where: faults.Where, idle: float) -> None:
        self._content = response.content
        self._where = where
        self._idle = idle
        self._vague = response.content_type in VAGUE
        self._parser = SseParser()
        self._chunks = ChunkReader()
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        #: A payload came, so this is an event stream.
        self._fed = False
        #: A finish reason came: whatever happens to the connection now, the answer is whole.
        self._finished = False
        self._ended = False
        #: Raised by the next call, so that what came before it is delivered.
        self._failure: ProviderError | None = None

    async def next(self) -> list[Delta] | None:
        """What the next bytes say, perhaps nothing; None at the end. Raises ProviderError."""
        if self._failure is not None:
            raise self._failure
        if self._ended:
            await self._linger()
            return None
        data = await self._read()
        if not data:
            return self._eof()
        try:
            payloads = self._parser.feed(data)
        except FrameTooLarge as error:
            raise faults.malformed(self._where, str(error)) from error
        if payloads:
            self._fed = True
            self._heard = self._loop.time()
        elif self._loop.time() - self._heard > STUCK * self._idle:
            raise faults.stuck(STUCK * self._idle)
        return self._take(payloads)

    async def _read(self) -> bytes:
        """Bytes; none at the end of the body or of the patience."""
        try:
            if not self._finished:
                return await self._content.readany()
            async with asyncio.timeout(AFTER_FINISH):
                return await self._content.readany()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if self._finished:
                return b""
            # aiohttp's own time-out is both a TimeoutError and a ClientError.
            raise (faults.silent(self._idle) if isinstance(error, TimeoutError) else faults.cut()) from error

    def _take(self, payloads: list[bytes]) -> list[Delta]:
        deltas = []
        for payload in payloads:
            if payload.startswith(b"[DONE]"):
                self._ended = True
                break
            if not payload:
                continue
            try:
                delta = self._chunks.read(payload)
            except Malformed as error:
                if self._finished:
                    self._ended = True
                else:
                    self._failure = faults.malformed(self._where, str(error))
                break
            except ApiError as error:
                self._failure = faults.mid_stream(faults.Complaint.of(error.body), self._where)
                break
            if delta is not None:
                deltas.append(delta)
                self._finished = self._finished or delta.finish_reason is not None
        return deltas

    def _eof(self) -> list[Delta]:
        last = self._parser.end()
        deltas = self._take([last]) if last is not None else []
        # What cannot be read at the very end is half a frame, so the connection was cut.
        if self._finished or self._ended:
            self._ended, self._failure = True, None
        elif self._vague and not self._fed:
            self._failure = faults.malformed(self._where, "it is not an event stream")
        elif self._failure is None or self._failure.code == "provider_malformed":
            self._failure = faults.cut()
        return deltas

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(LINGER):
                while await self._content.readany():
                    pass
