"""Mounted in somebody's own FastAPI application, as the guide says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI

from headwater.api.app import create_app
from support.api import settings_for


async def test_it_serves_beside_the_applications_own_routes(redis_url: str, database_url: str, tmp_path: Path) -> None:
    chat = create_app(settings_for(tmp_path, redis_url, database_url))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with chat.lifespan():
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/mine")
    async def mine() -> dict[str, str]:
        return {"whose": "mine"}

    app.mount("/", chat)

    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http,
    ):
        assert (await http.get("/mine")).json() == {"whose": "mine"}
        created = await http.post("/api/chats", json={"title": "Mounted"})
        assert created.status_code == 201
        chats = (await http.get("/api/chats")).json()["items"]
        assert [chat["title"] for chat in chats] == ["Mounted"]
        assert "headwater" in (await http.get("/")).text
    assert chat.graph is None
