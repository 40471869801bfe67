"""A client as the page is one: asks, follows a run to its end whatever happens to the connection, looks at the rows."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson
import psycopg

from .stack import Stack

TERMINAL = {"done", "error", "cancelled"}


class Reader:
    """A client that follows a run as the page does: comes back with its cursor until the end, forgets at a reset."""

    def __init__(self, base_url: str, run_id: str, cursor: str = "") -> None:
        self.base_url = base_url
        self.run_id = run_id
        self.cursor = cursor
        self.events: list[dict[str, Any]] = []
        self.connections = 0
        self.statuses: list[int] = []
        self.text = ""
        #: Stop after so many events, as a page that is closed.
        self.leave_after = 10**9

    @property
    def end(self) -> str | None:
        return self.events[-1]["type"] if self.events and self.events[-1]["type"] in TERMINAL else None

    async def read(self, timeout: float = 120) -> Reader:
        async with asyncio.timeout(timeout), httpx.AsyncClient(timeout=60, trust_env=False) as http:
            while self.end is None and len(self.events) < self.leave_after:
                try:
                    await self._connect(http)
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        return self

    async def _connect(self, http: httpx.AsyncClient) -> None:
        headers = {"last-event-id": self.cursor} if self.cursor else {}
        async with http.stream("GET", f"{self.base_url}/api/stream/{self.run_id}", headers=headers) as stream:
            self.statuses.append(stream.status_code)
            if stream.status_code == 503:
                return
            assert stream.status_code == 200, await stream.aread()
            self.connections += 1
            frame: dict[str, str] = {}
            async for line in stream.aiter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    frame[name] = value
                elif "data" in frame:
                    self._take(frame["id"], orjson.loads(frame["data"]))
                    frame = {}
                    if self.end or len(self.events) >= self.leave_after:
                        return
                else:
                    frame = {}

    def _take(self, cursor: str, event: dict[str, Any]) -> None:
        epoch, _, seq = cursor.partition("-")
        before, _, last = self.cursor.partition("-")
        assert int(seq) == event["seq"]
        if before == epoch:
            # Once, in order, without a hole.
            assert event["seq"] == int(last) + 1
        self.cursor = cursor
        self.events.append(event)
        if event["type"] == "reset":
            self.text = ""
        elif event["type"] == "content":
            self.text += event["text"]


async def new_chat(http: httpx.AsyncClient) -> str:
    made = await http.post("/api/chats", json={})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def ask(http: httpx.AsyncClient, question: str, chat_id: str | None = None) -> dict[str, Any]:
    chat_id = chat_id or await new_chat(http)
    accepted = await http.post(f"/api/chats/{chat_id}/messages", json={"content": question})
    assert accepted.status_code == 202, accepted.text
    body: dict[str, Any] = accepted.json()
    return body


async def message_of(http: httpx.AsyncClient, accepted: dict[str, Any]) -> dict[str, Any]:
    """The answer as a page shows it."""
    chat = (await http.get(f"/api/chats/{accepted['chat_id']}")).json()
    found: dict[str, Any] = next(one for one in chat["messages"] if one["id"] == accepted["message_id"])
    return found


def row_of(stack: Stack, message_id: str) -> tuple[str, str]:
    """The answer as PostgreSQL has it: status and content."""
    with psycopg.connect(stack.database_url) as connection:
        row = connection.execute("SELECT status, content FROM messages WHERE id = %s", [message_id]).fetchone()
    assert row is not None
    return row[0], row[1]
