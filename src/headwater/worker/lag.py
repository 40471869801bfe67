"""How late the event loop is: what every run of the process waits in addition."""

from __future__ import annotations

import asyncio
from typing import Final

from headwater.service import Service
from headwater.telemetry import Telemetry

#: Seconds between two measurements.
EVERY: Final = 0.5


class LoopLag(Service):
    """Measures by how much its own sleep is too long."""

    def __init__(self, telemetry: Telemetry) -> None:
        super().__init__()
        self._telemetry = telemetry

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + EVERY
            await asyncio.sleep(EVERY)
            self._telemetry.observe("headwater_loop_lag_seconds", max(0.0, loop.time() - due))
