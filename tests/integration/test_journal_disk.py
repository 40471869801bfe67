"""The journal's disk really is full, under a real server and a real worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import psycopg

from headwater.ids import new_id
from support.disk import small_disk
from support.openai_scenarios import answer
from support.reader import Reader, ask, new_chat, row_of
from support.stack import StackMaker
from support.wait import eventually

SETTINGS = {"HEADWATER_LEASE_SECONDS": "1", "HEADWATER_QUEUE_GRACE": "1", "HEADWATER_WORKER_CONCURRENCY": "4"}


async def test_a_full_disk_refuses_what_is_new_lets_answers_end_and_heals(
    make_stack: StackMaker, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        stack = await make_stack(settings={**SETTINGS, "HEADWATER_JOURNAL_PATH": str(disk.folder / "journal.db")})
        try:
            async with stack.client() as http:
                before = await ask(http, "Before. [[scenario:hello]]")
                await Reader(stack.base_url, before["task_id"]).read()
                empty = await new_chat(http)
                speaking = "It goes on. [[words:60]] [[rate:30]]"
                running = await ask(http, speaking)
                reader = Reader(stack.base_url, running["task_id"])
                reading = asyncio.create_task(reader.read())
                await eventually(lambda: len(reader.text) > 20)

                disk.fill()
                # Less than a message takes, though somebody may have given a page back meanwhile.
                assert disk.free < 20_000

                key = new_id()
                refused = await send(http, empty, key)
                assert refused.status_code == 507, refused.text
                problem = refused.json()
                assert (problem["code"], problem["title"]) == ("storage_full", "There is no room to keep the message")
                assert "Free space" in problem["detail"]
                assert (await http.post("/api/chats", json={})).status_code == 507
                # Health holds its answer for a second.
                await eventually(lambda: ready(http, 503))
                health = await http.get("/api/health")
                assert (health.status_code, health.json()["status"]) == (503, "down")
                assert "Free space" in health.json()["parts"]["journal"]["detail"]
                # Nothing was accepted, and nothing half.
                assert (await http.get(f"/api/chats/{empty}")).json()["messages"] == []
                assert (await http.get(f"/api/chats/{empty}/active-task")).json() == {"task_id": None}
                with psycopg.connect(stack.database_url) as connection:
                    count = connection.execute("SELECT count(*) FROM runs WHERE chat_id = %s", [empty]).fetchone()
                assert count == (0,)
                # What was said before is read, and what is being said is said to its end.
                assert len((await http.get(f"/api/chats/{before['chat_id']}")).json()["messages"]) == 2
                await reading
                assert (reader.end, reader.text) == ("done", answer(speaking, 60))
                # The journal has no room for it, PostgreSQL has.
                await eventually(lambda: row_of(stack, running["message_id"]) == ("done", reader.text))
                assert (await send(http, empty, key)).status_code == 507

                disk.give_back()

                await eventually(lambda: ready(http, 200))
                accepted = await send(http, empty, key)
                assert accepted.status_code == 202, accepted.text
                last = await Reader(stack.base_url, accepted.json()["task_id"]).read()
                assert (last.end, last.text) == ("done", "Hello, world")
                last_id = accepted.json()["message_id"]
                await eventually(lambda: row_of(stack, last_id) == ("done", "Hello, world"))
        finally:
            await stack.stop()


async def ready(http: httpx.AsyncClient, status: int) -> bool:
    return (await http.get("/readyz")).status_code == status


async def send(http: httpx.AsyncClient, chat_id: str, key: str) -> httpx.Response:
    # Larger than what may be left of a page that the journal holds already.
    return await http.post(
        f"/api/chats/{chat_id}/messages",
        json={"content": "Is there room? [[scenario:hello]] " + "x" * 20_000},
        headers={"Idempotency-Key": key},
    )
