"""Batch: events on their way to readers, encoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headwater.events import Event


class Batch:
    """What a subscription yields: events of consecutive seqs.

    `reset`: history before was lost; forget what was shown, all comes again under `epoch`. Neither
    events nor reset: a heartbeat. A batch is shared by all readers it suits, and so is its encoding.
    """

    __slots__ = ("_encoded", "_size", "born", "epoch", "events", "reset")

    def __init__(self, epoch: str, events: Sequence[Event] = (), reset: bool = False) -> None:
        self.epoch = epoch
        self.events = events
        self.reset = reset
        #: When its first event was made, in Unix milliseconds, while a batch that was pushed waits to be timed; else 0.
        self.born = 0
        self._encoded: dict[str, bytes] | None = None
        self._size = -1

    def encoded(self, name: str, encode: Callable[[Batch], bytes]) -> bytes:
        """The batch in the format `name`, encoded by the first who asks."""
        if self._encoded is None:
            self._encoded = {}
        encoded = self._encoded.get(name)
        if encoded is None:
            encoded = self._encoded[name] = encode(self)
        return encoded

    @property
    def size(self) -> int:
        """Bytes of the events."""
        if self._size < 0:
            self._size = sum(len(event.encode()) for event in self.events)
        return self._size

    def __repr__(self) -> str:
        seqs = f"{self.events[0].seq}..{self.events[-1].seq}" if self.events else "-"
        return f"Batch({self.epoch} {seqs}{' reset' if self.reset else ''})"
