"""The server process: uvicorn with uvloop and httptools, told to end its streams before it waits for them.

uvicorn closes its listener at SIGTERM, then waits for open responses, and only then runs the
lifespan's end. An open stream would hold that up until it is cut, so the streams are ended first.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable
from types import FrameType
from typing import Any, Final

import uvicorn
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from headwater.api.app import App
from headwater.settings import Settings
from headwater.transports.base import Receive, Scope, Send

#: Seconds open requests may take after SIGTERM before they are cancelled.
GRACE: Final = 3


class Server(uvicorn.Server):
    """uvicorn's server that drains the application first, and for which a signal is a normal end."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            # uvicorn's own code for it is 3, which our commands do not have.
            raise SystemExit(1) from None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn raises the signal again at the end, which makes a clean stop look like a crash to a supervisor.
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


class _Front:
    """The application behind uvicorn's reading of X-Forwarded-For and -Proto.

    uvicorn's own way is a coroutine around each request. Under an open stream it would lie for hours, and keep the
    request with its headers: a tenth of an idle reader's memory.
    """

    def __init__(self, app: App, trusted_hosts: list[str] | str) -> None:
        self._app = app
        self._forwarded: Any = ProxyHeadersMiddleware(_nothing, trusted_hosts)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # It changes the scope and waits for nothing.
        with contextlib.suppress(StopIteration):
            self._forwarded(scope, receive, send).send(None)
        return self._app.answer(scope, receive, send)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    pass


def configure(app: App, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings; the same for the command and for tests."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
        # Done in front.
        proxy_headers=False,
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
    )
    front: Any = _Front(app, config.forwarded_allow_ips)
    config.app = front
    return config
