"""Packing: the log of a run that has ended as a few zstd frames, a tenth of its size.

A frame holds some hundreds of events, one JSON object per line, so that a page needs one frame and
not the whole log. The list then has a frame per item, and `packed` of the hash has the first seq of
each: `1,812,1640`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import zstandard

#: Bytes of events in one frame, unless a single event has more. What a reader unpacks for one page.
FRAME_BYTES: Final = 131_072
#: Higher ones take twice the time for a few hundredths.
LEVEL: Final = 6
#: Of what is packed on an event loop: 16 KB take 20 µs, which a higher level takes three times.
QUICK: Final = 1


@dataclass(frozen=True, slots=True)
class Packed:
    """Frames in order, and the seq of the first event in each."""

    firsts: Sequence[int]
    frames: Sequence[bytes]


def pack(raws: Sequence[bytes]) -> Packed:
    """Encoded events from seq 1 on. Takes milliseconds per megabyte: not on an event loop."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    firsts: list[int] = []
    frames: list[bytes] = []
    part: list[bytes] = []
    size = 0
    for seq, raw in enumerate(raws, 1):
        if part and size + len(raw) > FRAME_BYTES:
            frames.append(compressor.compress(b"\n".join(part)))
            part, size = [], 0
        if not part:
            firsts.append(seq)
        part.append(raw)
        size += len(raw) + 1
    if part:
        frames.append(compressor.compress(b"\n".join(part)))
    return Packed(firsts, frames)


def page(frame: bytes, first: int, after: int, limit: int, most: int) -> list[bytes]:
    """The events of a frame whose first seq is `first` that come after `after`, until `most` bytes are reached."""
    events: list[bytes] = []
    size = 0
    skipped = after + 1 - first
    for raw in zstandard.ZstdDecompressor().decompress(frame).split(b"\n")[skipped : skipped + limit]:
        events.append(raw)
        size += len(raw)
        if size >= most:
            break
    return events


def press(lines: bytes | bytearray) -> bytes:
    """Some kilobytes as one frame, at once."""
    return zstandard.ZstdCompressor(level=QUICK).compress(lines)


def unpress(frame: bytes) -> bytes:
    """What `press` was given."""
    return zstandard.ZstdDecompressor().decompress(frame)
