"""The application before its parts are there: what somebody learns who has forgotten to start them."""

from __future__ import annotations

import httpx
import pytest

from headwater.api.app import create_app
from headwater.ids import new_id
from headwater.settings import load_settings


@pytest.mark.parametrize("path", ["/api/chats", f"/api/stream/{new_id()}", "/readyz", "/metrics"])
async def test_an_application_that_was_not_started_says_so(path: str) -> None:
    app = create_app(load_settings(_env_file=None))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        answer = await http.get(path)
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "lifespan" in answer.json()["detail"]
        assert (await http.get("/healthz")).status_code == 200
