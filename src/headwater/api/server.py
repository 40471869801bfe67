"""The server process: uvicorn with uvloop and httptools, told to end its streams before it waits for them.

uvicorn closes its listener at SIGTERM, then waits for open responses, and only then runs the
lifespan's end. An open stream would hold that up until it is cut, so the streams are ended first.
"""

from __future__ import annotations

import signal
import socket
import sys
from types import FrameType
from typing import Final

import uvicorn

from headwater.api.app import App
from headwater.settings import Settings

#: Seconds open requests may take after SIGTERM before they are cancelled.
GRACE: Final = 3


class Server(uvicorn.Server):
    """uvicorn's server that drains the application first, and for which a signal is a normal end."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn raises the signal again at the end, which makes a clean stop look like a crash to a supervisor.
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def configure(app: App, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings; the same for the command and for tests."""
    return uvicorn.Config(
        app,
        # Python's own loop where uvloop does not exist.
        loop="auto" if sys.platform == "win32" else "uvloop",
        http="httptools",
        ws="websockets-sansio",
        lifespan="on",
        log_config=None,
        access_log=settings.debug,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
        # Longer than what load balancers keep idle connections, so that they close first.
        timeout_keep_alive=75,
        # A reader of streams holds a connection each; the default of 2048 is the kernel's queue, not their number.
        backlog=2048,
    )
