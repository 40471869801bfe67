"""Batch: events on their way to readers, encoded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from headwater.events import ENDING, Event

#: Seq, type and encoded form of an event: what it takes to hand it on.
Line = tuple[int, bytes, bytes]


class Batch:
    """Events of consecutive seqs of one run.

    `reset`: history before was lost; forget what was shown, all comes again under `epoch`. Neither
    events nor reset: a heartbeat. A batch is shared by all readers it suits, and so is its encoding.

    What was published stays lines: a server hands most of it on as it came, and an Event of each would cost a good part
    of all that is done with it. `events` makes them when somebody asks.
    """

    __slots__ = ("_events", "encodings", "epoch", "first", "last", "lines", "reset", "size", "terminal", "timed")

    def __init__(self, epoch: str, events: Sequence[Event] = (), *, reset: bool = False) -> None:
        self.epoch = epoch
        self.reset = reset
        self._events: Sequence[Event] | None = events
        #: Each event's seq, type and encoded form.
        self.lines: Sequence[Line] = [(event.seq, event.type.value.encode(), event.encode()) for event in events]
        #: Seqs of the first and the last event; 0 without events.
        self.first = events[0].seq if events else 0
        self.last = events[-1].seq if events else 0
        #: The last event ends the run.
        self.terminal = bool(events) and events[-1].terminal
        #: Bytes of the events.
        self.size = sum([len(raw) for _, _, raw in self.lines])
        #: It is to be timed, and was not passed on yet.
        self.timed = False
        #: What was encoded already, by the name of the format. None where nobody else will want it: most of what is
        #: published has one reader.
        self.encodings: dict[str, bytes] | None = {}

    @classmethod
    def published(cls, payload: bytes) -> Self:
        """The batch of `<epoch> <first seq>\\n<event>\\n<event>…`; without events when there are none.

        Raises ValueError.
        """
        # Nearly always one event as we encode it, and this the hottest path of a server: no Event and no regex, whose
        # groups alone cost as much as all of this.
        try:
            head, raw = payload.split(b"\n")
            epoch, first = head.split(b" ")
            _, seq, _, type_, _, kind, _ = raw.split(b'"', 6)
        except ValueError:
            return cls._read(payload)
        if seq != b"seq" or type_ != b"type":
            return cls._read(payload)
        batch = cls.__new__(cls)
        batch.epoch = epoch.decode()
        batch.first = batch.last = number = int(first)
        batch.lines = ((number, kind, raw),)
        batch.size = len(raw)
        batch.terminal = kind in ENDING
        batch.reset = batch.timed = False
        batch._events = batch.encodings = None
        return batch

    @classmethod
    def _read(cls, payload: bytes) -> Self:
        """The same of any message."""
        start, _, lines = payload.partition(b"\n")
        epoch = start[: start.find(b" ")].decode()
        return cls(epoch, [Event.decode(line) for line in lines.split(b"\n")] if lines else [])

    @property
    def events(self) -> Sequence[Event]:
        if self._events is None:
            self._events = [Event.decode(raw) for _, _, raw in self.lines]
        return self._events

    def take_born(self) -> int:
        """When its first event was made, in Unix milliseconds, for the first who passes on what is timed; else 0."""
        if not self.timed:
            return 0
        self.timed = False
        return self.events[0].at

    def encoded(self, name: str, encode: Callable[[Batch], bytes]) -> bytes:
        """The batch in the format `name`, encoded by the first who asks."""
        if self.encodings is None:
            self.encodings = {}
        encoded = self.encodings.get(name)
        if encoded is None:
            encoded = self.encodings[name] = encode(self)
        return encoded

    def __repr__(self) -> str:
        seqs = f"{self.first}..{self.last}" if self.lines else "-"
        return f"Batch({self.epoch} {seqs}{' reset' if self.reset else ''})"
