"""The write-ahead log as bytes: whether SQLite would take damage in its middle for its end.

SQLite reads a log up to the first frame whose checksum is wrong. That is right for a commit that was
cut off by a power failure, and wrong for a sector that went bad: it would drop, without a word, every
commit behind it. What tells the two apart is that each commit is on the disk before the next one
begins. So where a frame is wrong, a commit ends there or later, and what follows that commit continues
its checksum, the wrong frame had been written well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_HEADER: Final = 32
_FRAME_HEADER: Final = 24
#: How a log begins; the last bit says in which byte order its words are summed.
_ORDER: Final = {b"\x37\x7f\x06\x82": "<", b"\x37\x7f\x06\x83": ">"}


class Frame(NamedTuple):
    """A version of a page. Frames that an earlier turn of the log has left behind are not `own`."""

    own: bool
    #: Its checksum continues that of the frame before.
    good: bool
    page: int
    #: Pages of the database after the commit that it ends; 0 for any other frame.
    commit: int
    data: bytes


def damage(log: Path) -> str:
    """What is wrong with a log before its end, in words; empty when nothing is. Others may write it meanwhile."""
    last: tuple[bytes, int] | None = None
    while (found := _damaged(_content(log))) is not None:
        if found == last:
            frame = found[1]
            return f"frame {frame} of its write-ahead log is wrong" if frame else "its write-ahead log cannot be read"
        # Was it read while somebody wrote there? That was over before the next commit began.
        last = found
    return ""


def fold_in(path: Path, log: Path) -> None:
    """Write every good frame of a damaged log into the database file, those behind the damage too, and remove the log.

    Where a frame was wrong, the page stays as old as it was, unless a later frame has it.
    """
    content = log.read_bytes()
    if not _readable(content):
        return
    frames = [frame for frame in _frames(content) if frame.own]
    while frames and not frames[-1].commit:
        frames.pop()
    with path.open("r+b") as file:
        for frame in frames:
            if frame.good:
                file.seek((frame.page - 1) * len(frame.data))
                file.write(frame.data)
        # Where the header keeps the size.
        file.seek(28)
        file.write(struct.pack(">I", frames[-1].commit))
    log.unlink()


def _content(log: Path) -> bytes:
    try:
        return log.read_bytes()
    except FileNotFoundError:
        return b""


def _damaged(log: bytes) -> tuple[bytes, int] | None:
    """The log's salts, which change with every turn of it, and the first wrong frame, from 1; 0 for its header."""
    if len(log) < _HEADER:
        # It was only begun.
        return None
    if not _readable(log):
        return log[16:24], 0
    wrong, ended = 0, False
    for number, frame in enumerate(_frames(log), 1):
        if wrong and ended and frame.good:
            return log[16:24], wrong
        if not wrong and not frame.good:
            wrong = number
        ended = frame.own and frame.commit > 0
    return None


def _readable(log: bytes) -> bool:
    order = _ORDER.get(log[:4])
    return bool(order) and _summed(struct.unpack(f"{order}6I", log[:24]), 0, 0) == struct.unpack_from(">II", log, 24)


def _frames(log: bytes) -> Iterator[Frame]:
    (size,) = struct.unpack_from(">I", log, 8)
    words = struct.Struct(f"{_ORDER[log[:4]]}{(8 + size) // 4}I")
    sums: tuple[int, ...] = struct.unpack_from(">II", log, 24)
    for at in range(_HEADER, len(log) - _FRAME_HEADER - size + 1, _FRAME_HEADER + size):
        page, commit = struct.unpack_from(">II", log, at)
        data = log[at + _FRAME_HEADER : at + _FRAME_HEADER + size]
        own = log[at + 8 : at + 16] == log[16:24]
        said = struct.unpack_from(">II", log, at + 16)
        good = own and _summed(words.unpack(log[at : at + 8] + data), *sums) == said
        yield Frame(own, good, page, commit, data)
        sums = said


def _summed(words: tuple[int, ...], one: int, two: int) -> tuple[int, int]:
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return one, two
