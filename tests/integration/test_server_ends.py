"""A server process that ends while it streams or replies: its readers get whole frames and go on at another one."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson

from headwater.ids import new_id
from support.openai_scenarios import Scenario, Step, answer, chunk, pieces
from support.openai_server import OpenAIServer
from support.reader import Reader, ask
from support.stack import StackMaker
from support.wait import eventually

READERS = 20


async def test_streams_end_between_frames_and_go_on_at_another_server(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    stack = await make_stack(servers=2, settings={"HEADWATER_FLUSH_MS": "0"})
    name = f"end-{new_id()}"
    question = f"End [[scenario:{name}]]"
    whole = answer(question, 600)
    words: list[Step] = [step for word in pieces(whole) for step in ({"chunk": chunk(word)}, {"sleep": 1 / 150})]
    # It ends in the middle of what it streams, and in any case before its last word.
    openai_server.scenarios[name] = Scenario(
        [*words[:-2], {"wait": name}, *words[-2:], {"chunk": chunk(finish="stop")}, {"done": True}]
    )
    async with stack.client() as http:
        accepted = await ask(http, question)
    bodies = [bytearray() for _ in range(READERS)]

    async def read(body: bytearray) -> None:
        async with (
            httpx.AsyncClient(timeout=60, trust_env=False) as http,
            http.stream("GET", f"{stack.base_url}/api/stream/{accepted['task_id']}") as stream,
        ):
            # A chunked body that does not come to its proper end raises here.
            async for data in stream.aiter_raw():
                body += data

    reading = asyncio.gather(*map(read, bodies))
    await eventually(lambda: min(map(len, bodies)) > 5_000, 60)
    await stack.server.terminate()
    await reading
    assert stack.server.exit_code == 0
    assert "Traceback" not in stack.server.log()
    ends = {}
    for body in bodies:
        frames = body.decode().split("\n\n")
        assert frames.pop() == ""
        # The last word is when to come back.
        assert "\nretry: " in frames[-1]
        events = [_event(frame) for frame in frames if "data: " in frame]
        assert [event["seq"] for _, event in events] == list(range(1, len(events) + 1))
        cursor = events[-1][0]
        ends[cursor] = "".join(event["text"] for _, event in events if event["type"] == "content")
    openai_server.release(name)
    for cursor, said in ends.items():
        assert whole.startswith(said)
        assert len(said) < len(whole)
        rest = await Reader(stack.servers[1].base_url, accepted["task_id"], cursor).read()
        assert said + rest.text == whole


async def test_a_request_whose_reply_is_lost_with_its_server_is_repeated_at_another(make_stack: StackMaker) -> None:
    # The run may die with the server before it is enqueued; then it waits for the grace.
    stack = await make_stack(servers=2, settings={"HEADWATER_QUEUE_GRACE": "2"})
    async with stack.client(0) as one, stack.client(1) as two:
        chat = (await one.post("/api/chats", json={})).json()["id"]
        key = {"Idempotency-Key": new_id()}
        body = {"content": "Once [[scenario:hello]]"}
        first = await one.post(f"/api/chats/{chat}/messages", json=body, headers=key)
        stack.server.kill()
        again = await two.post(f"/api/chats/{chat}/messages", json=body, headers=key)
        assert (again.status_code, again.json()) == (202, first.json())
        other = await two.post(f"/api/chats/{chat}/messages", json={"content": "Twice"}, headers=key)
        assert other.status_code == 422
        assert (await Reader(stack.servers[1].base_url, again.json()["task_id"]).read()).text == "Hello, world"
        assert len((await two.get(f"/api/chats/{chat}")).json()["messages"]) == 2


def _event(frame: str) -> tuple[str, dict[str, Any]]:
    lines = dict(line.split(": ", 1) for line in frame.split("\n"))
    return lines["id"], orjson.loads(lines["data"])
