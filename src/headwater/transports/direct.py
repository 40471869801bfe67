"""Frames straight onto uvicorn's transport, past `send`: no task wakes up, no message is made.

ASGI has no word for it, so it is taken only where everything looks as it is known to look: `send` is the method of
uvicorn's httptools response, that response is open and chunked, and what is used of it exists. Anything else, also a
`send` that a middleware wrapped or a uvicorn that has changed, goes by `send` and puts the same bytes on the wire.

Under the same condition a reader's leaving is heard without a task that waits in `receive`, and what uvicorn keeps of
a request that is answered already is let go. Both are a third of an idle reader's memory.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, Final

from headwater.formats.base import Format
from headwater.hub import Batch
from headwater.transports.base import Receive, Send, Stream

#: Bytes of events that are written past `send` at once. What is larger waits for a reader that has taken it.
SMALL: Final = 4096

_MODULE: Final = "uvicorn.protocols.http.httptools_impl"
#: What uvicorn reads of a request whose response has started.
_SCOPE: Final = {"type": "http", "method": "GET"}


def direct(send: Send, stream: Stream) -> Callable[[Format], Callable[[Batch], bool]] | None:
    """What makes a subscription's `push` for a format, once the response has started. None: write by `send`."""
    response = _known(send)
    if response is None:
        return None
    flow, transport = response.flow, response.transport
    return lambda form: _Push(flow, transport, form, stream)


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
            and callable(response.transport.is_closing)
        )
    except (AttributeError, KeyError, TypeError):
        return None
    return response if as_known else None


def _is(thing: object, name: str) -> bool:
    return (type(thing).__module__, type(thing).__qualname__) == (_MODULE, name)


class _Push:
    """Writes the batches of one run. A reader that is behind with taking them gets none here."""

    __slots__ = ("_flow", "_form", "_loop", "_name", "_stream", "_transport")

    def __init__(self, flow: Any, transport: Any, form: Format, stream: Stream) -> None:
        self._flow = flow
        self._transport = transport
        self._form = form
        # One string for all readers of a format.
        self._name = sys.intern(f"{form.name}, chunked")
        self._stream = stream
        self._loop = asyncio.get_running_loop()

    def __call__(self, batch: Batch) -> bool:
        if self._flow.write_paused or batch.size > SMALL or self._transport.is_closing():
            return False
        form = self._form
        chunk = batch.encoded(self._name, self._chunk) if form.shared else self._chunk(batch)
        if chunk:
            self._transport.write(chunk)
            self._stream.wrote_at = self._loop.time()
        return True

    def _chunk(self, batch: Batch) -> bytes:
        frames = self._form.frames(batch)
        # An empty chunk would end the response.
        return b"%x\r\n%b\r\n" % (len(frames), frames) if frames else b""
