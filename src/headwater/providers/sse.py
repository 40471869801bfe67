"""Reading an SSE byte stream: bytes in, data payloads out. Pure; knows no socket and no JSON.

Only what a model's API needs of https://html.spec.whatwg.org/multipage/server-sent-events.html:
the `data` field. Event names, ids and retry times are read over.
"""

from __future__ import annotations

from typing import Final

#: Longest frame in bytes. A server that sends more without an end would fill the memory.
MAX_FRAME: Final = 8 * 1024 * 1024

_BOM: Final = b"\xef\xbb\xbf"
_CR: Final = 0x0D
_LF: Final = 0x0A


class FrameTooLarge(ValueError):
    """One frame is over the limit. The stream cannot be read on."""


class SseParser:
    """Takes the stream in pieces, cut anywhere, and gives each payload once it is whole."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max_frame = max_frame
        #: The line that has no end yet.
        self._line = bytearray()
        #: The data lines of the frame that has no end yet, and their size.
        self._data: list[bytes] = []
        self._size = 0
        #: The last byte was a CR: an LF that follows belongs to it.
        self._after_cr = False
        #: What may be the beginning of a byte order mark; None once that is decided.
        self._head: bytes | None = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads that `chunk` completes, in order. Raises FrameTooLarge."""
        if self._head is not None:
            chunk = self._behead(chunk)
        # APIs send whole frames of one data line nearly always; then two searches and a split do.
        if chunk[-2:] == b"\n\n" and not self._line and not self._data and not self._after_cr and b"\r" not in chunk:
            payloads = []
            for frame in chunk[:-2].split(b"\n\n"):
                if frame[:6] != b"data: " or b"\n" in frame:
                    break
                payloads.append(frame[6:])
            else:
                return payloads
        return self._feed_lines(chunk) if chunk else []

    def end(self) -> bytes | None:
        """The payload of a last frame without a blank line behind it, or None.

        The standard drops such a frame, as it may be cut. Its payloads are JSON objects here,
        which show by themselves whether they are whole, and some servers forget the last newline.
        """
        rest = self._feed_lines(b"\n\n") if self._line or self._data else []
        return rest[0] if rest else None

    def _behead(self, chunk: bytes) -> bytes:
        head = (self._head or b"") + chunk
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._head = head
            return b""
        self._head = None
        return head.removeprefix(_BOM)

    def _feed_lines(self, chunk: bytes) -> list[bytes]:
        if self._after_cr and chunk[0] == _LF:
            chunk = chunk[1:]
        self._after_cr = False
        if not chunk:
            return []
        # bytes.splitlines knows LF, CR and CRLF and nothing else, which is the standard's list.
        lines = chunk.splitlines()
        last = None if chunk[-1] in (_CR, _LF) else lines.pop()
        self._after_cr = chunk[-1] == _CR
        payloads: list[bytes] = []
        for part in lines:
            line = part
            if self._line:
                self._line += part
                line = bytes(self._line)
                self._line.clear()
            self._take(line, payloads)
        if last is not None:
            self._line += last
            self._check(len(self._line))
        return payloads

    def _take(self, line: bytes, payloads: list[bytes]) -> None:
        if not line:
            if self._data:
                payloads.append(b"\n".join(self._data))
                self._data = []
                self._size = 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._check(len(value) + 1)
            self._data.append(value.removeprefix(b" "))
            self._size += len(value) + 1

    def _check(self, more: int) -> None:
        if self._size + more > self._max_frame:
            raise FrameTooLarge(f"a frame of the stream is longer than {self._max_frame} bytes")
