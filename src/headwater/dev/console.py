"""One readable log of many parts: time, a coloured name per part, the line."""

from __future__ import annotations

import sys
import threading
from typing import Final, Literal, TextIO

from headwater.clock import Clock, to_datetime

Level = Literal["", "warning", "error"]

_COLOURS: Final = (36, 32, 35, 34, 33, 96)
_LEVELS: Final[dict[Level, str]] = {"": "", "warning": "\x1b[33m", "error": "\x1b[31m"}
_WIDTH: Final = 8


class Console:
    """Writes whole lines. A terminal that went away ends the writing, not the parts."""

    def __init__(self, clock: Clock, *, colour: bool, stream: TextIO | None = None) -> None:
        self._clock = clock
        self._colour = colour
        self._stream = stream or sys.stdout
        self._names: dict[str, int] = {}
        self._lock = threading.Lock()

    def say(self, part: str, line: str, level: Level = "") -> None:
        """One line of one part."""
        code = self._names.setdefault(part, _COLOURS[len(self._names) % len(_COLOURS)])
        stamp = to_datetime(self._clock.now_ms()).astimezone().strftime("%H:%M:%S")
        name = part.ljust(_WIDTH)
        if self._colour:
            reset = "\x1b[0m" if level else ""
            self.write(f"\x1b[2m{stamp}\x1b[0m \x1b[{code}m{name} │\x1b[0m {_LEVELS[level]}{line}{reset}")
        else:
            self.write(f"{stamp} {name} │ {line}")

    def write(self, text: str) -> None:
        """Text as it is."""
        with self._lock:
            try:
                self._stream.write(f"{text}\n")
                self._stream.flush()
            except (OSError, ValueError):
                # The terminal was closed or the pipe's reader left. The log files keep what matters.
                return
