"""What happened a moment ago, without a time for each."""

from __future__ import annotations

import asyncio


class Lately:
    """The names noted within a period of so many seconds. All are forgotten at its end, so it holds no older one.

    Belongs to an event loop.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        self._ends = 0.0
        self._names: set[str] = set()

    def add(self, name: str) -> None:
        self._turn()
        self._names.add(name)

    def __contains__(self, name: str) -> bool:
        self._turn()
        return name in self._names

    def _turn(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._ends:
            self._names.clear()
            self._ends = now + self._period
