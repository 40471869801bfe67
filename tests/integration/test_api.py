"""The HTTP API over real Redis, PostgreSQL and a journal: what it answers, and what it refuses without a trace."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from headwater.access import LOCAL_OWNER, Caller
from headwater.api.app import App, create_app
from headwater.dev.services import free_port
from headwater.events import content, done
from headwater.ids import new_id
from support.api import Api, serving, settings_for
from support.ids import old_id
from support.wait import eventually

TOKEN = "a-token-of-some-length"
PROBLEM = "application/problem+json"
RFC3339 = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")


@pytest.fixture
async def api(tmp_path: Path, redis_url: str, database_url: str) -> AsyncIterator[Api]:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as running:
        yield running


def rows(database_url: str) -> dict[str, int]:
    """How many rows there are."""
    with psycopg.connect(database_url) as connection:
        counts = {}
        for table in ("chats", "messages", "runs"):
            row = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
            counts[table] = row[0] if row else -1
        return counts


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that it is this problem, whole."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    assert document["type"] == f"urn:headwater:problem:{code}"
    assert document["status"] == status
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["title"]
    assert document["detail"]
    return document


# --- chats and messages ---------------------------------------------------------------------------


async def test_a_chat_is_made_shown_renamed_listed_and_deleted(api: Api) -> None:
    made = await api.http.post("/api/chats", json={"title": "First"})
    assert made.status_code == 201
    chat = made.json()
    assert made.headers["location"] == f"/api/chats/{chat['id']}"
    assert set(chat) == {"id", "title", "created_at", "updated_at", "active_task_id"}
    assert RFC3339.match(chat["created_at"])

    shown = (await api.http.get(made.headers["location"])).json()
    assert shown == {**chat, "messages": [], "degraded": False}

    renamed = await api.http.patch(f"/api/chats/{chat['id']}", json={"title": "  Second\n one "})
    assert renamed.json()["title"] == "Second one"
    listed = (await api.http.get("/api/chats", params={"q": "SECOND"})).json()
    assert [item["id"] for item in listed["items"]] == [chat["id"]]
    assert listed["next"] is None
    assert (await api.http.get("/api/chats", params={"q": "third"})).json()["items"] == []

    deleted = await api.http.delete(f"/api/chats/{chat['id']}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    problem(await api.http.get(f"/api/chats/{chat['id']}"), 404, "not_found")
    problem(await api.http.delete(f"/api/chats/{chat['id']}"), 404, "not_found")


async def test_a_list_is_read_page_by_page_without_a_gap(api: Api) -> None:
    made = [await api.chat(title=f"Chat {number}") for number in range(7)]
    seen: list[str] = []
    after = None
    while True:
        page = (await api.http.get("/api/chats", params={"limit": 3, **({"after": after} if after else {})})).json()
        seen += [item["id"] for item in page["items"]]
        after = page["next"]
        if after is None:
            break
    assert seen == made[::-1]


async def test_a_message_is_accepted_with_all_that_is_needed_to_follow_it(api: Api, database_url: str) -> None:
    chat_id = await api.chat()
    answer = await api.http.post(f"/api/chats/{chat_id}/messages", json={"content": "What is a river?\nTell me."})
    assert answer.status_code == 202
    accepted = answer.json()
    assert set(accepted) == {"task_id", "message_id", "user_message_id", "chat_id", "status"}
    assert (accepted["status"], accepted["chat_id"]) == ("processing", chat_id)
    assert answer.headers["location"] == f"/api/stream/{accepted['task_id']}"

    chat = (await api.http.get(f"/api/chats/{chat_id}")).json()
    assert chat["title"] == "What is a river?"
    assert chat["active_task_id"] == accepted["task_id"]
    question, reply = chat["messages"]
    assert (question["role"], question["content"], question["status"]) == ("user", "What is a river?\nTell me.", "done")
    assert (reply["id"], reply["parent_id"]) == (accepted["message_id"], question["id"])
    assert (reply["role"], reply["status"], reply["run_id"]) == ("assistant", "processing", accepted["task_id"])

    task = (await api.http.get(f"/api/task/{accepted['task_id']}")).json()
    assert set(task) == {
        *("task_id", "status", "kind", "attempt", "stage", "progress", "chat_id", "message_id", "error", "usage"),
        *("created_at", "started_at", "ended_at"),
    }
    assert (task["status"], task["kind"], task["attempt"]) == ("queued", "chat", 0)
    active = (await api.http.get(f"/api/chats/{chat_id}/active-task")).json()
    assert active == {"task_id": accepted["task_id"]}
    await eventually(lambda: rows(database_url) == {"chats": 1, "messages": 2, "runs": 1})


async def test_the_short_paths_do_the_same(api: Api) -> None:
    chat_id = await api.chat()
    answer = await api.http.post(f"/conversations/{chat_id}/messages", json={"content": "Hello?"})
    assert answer.status_code == 202
    lease = await api.claim(answer.json()["task_id"])
    await api.say(lease, 1, content("Hi"), done())
    stream = await api.http.get(f"/stream/{answer.json()['task_id']}")
    assert stream.status_code == 200
    assert '"text":"Hi"' in stream.text


async def test_a_chat_that_is_answering_refuses_a_second_message_and_names_the_run(api: Api, database_url: str) -> None:
    chat_id = await api.chat()
    accepted = await api.ask(chat_id)
    before = {"chats": 1, "messages": 2, "runs": 1}
    await eventually(lambda: rows(database_url) == before)
    refused = await api.http.post(f"/api/chats/{chat_id}/messages", json={"content": "And?"})
    assert problem(refused, 409, "chat_busy")["task_id"] == accepted["task_id"]
    refused = await api.http.post(f"/api/chats/{chat_id}/messages/{accepted['message_id']}/regenerate")
    assert problem(refused, 409, "chat_busy")["task_id"] == accepted["task_id"]
    assert rows(database_url) == before


async def test_a_message_may_wait_behind_the_answer_or_stop_it(api: Api) -> None:
    chat_id = await api.chat()
    path = f"/api/chats/{chat_id}/messages"
    accepted = await api.ask(chat_id)
    queued = await api.http.post(path, json={"content": "And?", "when_busy": "enqueue"})
    assert (queued.status_code, queued.json()["status"]) == (202, "processing")
    assert (await api.http.get(f"/api/task/{queued.json()['task_id']}")).json()["status"] == "queued"
    for url in (f"/api/chats/{chat_id}/active-task", f"/api/chats/{chat_id}", "/api/chats"):
        assert accepted["task_id"] in (await api.http.get(url)).text, "it is the first that answers"
        assert queued.json()["task_id"] not in (await api.http.get(url)).json().values()
    instead = await api.http.post(path, json={"content": "No!", "when_busy": "interrupt"})
    assert instead.status_code == 202

    async def stopped() -> bool:
        active = (await api.http.get(f"/api/chats/{chat_id}/active-task")).json()
        return bool(active == {"task_id": instead.json()["task_id"]})

    await eventually(stopped)


async def test_no_more_than_ten_messages_wait_in_a_chat(api: Api) -> None:
    chat_id = await api.chat()
    path = f"/api/chats/{chat_id}/messages"
    accepted = await api.ask(chat_id)
    for _ in range(10):
        assert (await api.http.post(path, json={"content": "And?", "when_busy": "enqueue"})).status_code == 202
    refused = await api.http.post(path, json={"content": "And?", "when_busy": "enqueue"})
    assert problem(refused, 429, "chat_queue_full")["task_id"] == accepted["task_id"]


@pytest.mark.parametrize("value", ["", "later", "REJECT", "URGENT", 1, ["enqueue"], ["urgent"]])
@pytest.mark.parametrize("field", ["when_busy", "priority"])
async def test_an_unknown_wish_is_refused(api: Api, field: str, value: object) -> None:
    refused = await api.http.post(f"/api/chats/{await api.chat()}/messages", json={"content": "x", field: value})
    problem(refused, 422, "invalid_input")


@pytest.mark.parametrize("asked", [None, "urgent", "background"])
async def test_a_message_may_say_how_urgent_it_is(api: Api, asked: str | None) -> None:
    body = {"content": "x"} | ({"priority": asked} if asked is not None else {})
    accepted = (await api.http.post(f"/api/chats/{await api.chat()}/messages", json=body)).json()
    run = await api.graph.reading.run_view(Caller(LOCAL_OWNER), accepted["task_id"])
    assert run.priority == (asked or "normal")


async def test_the_same_key_gives_the_same_run_and_another_body_is_refused(api: Api, database_url: str) -> None:
    chat_id = await api.chat()
    headers = {"Idempotency-Key": new_id()}
    path = f"/api/chats/{chat_id}/messages"
    answers = await asyncio.gather(*(api.http.post(path, json={"content": "Once"}, headers=headers) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["task_id"] for answer in answers}) == 1
    await eventually(lambda: rows(database_url) == {"chats": 1, "messages": 2, "runs": 1})
    problem(await api.http.post(path, json={"content": "Other"}, headers=headers), 422, "idempotency_key_reused")


async def test_a_chat_made_twice_under_one_key_is_one_chat(api: Api) -> None:
    headers = {"Idempotency-Key": new_id()}
    first = await api.http.post("/api/chats", json={}, headers=headers)
    again = await api.http.post("/api/chats", json={}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"]
    assert len((await api.http.get("/api/chats")).json()["items"]) == 1


async def test_a_queued_run_is_cancelled_at_once_and_its_chat_is_free_again(api: Api) -> None:
    chat_id = await api.chat()
    accepted = await api.ask(chat_id)
    stopped = await api.http.post(f"/api/task/{accepted['task_id']}/cancel")
    assert (stopped.status_code, stopped.json()["status"]) == (200, "cancelled")
    again = await api.http.post(f"/api/task/{accepted['task_id']}/cancel")
    assert (again.status_code, again.json()) == (200, {"task_id": accepted["task_id"], "status": "cancelled"})
    assert (await api.http.get(f"/api/chats/{chat_id}/active-task")).json() == {"task_id": None}
    messages = (await api.http.get(f"/api/chats/{chat_id}")).json()["messages"]
    assert messages[-1]["status"] == "cancelled"
    regenerated = await api.http.post(f"/api/chats/{chat_id}/messages/{accepted['message_id']}/regenerate")
    assert regenerated.status_code == 202
    assert regenerated.json()["user_message_id"] is None


async def test_a_cancel_of_a_held_run_is_a_promise_until_its_worker_confirms(api: Api) -> None:
    accepted = await api.ask(await api.chat())
    await api.claim(accepted["task_id"])
    stopped = await api.http.post(f"/api/task/{accepted['task_id']}/cancel")
    assert (stopped.status_code, stopped.json()["status"]) == (202, "cancelling")


async def test_deleting_a_chat_that_answers_ends_its_run_and_leaves_nothing(api: Api, database_url: str) -> None:
    chat_id = await api.chat()
    accepted = await api.ask(chat_id)
    assert (await api.http.delete(f"/api/chats/{chat_id}")).status_code == 204
    problem(await api.http.get(f"/api/chats/{chat_id}"), 404, "not_found")
    # Of a run no tombstone stays: until its id is a minute old it might as well be another host's.
    problem(await api.http.get(f"/api/task/{accepted['task_id']}"), 503, "not_known_yet")
    counts = rows(database_url)
    assert (counts["messages"], counts["runs"]) == (0, 0)


# --- polling --------------------------------------------------------------------------------------


async def test_events_are_polled_in_pages_and_the_end_is_said(api: Api) -> None:
    accepted = await api.ask(await api.chat())
    path = f"/api/runs/{accepted['task_id']}/events"
    before = (await api.http.get(path)).json()
    assert (before["items"], before["reset"], before["done"]) == ([], False, False)

    lease = await api.claim(accepted["task_id"])
    await api.say(lease, 1, content("a"), content("b"), done())
    first = (await api.http.get(path, params={"limit": 2, "after": before["cursor"] or ""})).json()
    assert [event["seq"] for event in first["items"]] == [1, 2]
    assert (first["cursor"], first["done"]) == (f"{lease.epoch}-2", False)
    last = (await api.http.get(path, params={"after": first["cursor"]})).json()
    assert [event["type"] for event in last["items"]] == ["done"]
    assert last["done"]
    over = (await api.http.get(path, params={"after": last["cursor"], "wait": 10})).json()
    assert over == {"items": [], "cursor": last["cursor"], "reset": False, "done": True}


async def test_a_long_poll_returns_with_the_first_event(api: Api) -> None:
    accepted = await api.ask(await api.chat())
    lease = await api.claim(accepted["task_id"])
    await api.say(lease, 1, content("a"))
    waiting = asyncio.create_task(
        api.http.get(f"/api/runs/{accepted['task_id']}/events", params={"after": f"{lease.epoch}-1", "wait": 15})
    )
    await eventually(lambda: len(api.graph.streams) == 1)
    await api.say(lease, 2, content("b"))
    answer = (await waiting).json()
    assert [event["text"] for event in answer["items"]] == ["b"]
    assert answer["cursor"] == f"{lease.epoch}-2"


async def test_a_long_poll_without_news_gives_the_cursor_back(api: Api) -> None:
    accepted = await api.ask(await api.chat())
    lease = await api.claim(accepted["task_id"])
    await api.say(lease, 1, content("a"))
    cursor = f"{lease.epoch}-1"
    path = f"/api/runs/{accepted['task_id']}/events"
    answer = (await api.http.get(path, params={"after": cursor, "wait": 0.1})).json()
    assert answer == {"items": [], "cursor": cursor, "reset": False, "done": False}


async def test_a_poll_with_a_cursor_of_a_lost_log_says_reset(api: Api) -> None:
    accepted = await api.ask(await api.chat())
    lease = await api.claim(accepted["task_id"])
    await api.say(lease, 1, content("a"))
    answer = (await api.http.get(f"/api/runs/{accepted['task_id']}/events", params={"after": "lost-9"})).json()
    assert (answer["reset"], [event["seq"] for event in answer["items"]]) == (True, [1])


# --- bad input ------------------------------------------------------------------------------------

UNKNOWN = "0198c0de-7abc-7def-8123-456789abcdef"
BAD: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("GET", "/api/chats/nonsense", {}, 422, "invalid_input"),
    ("GET", f"/api/chats/{UNKNOWN.upper()}", {}, 422, "invalid_input"),
    ("GET", f"/api/chats/{UNKNOWN}", {}, 404, "not_found"),
    ("DELETE", f"/api/chats/{UNKNOWN}", {}, 404, "not_found"),
    ("PATCH", f"/api/chats/{UNKNOWN}", {"json": {"title": "x"}}, 404, "not_found"),
    ("GET", f"/api/chats/{UNKNOWN}/active-task", {}, 404, "not_found"),
    ("GET", "/api/chats?limit=0", {}, 422, "invalid_input"),
    ("GET", "/api/chats?limit=1000", {}, 422, "invalid_input"),
    ("GET", "/api/chats?after=nonsense", {}, 400, "bad_cursor"),
    ("GET", "/api/chats?q=%00", {}, 422, "invalid_input"),
    ("POST", "/api/chats", {"json": {"title": ""}}, 422, "invalid_input"),
    ("POST", "/api/chats", {"json": {"title": "   "}}, 422, "invalid_input"),
    ("POST", "/api/chats", {"json": {"title": "x" * 201}}, 422, "invalid_input"),
    ("POST", "/api/chats", {"json": {"title": "a\x00b"}}, 422, "invalid_input"),
    ("POST", "/api/chats", {"json": {"tilte": "x"}}, 422, "invalid_input"),
    ("POST", "/api/chats", {"json": []}, 422, "invalid_input"),
    ("POST", "/api/chats", {"json": {}, "headers": {"Idempotency-Key": "a b"}}, 422, "invalid_input"),
    ("GET", "/api/task/nonsense", {}, 422, "invalid_input"),
    ("GET", f"/api/task/{UNKNOWN}", {}, 404, "not_found"),
    ("POST", f"/api/task/{UNKNOWN}/cancel", {}, 404, "not_found"),
    ("GET", f"/api/runs/{UNKNOWN}/events", {}, 404, "not_found"),
    ("GET", f"/api/runs/{UNKNOWN}/events?wait=31", {}, 422, "invalid_input"),
    ("GET", f"/api/runs/{UNKNOWN}/events?wait=nan", {}, 422, "invalid_input"),
    ("GET", "/api/stream/nonsense", {}, 422, "invalid_input"),
    ("GET", f"/api/stream/{UNKNOWN}", {}, 404, "not_found"),
    ("GET", f"/stream/{UNKNOWN}", {}, 404, "not_found"),
    ("GET", "/api/stream", {}, 422, "invalid_input"),
    ("HEAD", f"/api/stream/{UNKNOWN}", {}, 405, "method_not_allowed"),
    ("POST", f"/api/stream/{UNKNOWN}", {}, 405, "method_not_allowed"),
    ("PUT", "/api/chats", {}, 405, "method_not_allowed"),
    ("GET", "/api/nothing", {}, 404, "not_found"),
    ("GET", "/static/../settings.py", {}, 404, "not_found"),
    ("GET", "/static/%2e%2e/settings.py", {}, 404, "not_found"),
    ("POST", "/static/app.js", {}, 405, "method_not_allowed"),
]


@pytest.mark.parametrize(("method", "path", "extra", "status", "code"), BAD, ids=lambda value: str(value)[:40])
async def test_a_bad_request_is_refused_by_name(
    shared: Api, method: str, path: str, extra: dict[str, Any], status: int, code: str
) -> None:
    answer = await shared.http.request(method, path, **extra)
    if method == "HEAD":
        assert answer.status_code == status
    else:
        problem(answer, status, code)
    if status == 405:
        assert answer.headers["allow"]


MESSAGES: list[tuple[bytes, str, int, str]] = [
    (b"", "application/json", 422, "invalid_input"),
    (b"{}", "application/json", 422, "invalid_input"),
    (b'{"content": ""}', "application/json", 422, "invalid_input"),
    (b'{"content": " \\n\\t "}', "application/json", 422, "invalid_input"),
    (b'{"content": 7}', "application/json", 422, "invalid_input"),
    (b'{"content": null}', "application/json", 422, "invalid_input"),
    (b'{"content": ["a"]}', "application/json", 422, "invalid_input"),
    (b'{"content": "a\\u0000b"}', "application/json", 422, "invalid_input"),
    (b'{"content": "\\ud800"}', "application/json", 422, "invalid_input"),
    (b'{"content": "a", "\\ud800": 1}', "application/json", 422, "invalid_input"),
    (b'{"content": "a", "colour": "red"}', "application/json", 422, "invalid_input"),
    (b'{"content": "a", "parent_id": "nonsense"}', "application/json", 422, "invalid_input"),
    (b'{"content": "a", "parent_id": "' + UNKNOWN.encode() + b'"}', "application/json", 404, "not_found"),
    (json.dumps({"content": "x" * 32_001}).encode(), "application/json", 422, "invalid_input"),
    (json.dumps({"content": "x" * 300_000}).encode(), "application/json", 413, "too_large"),
    (b'{"content": ', "application/json", 422, "invalid_input"),
    (b"\xff\xfe", "application/json", 422, "invalid_input"),
    (b"[" * 100_000, "application/json", 400, "bad_request"),
    (b'{"content": "a"}', "text/plain", 415, "unsupported_media_type"),
    (b"content=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
]


@pytest.mark.parametrize(("body", "kind", "status", "code"), MESSAGES, ids=lambda value: str(value)[:40])
async def test_a_bad_message_is_refused_by_name_and_leaves_nothing(
    shared: Api, body: bytes, kind: str, status: int, code: str
) -> None:
    chat_id = await shared.chat()
    answer = await shared.http.post(f"/api/chats/{chat_id}/messages", content=body, headers={"content-type": kind})
    problem(answer, status, code)
    chat = (await shared.http.get(f"/api/chats/{chat_id}")).json()
    assert (chat["messages"], chat["active_task_id"], chat["title"]) == ([], None, None)


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    """One server for many tests: those that leave nothing which another could meet."""
    redis_server, postgres = request.getfixturevalue("redis_server"), request.getfixturevalue("postgres_server")
    template = request.getfixturevalue("template_database")
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "bad_input" TEMPLATE "{template}"'.encode())
    settings = settings_for(tmp_path_factory.mktemp("bad"), redis_server.url(1), postgres.url("bad_input"))
    async with serving(settings) as running:
        yield running


async def test_a_body_without_a_length_is_limited_as_well(shared: Api) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b'{"content": "' + b"x" * 10_000

    answer = await shared.http.post(
        f"/api/chats/{await shared.chat()}/messages", content=endless(), headers={"content-type": "application/json"}
    )
    problem(answer, 413, "too_large")


async def test_a_validation_problem_names_each_field(shared: Api) -> None:
    answer = await shared.http.post("/api/chats", json={"title": 7, "extra": 1})
    document = problem(answer, 422, "invalid_input")
    assert {error["field"] for error in document["errors"]} == {"title", "extra"}


# --- access ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "host_not_allowed"),
        ({"origin": "https://evil.example"}, "origin_not_allowed"),
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, "origin_not_allowed"),
    ],
)
async def test_a_foreign_page_cannot_write(api: Api, headers: dict[str, str], code: str) -> None:
    problem(await api.http.post("/api/chats", json={}, headers=headers), 403, code)
    assert (await api.http.get("/api/chats")).json()["items"] == []


async def test_with_a_token_everything_private_needs_it(tmp_path: Path, redis_url: str, database_url: str) -> None:
    settings = settings_for(tmp_path, redis_url, database_url, HEADWATER_ACCESS_TOKEN=TOKEN)
    async with serving(settings) as api:
        for path in ("/api/chats", "/api/health", "/metrics", "/openapi.json", f"/api/stream/{new_id()}"):
            refused = await api.http.get(path)
            problem(refused, 401, "sign_in_required")
            assert refused.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz"):
            assert (await api.http.get(path)).status_code == 200
        bearer = {"authorization": f"Bearer {TOKEN}"}
        assert (await api.http.get("/api/chats", headers=bearer)).status_code == 200
        wrong = {"authorization": f"Bearer {TOKEN}x"}
        problem(await api.http.get("/api/chats", headers=wrong), 401, "sign_in_required")


async def test_signing_in_and_out_by_the_page(tmp_path: Path, redis_url: str, database_url: str) -> None:
    settings = settings_for(tmp_path, redis_url, database_url, HEADWATER_ACCESS_TOKEN=TOKEN)
    browser = {"sec-fetch-site": "same-origin"}
    async with serving(settings) as api:
        home = await api.http.get("/", headers={"accept": "text/html"})
        assert (home.status_code, home.headers["location"]) == (303, "/sign-in")
        page = await api.http.get("/sign-in", headers={"accept": "text/html"})
        assert page.status_code == 200
        assert "script-src" not in page.headers["content-security-policy"]
        for path in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            # Whoever is not signed in yet sees it whole.
            assert (await api.http.get(path)).status_code == 200, path

        wrong = await api.http.post("/sign-in", data={"token": "<b>wrong"}, headers=browser)
        assert wrong.status_code == 401
        assert 'role="alert"' in wrong.text
        assert "<b>wrong" not in wrong.text
        assert "set-cookie" not in wrong.headers

        right = await api.http.post("/sign-in", data={"token": TOKEN}, headers=browser)
        assert (right.status_code, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie

        # The client keeps the cookie.
        assert (await api.http.get("/api/chats")).status_code == 200
        assert (await api.http.post("/api/chats", json={}, headers=browser)).status_code == 201
        assert (await api.http.get("/api/health")).json()["access"] == "token"
        out = await api.http.post("/sign-out", headers=browser)
        assert (out.status_code, out.headers["location"]) == (303, "/sign-in")
        problem(await api.http.get("/api/chats"), 401, "sign_in_required")


async def test_without_a_token_there_is_nothing_to_sign_in_to(shared: Api) -> None:
    answer = await shared.http.get("/sign-in")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


# --- pages and headers ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs", "/api/chats", "/api/nothing", "/static/app.js", "/healthz"])
async def test_every_answer_has_the_security_headers(shared: Api, path: str) -> None:
    headers = (await shared.http.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "server" not in headers


async def test_the_page_runs_its_own_scripts_only(shared: Api) -> None:
    page = await shared.http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert "'unsafe-inline'" not in page.headers["content-security-policy"]
    assert "'unsafe-eval'" not in page.headers["content-security-policy"]
    assert policy["script-src"].startswith("'self' 'sha256-")
    assert policy["connect-src"] == policy["style-src"] == policy["form-action"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert policy["base-uri"] == policy["frame-ancestors"] == "'none'"


@pytest.mark.parametrize("page", ["/", "/docs"])
async def test_whatever_a_page_asks_for_is_here(shared: Api, page: str) -> None:
    html = (await shared.http.get(page)).text
    paths = set(re.findall(r'(?:src|href)="([^"]+)"', html)) | set(re.findall(r'": "(/static/[^"]+)"', html))
    assert len(paths) > 2
    for path in paths:
        assert path.startswith("/"), f"{page} loads {path} from elsewhere"
        assert (await shared.http.get(path)).status_code == 200, path


async def test_files_are_packed_and_asked_for_again_by_their_etag(shared: Api) -> None:
    plain = await shared.http.get("/static/app.js", headers={"accept-encoding": "identity"})
    assert plain.headers["content-type"] == "text/javascript; charset=utf-8"
    assert plain.headers["cache-control"] == "no-cache"
    async with shared.http.stream("GET", "/static/app.js", headers={"accept-encoding": "gzip"}) as packed:
        raw = b"".join([chunk async for chunk in packed.aiter_raw()])
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(raw) == plain.content
    again = await shared.http.get("/static/app.js", headers={"if-none-match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = await shared.http.head("/static/app.js", headers={"accept-encoding": "identity"})
    assert (head.content, head.headers["content-length"]) == (b"", str(len(plain.content)))


async def test_a_request_id_is_taken_over_when_it_is_harmless(shared: Api) -> None:
    assert (await shared.http.get("/healthz", headers={"x-request-id": "trace-0123"})).headers[
        "x-request-id"
    ] == "trace-0123"
    made_up = (await shared.http.get("/healthz", headers={"x-request-id": "a b"})).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{16}", made_up)


async def test_requests_are_counted_by_route_and_not_by_address(shared: Api) -> None:
    await shared.http.get(f"/api/task/{old_id()}")
    await shared.http.get("/anything/at/all")
    text = (await shared.http.get("/metrics")).text
    assert 'route="/api/task/{task_id}",status="404"' in text
    assert 'route="unmatched",status="404"' in text
    assert "anything" not in text


async def test_a_fault_of_ours_is_logged_under_its_request_id_and_tells_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(type(api.graph.reading), "list_chats", broken)
    answer = await api.http.get("/api/chats")
    document = problem(answer, 500, "internal")
    assert "secret" not in answer.text
    assert document["request_id"] in document["detail"]
    logged = [record for record in caplog.records if document["request_id"] in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].exc_info is not None


# --- health ---------------------------------------------------------------------------------------


async def test_health_names_what_is_missing(api: Api) -> None:
    health = await eventually(lambda: _health(api, "postgres", migrated=True))
    assert set(health) == {"status", "demo", "model", "version", "when_busy", "access", "parts"}
    assert (health["access"], health["when_busy"]) == ("open", "reject")
    assert set(health["parts"]) == {"redis", "postgres", "journal", "worker", "queue"}
    assert health["demo"] is True
    assert (health["status"], health["parts"]["worker"]["ok"]) == ("degraded", False)
    assert health["parts"]["postgres"] == {"ok": True, "detail": "", "migrated": True}

    await api.log.beat("worker-1", 30)
    health = await eventually(lambda: _health(api, "worker", ok=True))
    assert health["status"] == "ok"
    assert health["parts"]["worker"] == {"ok": True, "detail": "", "count": 1}
    metrics = (await api.http.get("/metrics")).text
    assert set(re.findall(r'headwater_up\{part="(\w+)"\}', metrics)) == set(health["parts"])
    assert 'headwater_up{part="redis"} 1.0' in metrics


async def _health(api: Api, part: str, **expected: Any) -> Any:
    """The health once this part is so."""
    answer = await api.http.get("/api/health")
    assert answer.status_code == 200
    health = answer.json()
    return health if {**health["parts"][part], **expected} == health["parts"][part] else None


async def test_a_server_starts_and_serves_what_it_can_while_redis_and_postgresql_are_away(tmp_path: Path) -> None:
    nowhere = free_port()
    settings = settings_for(tmp_path, f"redis://127.0.0.1:{nowhere}/0", f"postgresql://nobody@127.0.0.1:{nowhere}/none")
    async with serving(settings) as api:
        assert (await api.http.get("/healthz")).status_code == 200
        assert (await api.http.get("/readyz")).status_code == 200
        assert (await api.http.get("/")).status_code == 200
        health = (await api.http.get("/api/health")).json()
        assert health["status"] == "degraded"
        assert not health["parts"]["redis"]["ok"]
        assert not health["parts"]["postgres"]["ok"]
        problem(await api.http.get(f"/api/task/{new_id()}"), 503, "store_unavailable")
        # What is accepted is kept: on disk, until PostgreSQL comes.
        chat_id = await api.chat(title="Kept")
        accepted = await api.ask(chat_id)
        shown = (await api.http.get(f"/api/chats/{chat_id}")).json()
        assert [message["status"] for message in shown["messages"]] == ["done", "processing"]
        assert shown["active_task_id"] == accepted["task_id"]

        async def told() -> bool:
            # What was found is kept for a moment, so that many who ask cost one look.
            return bool((await api.http.get("/api/health")).json()["parts"]["journal"]["backlog"] > 0)

        await eventually(told)


async def test_a_database_without_the_schema_is_said(tmp_path: Path, redis_url: str, postgres_server: Any) -> None:
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE empty")
    async with serving(settings_for(tmp_path, redis_url, postgres_server.url("empty"))) as api:
        health = await eventually(lambda: _health(api, "postgres", ok=False))
        assert health["parts"]["postgres"]["migrated"] is False
        assert "headwater db upgrade" in health["parts"]["postgres"]["detail"]


async def start_of(app: App) -> dict[str, Any]:
    """What the application answers to a server that starts it."""
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup" if not said else "lifespan.shutdown"}

    async def send(message: Any) -> None:
        said.append(message)

    await app({"type": "lifespan"}, receive, send)
    return said[0]


async def test_a_damaged_journal_stops_the_start_with_what_to_do(
    tmp_path: Path, redis_url: str, database_url: str
) -> None:
    journal = tmp_path / "journal.db"
    journal.write_bytes(b"this is no journal at all" * 1000)
    answer = await start_of(create_app(settings_for(tmp_path, redis_url, database_url)))
    assert answer["type"] == "lifespan.startup.failed"
    assert answer["message"].startswith("headwater cannot start: ")
    assert str(journal) in answer["message"]
    assert journal.read_bytes().startswith(b"this is no journal")


async def test_a_setting_that_is_missing_stops_the_start_by_name(tmp_path: Path) -> None:
    answer = await start_of(create_app(settings_for(tmp_path, None, "postgresql://nobody@127.0.0.1/none")))
    assert answer["type"] == "lifespan.startup.failed"
    assert "REDIS_URL" in answer["message"]
