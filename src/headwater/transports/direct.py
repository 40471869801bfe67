"""Frames straight onto uvicorn's transport, past `send`: no task wakes up, no message is made.

ASGI has no word for it, so it is taken only where everything looks as it is known to look: `send` is the method of
uvicorn's httptools response, that response is open and chunked, and what is used of it exists. Anything else, also a
`send` that a middleware wrapped or a uvicorn that has changed, goes by `send` and puts the same bytes on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from headwater.formats.base import Format
from headwater.hub import Batch
from headwater.transports.base import Send, Stream

#: Bytes of events that are written past `send` at once. What is larger waits for a reader that has taken it.
SMALL: Final = 4096

_KNOWN: Final = ("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle")


def direct(send: Send, stream: Stream) -> Callable[[Format], Callable[[Batch], bool]] | None:
    """What makes a subscription's `push` for a format, once the response has started. None: write by `send`."""
    response: Any = getattr(send, "__self__", None)
    if (type(response).__module__, type(response).__qualname__) != _KNOWN:
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
    if not as_known:
        return None
    flow, transport = response.flow, response.transport
    return lambda form: _Push(flow, transport, form, stream)


class _Push:
    """Writes the batches of one run. A reader that is behind with taking them gets none here."""

    __slots__ = ("_closing", "_flow", "_form", "_name", "_now", "_stream", "_write")

    def __init__(self, flow: Any, transport: Any, form: Format, stream: Stream) -> None:
        self._flow = flow
        self._closing = transport.is_closing
        self._write = transport.write
        self._form = form
        self._name = f"{form.name}, chunked"
        self._stream = stream
        self._now = asyncio.get_running_loop().time

    def __call__(self, batch: Batch) -> bool:
        if self._flow.write_paused or batch.size > SMALL or self._closing():
            return False
        form = self._form
        chunk = batch.encoded(self._name, self._chunk) if form.shared else self._chunk(batch)
        if chunk:
            self._write(chunk)
            self._stream.wrote_at = self._now()
        return True

    def _chunk(self, batch: Batch) -> bytes:
        frames = self._form.frames(batch)
        # An empty chunk would end the response.
        return b"%x\r\n%b\r\n" % (len(frames), frames) if frames else b""
