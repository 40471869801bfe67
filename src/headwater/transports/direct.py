"""Frames straight onto uvicorn's transport, past `send`: no task wakes up, no message is made.

ASGI has no word for it, so it is taken only where everything looks as it is known to look: `send` is the method of
uvicorn's httptools response, that response is open and chunked, and what is used of it exists. Anything else, also a
`send` that a middleware wrapped or a uvicorn that has changed, goes by `send` and puts the same bytes on the wire.

Under the same condition a reader's leaving is heard without a task that waits in `receive`, and what uvicorn keeps of
a request that is answered already is let go. Both are a third of an idle reader's memory.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any, Final

from headwater.formats.base import Format
from headwater.hub import Batch
from headwater.transports.base import Receive, Send, Stream

logger = logging.getLogger(__name__)

#: Bytes of events that are written past `send` at once. What is larger waits for a reader that has taken it.
SMALL: Final = 4096
#: Writes in a row at most: those who wait for the first should not wait for a thousand others to be read.
ROW: Final = 64
#: Bytes after which a row is written: they may all be for one reader, and only a write tells that it takes nothing.
ROW_BYTES: Final = 16_384

_MODULE: Final = "uvicorn.protocols.http.httptools_impl"
#: What uvicorn reads of a request whose response has started.
_SCOPE: Final = {"type": "http", "method": "GET"}


Push = Callable[[Batch], bool]


def direct(send: Send, outbox: Outbox, stream: Stream | None = None) -> Callable[[Format], Push] | None:
    """What makes a subscription's `push` for a format, once the response has started. None: write by `send`.

    `stream` is told the time of each write.
    """
    response = _known(send)
    if response is None:
        return None
    flow, transport = response.flow, response.transport
    # The method, not an object that is called: half the cost of a call.
    return lambda form: _Pusher(flow, transport, form, outbox, stream).push


def hangup(send: Send, receive: Receive, stream: Stream) -> Hangup | None:
    """End the stream as `gone` when its reader leaves, once the response has started; `remove` it before `receive` is
    used again. None: wait in `receive`."""
    response = _known(send)
    listener: Any = getattr(receive, "__self__", None)
    if response is None or response is not listener:
        return None
    try:
        as_known = (
            response.disconnected in (True, False)
            and type(response.message_event) is asyncio.Event
            and type(response.body) is bytearray
            and callable(response.flow.resume_reading)
        )
    except AttributeError:
        return None
    if not as_known:
        return None
    _forget_request(response)
    response.message_event = heard = Hangup(response, stream)
    # It may have left before.
    heard.set()
    return heard


class Hangup:
    """Stands where uvicorn's response keeps the event for `receive`: set when a body comes or the reader leaves."""

    __slots__ = ("_response", "_stream")

    def __init__(self, response: Any, stream: Stream) -> None:
        self._response = response
        self._stream = stream

    def set(self) -> None:
        response = self._response
        if response.disconnected:
            self._stream.end("gone")
        elif response.body:
            # Nobody wants it. uvicorn reads no further when there is much of it, and would not see the reader leave.
            response.body = bytearray()
            response.flow.resume_reading()

    def remove(self) -> None:
        self._response.message_event = asyncio.Event()


def _forget_request(response: Any) -> None:
    """Make uvicorn drop the request's headers and scope. Whoever else holds them, a middleware, keeps them."""
    protocol: Any = getattr(response.on_response, "__self__", None)
    if _is(protocol, "HttpToolsProtocol") and protocol.scope is response.scope:
        protocol.scope = _SCOPE
        protocol.headers = []
    response.scope = _SCOPE


def _known(send: Send) -> Any:
    """uvicorn's response, open and as it is known; else None."""
    response: Any = getattr(send, "__self__", None)
    if not _is(response, "RequestResponseCycle"):
        return None
    try:
        as_known = (
            response.scope["method"] == "GET"
            and (response.response_started, response.response_complete) == (True, False)
            and response.chunked_encoding is True
            and response.flow.write_paused in (True, False)
            and callable(response.transport.write)
            and callable(response.transport.abort)
            and callable(response.transport.is_closing)
        )
    except (AttributeError, KeyError, TypeError):
        return None
    return response if as_known else None


def _is(thing: object, name: str) -> bool:
    return (type(thing).__module__, type(thing).__qualname__) == (_MODULE, name)


class Outbox:
    """What is pushed in one turn of the loop, written in a row at its end.

    A write is mostly the kernel's work. Between the reading of two messages each would find its memory cold, leave
    ours cold, and wake a reader that sleeps again before the next: in a row they cost a tenth less, and a client that
    reads many streams a quarter less.
    """

    __slots__ = ("_row", "_size")

    def __init__(self) -> None:
        self._row: list[tuple[Any, bytes]] = []
        self._size = 0

    def put(self, transport: Any, chunk: bytes) -> None:
        """Have the chunk written. Whatever is woken from now on writes after it."""
        row = self._row
        row.append((transport, chunk))
        self._size += len(chunk)
        if len(row) == 1:
            asyncio.get_running_loop().call_soon(self._write)
        elif len(row) == ROW or self._size >= ROW_BYTES:
            self._write()

    def _write(self) -> None:
        row, self._row, self._size = self._row, [], 0
        for transport, chunk in row:
            # Its reader may have left; the stream is told of that in another way.
            if not transport.is_closing():
                try:
                    transport.write(chunk)
                except Exception:
                    # The rest of the row is for others, who would never learn that it was lost.
                    logger.exception("a write to a reader failed, and its connection is cut")
                    transport.abort()


class _Pusher:
    """Writes the batches of one run. A reader that is behind with taking them gets none here."""

    __slots__ = ("_flow", "_frames", "_name", "_outbox", "_shared", "_stream", "_transport")

    def __init__(self, flow: Any, transport: Any, form: Format, outbox: Outbox, stream: Stream | None) -> None:
        self._flow = flow
        self._transport = transport
        self._frames = form.frames
        # One string for all readers of a format.
        self._name = sys.intern(f"{form.name}, chunked")
        self._shared = form.shared
        self._outbox = outbox
        self._stream = stream

    def push(self, batch: Batch) -> bool:
        if self._flow.write_paused or batch.size > SMALL:
            return False
        # As `Batch.encoded` does, without a further call for each of a run's readers.
        kept = batch.encodings if self._shared else None
        chunk = kept.get(self._name) if kept else None
        if chunk is None:
            frames = self._frames(batch)
            # An empty chunk would end the response.
            chunk = b"%x\r\n%b\r\n" % (len(frames), frames) if frames else b""
            if kept is not None:
                kept[self._name] = chunk
        if chunk:
            self._outbox.put(self._transport, chunk)
            if self._stream is not None:
                self._stream.wrote_at = asyncio.get_running_loop().time()
        return True
