"""The application: `create_app()` for any ASGI server, `headwater server` for ours.

    uvicorn --factory headwater.api.app:create_app --timeout-graceful-shutdown 3

With a server of your own, call `app.drain()` when it is told to stop: open streams are ended then,
and their readers come back to another process. Without that they are cut at its time-out.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from headwater.access import Access, Caller
from headwater.api import chats, messages, openapi, operations, problems, tasks
from headwater.api.gate import Gate
from headwater.api.graph import Graph, assemble, started
from headwater.api.pages import Pages
from headwater.clock import SystemClock
from headwater.errors import HeadwaterError
from headwater.settings import Settings, load_settings
from headwater.telemetry import Telemetry
from headwater.transports.base import Receive, Scope, Send

logger = logging.getLogger(__name__)


class App:
    """The ASGI application of one process. Its parts live between the lifespan's start and end."""

    def __init__(self, settings: Settings, process: str = "") -> None:
        self.settings = settings
        self.telemetry = Telemetry(process)
        self.api = make_api()
        access = Access(settings)
        pages = Pages(access)
        self._gate = Gate(
            access=access,
            stream=self._stream,
            pages=pages,
            api=self.api,
            is_page=pages.has,
            telemetry=self.telemetry,
            clock=SystemClock(),
            max_body=settings.max_body,
        )

    @property
    def graph(self) -> Graph | None:
        """None before the lifespan's start and after its end."""
        graph: Graph | None = self.api.state.graph
        return graph

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(scope, receive, send)

    def answer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """The same, for who need not be told by its kind that this is an ASGI 3 application."""
        return self._lifespan(receive, send) if scope["type"] == "lifespan" else self._gate(scope, receive, send)

    def drain(self) -> None:
        """End the open streams cleanly and take no new ones. On the event loop; harmless the second time."""
        if self.graph is not None:
            self.graph.streams.drain()

    async def _stream(
        self, scope: Scope, receive: Receive, send: Send, caller: Caller, run_id: str | None, request_id: str
    ) -> Awaitable[None]:
        return await started(self.graph).stream.open(scope, receive, send, caller, run_id, request_id)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Make and start the parts; stop them at the end. For an application that mounts this one: a server
        speaks the lifespan protocol with the outermost application only."""
        try:
            async with assemble(self.settings, self.telemetry) as self.api.state.graph:
                yield
                self.drain()
        finally:
            self.api.state.graph = None

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        started = False
        try:
            async with self.lifespan():
                started = True
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except HeadwaterError as error:
            if started:
                raise
            # A sentence that says what to do, instead of a traceback.
            await send({"type": "lifespan.startup.failed", "message": f"headwater cannot start: {error}"})
            return
        await send({"type": "lifespan.shutdown.complete"})


def create_app(settings: Settings | None = None, process: str = "") -> App:
    """The application; the settings come from the environment unless given. Raises SettingsError.

    `process` names it in its metrics when several share one address.
    """
    return App(settings or load_settings(), process)


def make_api() -> FastAPI:
    """The JSON routes, without parts: they are found at `state.graph`."""
    api = FastAPI(
        title="headwater",
        version=version("headwater"),
        description="Runs long AI work in the background and streams it to people without losing a word. "
        "Errors are problem documents (RFC 9457) with a stable `code`.",
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    api.state.graph = None
    routers = [room.router for room in (chats, messages, tasks, operations)]
    for router in routers:
        api.include_router(router)
    problems.install(api, [route for router in routers for route in router.routes])
    openapi.install(api)
    return api
