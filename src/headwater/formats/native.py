"""The native SSE frames.

    id: <epoch>-<seq>
    event: <type>
    data: {"seq":7,"type":"content","at":1767225600123,"text":"Hello"}

Several runs on one connection say in `data`, before all else, whose event it is: `{"run_id":"…","seq":7,…}`.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from headwater.events import EventType
from headwater.formats.base import Format
from headwater.hub import Batch

#: A comment: keeps proxies and clients from taking a quiet stream for a dead one.
HEARTBEAT: Final = b": hb\n\n"


class Native(Format):
    """One run per stream."""

    name = "native"

    def frames(self, batch: Batch) -> bytes:
        if len(batch.lines) == 1 and not batch.reset:
            # Nearly always, and the hottest line of the server.
            ((seq, kind, raw),) = batch.lines
            return b"id: %b-%d\nevent: %b\ndata: %b\n\n" % (batch.epoch.encode(), seq, kind, raw)
        return native(batch)


class NativeOf(Format):
    """One of several runs on a stream. A batch belongs to one run, so its frames are shared as well."""

    name = "native-of-run"

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def frames(self, batch: Batch) -> bytes:
        return native(batch, self._run_id)


def native(batch: Batch, run_id: str | None = None) -> bytes:
    """The batch as SSE frames. With `run_id`, every frame's data names the run."""
    epoch = batch.epoch.encode()
    head = b"" if run_id is None else b'{"run_id":"%b",' % run_id.encode()
    frames: list[bytes] = []
    if batch.reset:
        # Not an event of the log: it says that what the reader saw belongs to a log that is gone.
        # It has no time of its own, so that every server says the same.
        at = batch.events[0].at if batch.lines else 0
        data = {"seq": 0, "type": EventType.RESET.value, "at": at, "reason": "history_lost"}
        frames.append(_frame(epoch, 0, b"reset", head, orjson.dumps(data)))
    frames += [_frame(epoch, seq, kind, head, raw) for seq, kind, raw in batch.lines]
    return b"".join(frames)


def _frame(epoch: bytes, seq: int, kind: bytes, head: bytes, raw: bytes) -> bytes:
    # The event's JSON is spliced, not read and written again.
    return b"id: %b-%d\nevent: %b\ndata: %b%b\n\n" % (epoch, seq, kind, head, raw[1:] if head else raw)


def said(run_id: str, event: EventType, data: dict[str, Any]) -> bytes:
    """A frame about one run of several that is no event of its log: no `id`, no `seq`, so no cursor moves."""
    body = orjson.dumps({"run_id": run_id, "type": event.value, **data})
    return b"event: " + event.value.encode() + b"\ndata: " + body + b"\n\n"
