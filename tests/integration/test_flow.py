"""The whole way: a real server and a real worker over real Redis and PostgreSQL, and a scripted model's API."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import httpx
import orjson
import psycopg
import pytest

from headwater.ids import new_id
from support.openai_scenarios import answer
from support.openai_server import OpenAIServer
from support.reader import Reader, ask, message_of, new_chat, row_of
from support.stack import Stack, StackMaker
from support.wait import eventually


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with stack.client() as client:
        yield client


async def test_a_question_is_answered_word_by_word_and_kept(stack: Stack, http: httpx.AsyncClient) -> None:
    question = "What is a river? [[words:30]] [[rate:200]]"
    accepted = await ask(http, question)
    reader = await Reader(stack.base_url, accepted["task_id"]).read()
    assert reader.text == answer(question, 30)
    assert reader.end == "done"
    assert [event["seq"] for event in reader.events] == list(range(1, len(reader.events) + 1))
    assert len([event for event in reader.events if event["type"] == "content"]) > 3

    # Whoever has seen the end finds it, in PostgreSQL or on its way there.
    message = await message_of(http, accepted)
    assert (message["content"], message["status"]) == (reader.text, "done")
    assert message["usage"]["total_tokens"] > 0
    assert message["model"]
    await eventually(lambda: row_of(stack, accepted["message_id"]) == ("done", reader.text))
    task = (await http.get(f"/api/task/{accepted['task_id']}")).json()
    assert (task["status"], task["attempt"], task["error"]) == ("done", 1, None)
    assert task["started_at"] <= task["ended_at"]
    assert (await http.get(f"/api/chats/{accepted['chat_id']}/active-task")).json() == {"task_id": None}
    past = await http.get(f"/api/stream/{accepted['task_id']}", headers={"last-event-id": reader.cursor})
    assert past.status_code == 204


async def test_a_page_that_comes_back_in_the_middle_gets_the_same_from_every_cursor(
    stack: Stack, http: httpx.AsyncClient
) -> None:
    question = "Come back. [[words:60]] [[rate:60]]"
    accepted = await ask(http, question)
    first = Reader(stack.base_url, accepted["task_id"])
    first.leave_after = 8
    await first.read()
    assert first.end is None
    # The page asks what is going on, and goes on where it was; others begin everywhere, while it speaks.
    active = (await http.get(f"/api/chats/{accepted['chat_id']}/active-task")).json()
    assert active == {"task_id": accepted["task_id"]}
    epoch = first.cursor.partition("-")[0]
    others = [Reader(stack.base_url, accepted["task_id"], f"{epoch}-{seq}" if seq else "") for seq in range(9)]
    first.leave_after = 10**9
    await asyncio.gather(first.read(), *(other.read() for other in others))
    assert first.text == answer(question, 60)
    for seq, other in enumerate(others):
        assert other.events == first.events[seq:]
    # And from every cursor there is, now that it is over.
    for seq in range(0, len(first.events), 5):
        assert (await Reader(stack.base_url, accepted["task_id"], f"{epoch}-{seq}").read()).events == first.events[seq:]


async def test_two_readers_see_the_same(stack: Stack, http: httpx.AsyncClient) -> None:
    accepted = await ask(http, "Two of you. [[words:40]] [[rate:150]]")
    one, two = await asyncio.gather(*(Reader(stack.base_url, accepted["task_id"]).read() for _ in range(2)))
    assert one.events == two.events
    assert one.end == "done"


async def test_two_chats_stream_at_once_over_one_connection(stack: Stack, http: httpx.AsyncClient) -> None:
    runs = [await ask(http, f"Chat {number} [[words:20]] [[rate:100]]") for number in range(3)]
    ids = [run["task_id"] for run in runs]
    body = (await http.get(f"/api/stream?runs={','.join(ids)}")).text
    said = dict.fromkeys(ids, "")
    for line in body.split("\n"):
        if line.startswith("data: "):
            event = orjson.loads(line[6:])
            said[event["run_id"]] += event.get("text", "") if event["type"] == "content" else ""
    assert said == {
        run["task_id"]: answer(f"Chat {number} [[words:20]] [[rate:100]]", 20) for number, run in enumerate(runs)
    }


async def test_stop_keeps_what_was_said_and_the_chat_goes_on(stack: Stack, http: httpx.AsyncClient) -> None:
    accepted = await ask(http, "Stop me. [[scenario:slow]]")
    reader = Reader(stack.base_url, accepted["task_id"])
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: len(reader.text) > 20)
    stopped = await http.post(f"/api/task/{accepted['task_id']}/cancel")
    assert stopped.status_code in {200, 202}
    await reading
    assert reader.end == "cancelled"
    await eventually(lambda: row_of(stack, accepted["message_id"]) == ("cancelled", reader.text))
    again = await ask(http, "Go on. [[scenario:hello]]", accepted["chat_id"])
    assert (await Reader(stack.base_url, again["task_id"]).read()).text == "Hello, world"


async def test_regenerate_and_edit_make_branches(stack: Stack, http: httpx.AsyncClient) -> None:
    accepted = await ask(http, "First [[scenario:hello]]")
    await Reader(stack.base_url, accepted["task_id"]).read()
    chat_id = accepted["chat_id"]
    again = (await http.post(f"/api/chats/{chat_id}/messages/{accepted['message_id']}/regenerate")).json()
    assert (await Reader(stack.base_url, again["task_id"]).read()).text == "Hello, world"
    body = {"content": "Edited [[scenario:hello]]", "parent_id": None}
    edited = (await http.post(f"/api/chats/{chat_id}/messages", json=body)).json()
    assert (await Reader(stack.base_url, edited["task_id"]).read()).end == "done"
    messages = {one["id"]: one for one in (await http.get(f"/api/chats/{chat_id}")).json()["messages"]}
    assert len(messages) == 5
    assert messages[again["message_id"]]["parent_id"] == messages[accepted["message_id"]]["parent_id"]
    assert messages[edited["user_message_id"]]["parent_id"] is None


FAULTS = [
    ("auth", "provider_auth", ""),
    ("model", "provider_model", ""),
    ("rejected", "provider_rejected", ""),
    ("quota", "provider_rejected", ""),
    ("cut", "provider_cut", "Hello, world"),
    ("malformed", "provider_malformed", "Hello, world"),
]


@pytest.mark.parametrize(("scenario", "code", "kept"), FAULTS)
async def test_a_fault_of_the_models_api_ends_the_run_by_name(
    stack: Stack, http: httpx.AsyncClient, scenario: str, code: str, kept: str
) -> None:
    accepted = await ask(http, f"Fail. [[scenario:{scenario}]]")
    reader = await Reader(stack.base_url, accepted["task_id"]).read()
    end = reader.events[-1]
    assert (end["type"], end["code"]) == ("error", code)
    assert end["message"]
    # Keys that the API repeats in its errors stay between us and it.
    assert "sk-abcdef" not in orjson.dumps(reader.events).decode()
    message = await message_of(http, accepted)
    assert (message["status"], message["content"]) == ("failed", kept)
    assert message["error"]["code"] == code
    task = (await http.get(f"/api/task/{accepted['task_id']}")).json()
    assert (task["status"], task["error"]["code"]) == ("failed", code)


async def test_a_busy_api_is_asked_again_and_the_reader_is_told(stack: Stack, http: httpx.AsyncClient) -> None:
    accepted = await ask(http, "Again. [[scenario:busy_once]]")
    reader = await Reader(stack.base_url, accepted["task_id"]).read()
    assert reader.end == "done"
    assert any(event["type"] == "log" for event in reader.events)


async def test_the_same_key_after_a_lost_reply_gives_the_same_run(stack: Stack, http: httpx.AsyncClient) -> None:
    chat_id, headers = await new_chat(http), {"Idempotency-Key": new_id()}
    body = {"content": "Once [[scenario:hello]]"}
    first = await http.post(f"/api/chats/{chat_id}/messages", json=body, headers=headers)
    await Reader(stack.base_url, first.json()["task_id"]).read()
    # Also when the run has ended meanwhile.
    again = await http.post(f"/api/chats/{chat_id}/messages", json=body, headers=headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert len((await http.get(f"/api/chats/{chat_id}")).json()["messages"]) == 2


async def test_deleting_a_chat_that_speaks_stops_it(
    stack: Stack, http: httpx.AsyncClient, openai_server: OpenAIServer
) -> None:
    accepted = await ask(http, "Delete me. [[scenario:slow]]")
    reader = Reader(stack.base_url, accepted["task_id"])
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: len(reader.text) > 20)
    assert (await http.delete(f"/api/chats/{accepted['chat_id']}")).status_code == 204
    await reading
    assert reader.end == "cancelled"
    assert (await http.get(f"/api/chats/{accepted['chat_id']}")).status_code == 404
    with psycopg.connect(stack.database_url) as connection:
        left = connection.execute("SELECT count(*) FROM messages WHERE chat_id = %s", [accepted["chat_id"]]).fetchone()
    assert left == (0,)


async def test_health_is_well_when_everything_runs(http: httpx.AsyncClient) -> None:
    async def well() -> bool:
        return bool((await http.get("/api/health")).json()["status"] == "ok")

    await eventually(well)


# --- parts that stop ------------------------------------------------------------------------------


async def test_a_server_that_restarts_in_the_middle_is_not_noticed_in_the_text(make_stack: StackMaker) -> None:
    stack = await make_stack()
    question = "Restart. [[words:60]] [[rate:15]]"
    async with stack.client() as http:
        accepted = await ask(http, question)
    reader = Reader(stack.base_url, accepted["task_id"])
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: len(reader.text) > 20)
    # Fails when it has to be killed because a stream is open.
    await stack.server.terminate()
    assert stack.server.exit_code == 0
    assert "Traceback" not in stack.server.log()
    await stack.server.start()
    await reading
    assert reader.connections > 1
    assert reader.text == answer(question, 60)
    assert not [event for event in reader.events if event["type"] == "reset"]


async def test_a_server_that_is_killed_is_replaced_by_another(make_stack: StackMaker) -> None:
    stack = await make_stack(servers=2)
    question = "Kill. [[words:60]] [[rate:20]]"
    async with stack.client() as http:
        accepted = await ask(http, question)
    reader = Reader(stack.base_url, accepted["task_id"])
    reading = asyncio.create_task(reader.read())
    await eventually(lambda: len(reader.text) > 20)
    reader.base_url = stack.servers[1].base_url
    stack.server.kill()
    await reading
    assert reader.connections > 1
    assert reader.text == answer(question, 60)


async def test_a_worker_killed_before_the_first_token_is_replaced(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    stack = await make_stack(settings={"HEADWATER_LEASE_SECONDS": "2", "HEADWATER_QUEUE_GRACE": "2"})
    question = f"Before the first token {new_id()} [[scenario:mute]]"
    async with stack.client() as http:
        accepted = await ask(http, question)
        asked = lambda: [one for one in openai_server.requests if question in one.question]  # noqa: E731
        await eventually(asked)
        stack.worker.kill()
        openai_server.scenarios["mute"], mute = openai_server.scenarios["hello"], openai_server.scenarios["mute"]
        try:
            await stack.worker.start()
            reader = await Reader(stack.base_url, accepted["task_id"]).read()
        finally:
            openai_server.scenarios["mute"] = mute
        assert (reader.text, reader.end) == ("Hello, world", "done")
        assert (await http.get(f"/api/task/{accepted['task_id']}")).json()["attempt"] == 2
    await eventually(lambda: row_of(stack, accepted["message_id"]) == ("done", "Hello, world"))


async def test_without_a_worker_a_message_waits_and_is_answered_when_one_comes(make_stack: StackMaker) -> None:
    stack = await make_stack(start=False)
    await stack.server.start()
    async with stack.client() as http:
        accepted = await ask(http, "Wait. [[scenario:hello]]")
        health = (await http.get("/api/health")).json()
        assert (health["status"], health["parts"]["worker"]["ok"]) == ("degraded", False)
        reading = asyncio.create_task(Reader(stack.base_url, accepted["task_id"]).read())
        await stack.worker.start()
        assert (await reading).text == "Hello, world"


async def test_a_frozen_server_does_not_keep_its_run_from_going_on(make_stack: StackMaker) -> None:
    stack = await make_stack(servers=2)
    question = "Freeze. [[words:30]] [[rate:40]]"
    async with stack.client() as http:
        accepted = await ask(http, question)
    stack.server.signal(signal.SIGSTOP)
    try:
        reader = await Reader(stack.servers[1].base_url, accepted["task_id"]).read()
        assert reader.text == answer(question, 30)
        await eventually(lambda: row_of(stack, accepted["message_id"]) == ("done", reader.text))
    finally:
        stack.server.signal(signal.SIGCONT)
