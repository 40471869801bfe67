"""Kept: the events of one run as a worker keeps them until the run ends: encoded, and packed a block at a time.

They are wanted again when Redis has lost the log, and once at the end. Until then a worker holds a thousand
answers of a thousand events, and as objects each would be half a kilobyte that the garbage collector visits again
and again. Packed it is five bytes that the collector does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from headwater.events import Event
from headwater.streams import packing

#: Bytes that are packed together. What is not packed yet counts in full, so larger blocks would not take less.
BLOCK: Final = 16_384


class Kept:
    """Stamped events in order, from the first one of the run on."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._blocks: list[bytes] = []
        #: The events behind the last block, a line each.
        self._open = bytearray()
        self._count = 0
        self.extend(events)

    def extend(self, events: Iterable[Event]) -> None:
        for event in events:
            self._open += event.encode()
            self._open += b"\n"
            self._count += 1
            if len(self._open) >= BLOCK:
                self._blocks.append(packing.press(self._open))
                self._open = bytearray()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Event]:
        for block in (*map(packing.unpress, self._blocks), bytes(self._open)):
            # Not splitlines: an event ends at LF alone.
            yield from map(Event.decode, block.split(b"\n")[:-1])
