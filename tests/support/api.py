"""The API inside the test's own process and event loop, on a real port over real Redis and PostgreSQL."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from headwater.access import LOCAL_OWNER, Caller
from headwater.api.app import App, create_app
from headwater.api.graph import Graph
from headwater.api.server import Server, configure
from headwater.events import Event
from headwater.runs import Lease
from headwater.settings import Settings, load_settings
from headwater.streams import connect
from headwater.streams.base import StreamLog


@dataclass
class Api:
    """A running server, a client of it, and a log of the same Redis for the part of a worker."""

    app: App
    server: Server
    base_url: str
    http: httpx.AsyncClient
    log: StreamLog

    @property
    def graph(self) -> Graph:
        assert self.app.graph is not None
        return self.app.graph

    async def chat(self, **body: Any) -> str:
        """A new chat's id."""
        answer = await self.http.post("/api/chats", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def ask(self, chat_id: str, content: str = "Hello?") -> dict[str, Any]:
        """What the 202 says."""
        answer = await self.http.post(f"/api/chats/{chat_id}/messages", json={"content": content})
        assert answer.status_code == 202, answer.text
        accepted: dict[str, Any] = answer.json()
        return accepted

    async def claim(self, run_id: str) -> Lease:
        """Take a run as a worker does."""
        return await self.log.claim(await self.graph.reading.run_view(Caller(LOCAL_OWNER), run_id), "test")

    async def say(self, lease: Lease, first: int, *events: Event) -> None:
        """Append events from seq `first` on."""
        stamped = [event.stamped(first + i, 1_767_225_600_000) for i, event in enumerate(events)]
        await self.log.append(lease, stamped)


def settings_for(folder: Path, redis_url: str | None, database_url: str, **changes: Any) -> Settings:
    """Settings that take nothing from the machine's environment that matters here."""
    fixed: dict[str, Any] = {
        "OPENAI_API_KEY": None,
        "OPENAI_BASE_URL": None,
        "HEADWATER_ACCESS_TOKEN": None,
        "HOST": "127.0.0.1",
        "REDIS_URL": redis_url,
        "DATABASE_URL": database_url,
        "HEADWATER_DATA_DIR": folder,
    }
    return load_settings(_env_file=None, **{**fixed, **changes})


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Api]:
    """The API on a free port until the end of the block, which it must reach cleanly."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = configure(app, settings)
    server = Server(config, app)
    # Not `serve`: the test's process keeps its own signal handlers.
    task = asyncio.create_task(server._serve([listener]))
    try:
        while not server.started:
            if task.done():
                task.result()
            await asyncio.sleep(0.005)
        log = connect(settings.need_redis(), ttl=settings.stream_ttl, lease_seconds=settings.lease_seconds)
        async with httpx.AsyncClient(base_url=base_url, timeout=60, trust_env=False) as http:
            try:
                yield Api(app, server, base_url, http, log)
            finally:
                await log.close()
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 60)
        listener.close()
