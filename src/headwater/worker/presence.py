"""Presence: a worker process says that it lives, so that a server can tell whether anybody takes work."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Final

from headwater.errors import LogUnavailable
from headwater.service import Service
from headwater.streams.base import StreamLog

logger = logging.getLogger(__name__)

#: Seconds between two signs of life, and how long one holds.
EVERY: Final = 5.0
HOLDS: Final = 15.0


class Presence(Service):
    """Beats while it runs and takes its name back at the end."""

    def __init__(self, log: StreamLog) -> None:
        super().__init__()
        self._log = log
        self._worker = f"{socket.gethostname()}:{os.getpid()}"

    async def run(self) -> None:
        while True:
            await self._beat(HOLDS)
            await asyncio.sleep(EVERY)

    async def close(self) -> None:
        await self._beat(0)

    async def _beat(self, holds: float) -> None:
        try:
            await self._log.beat(self._worker, holds)
        except LogUnavailable as error:
            logger.debug("no sign of life now: %s", error)
