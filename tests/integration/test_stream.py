"""Streams on a real socket, over real Redis and PostgreSQL: exact, bounded, and ended cleanly."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from headwater.events import content, done
from headwater.runs import Lease
from support.api import Api, serving, settings_for
from support.wait import eventually


@pytest.fixture
async def api(tmp_path: Path, redis_url: str, database_url: str) -> AsyncIterator[Api]:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as running:
        yield running


async def begin(api: Api, *texts: str) -> tuple[str, Lease]:
    """A run that a worker holds and that has said `texts`."""
    run_id = (await api.ask(await api.chat()))["task_id"]
    lease = await api.claim(run_id)
    if texts:
        await api.say(lease, 1, *[content(text) for text in texts])
    return run_id, lease


def frames(body: str) -> list[dict[str, Any]]:
    """The frames of a stream: `id` and the data's members."""
    found = []
    for block in body.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "data" in fields:
            found.append({"id": fields.get("id"), "event": fields["event"], **orjson.loads(fields["data"])})
    return found


class Stream:
    """A stream that is being read."""

    def __init__(self, body: AsyncIterator[str]) -> None:
        self._body = body
        self.text = ""

    async def until(self, part: str) -> None:
        async with asyncio.timeout(10):
            while part not in self.text:
                self.text += await anext(self._body)

    async def rest(self) -> str:
        async with asyncio.timeout(10):
            async for text in self._body:
                self.text += text
        return self.text


@asynccontextmanager
async def stream(api: Api, path: str, **headers: str) -> AsyncIterator[Stream]:
    async with api.http.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        yield Stream(answer.aiter_text())


async def test_a_stream_has_its_headers_before_the_run_has_said_anything(api: Api) -> None:
    run_id = (await api.ask(await api.chat()))["task_id"]
    async with api.http.stream("GET", f"/api/stream/{run_id}") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["transfer-encoding"] == "chunked"
        assert "content-encoding" not in answer.headers
        first = await anext(answer.aiter_text())
        assert first.startswith("retry: ")


async def test_a_reader_from_every_cursor_gets_exactly_the_rest(api: Api) -> None:
    words = [f"word{number} " for number in range(20)]
    run_id, lease = await begin(api, *words)
    await api.say(lease, len(words) + 1, done())
    whole = frames((await api.http.get(f"/api/stream/{run_id}")).text)
    assert [frame["seq"] for frame in whole] == list(range(1, len(words) + 2))
    assert "".join(frame.get("text", "") for frame in whole) == "".join(words)
    for seen in range(len(whole)):
        cursor = f"{lease.epoch}-{seen}"
        by_query = (await api.http.get(f"/api/stream/{run_id}", params={"after": cursor})).text
        by_header = (await api.http.get(f"/api/stream/{run_id}", headers={"last-event-id": cursor})).text
        assert frames(by_query) == frames(by_header) == whole[seen:]
    over = await api.http.get(f"/api/stream/{run_id}", params={"after": whole[-1]["id"]})
    assert (over.status_code, over.content) == (204, b"")


async def test_many_readers_that_come_while_a_run_speaks_all_see_the_same_once(api: Api) -> None:
    run_id, lease = await begin(api)
    total = 120

    async def speak() -> None:
        for seq in range(1, total + 1):
            await api.say(lease, seq, content(f"{seq} "))
        await api.say(lease, total + 1, done())

    async def read() -> list[int]:
        return [frame["seq"] for frame in frames((await api.http.get(f"/api/stream/{run_id}")).text)]

    speaking = asyncio.create_task(speak())
    readers = []
    for _ in range(20):
        readers.append(asyncio.create_task(read()))
        await asyncio.sleep(0)
    seen = await asyncio.gather(*readers)
    await speaking
    assert all(seqs == list(range(1, total + 2)) for seqs in seen)


async def test_a_reader_that_leaves_frees_its_place(api: Api) -> None:
    run_id, _ = await begin(api, "a")
    async with stream(api, f"/api/stream/{run_id}") as reader:
        await reader.until('"a"')
        assert len(api.graph.streams) == 1
    await eventually(lambda: len(api.graph.streams) == 0)


async def test_events_after_the_log_expired_are_told_from_the_store(api: Api) -> None:
    chat_id = await api.chat()
    run_id = (await api.ask(chat_id))["task_id"]
    await api.http.post(f"/api/task/{run_id}/cancel")
    await api.log.forget(run_id)
    told = frames((await api.http.get(f"/api/stream/{run_id}")).text)
    assert told[-1]["event"] == "cancelled"
    over = await api.http.get(f"/api/stream/{run_id}", params={"after": told[-1]["id"]})
    assert over.status_code == 204
    # A cursor of the log that is gone: history was lost, said before it is told again.
    again = frames((await api.http.get(f"/api/stream/{run_id}", params={"after": "gone-3"})).text)
    assert [frame["event"] for frame in again] == ["reset", *[frame["event"] for frame in told]]


async def test_several_runs_on_one_connection(api: Api) -> None:
    (first, one), (second, two) = await begin(api, "a"), await begin(api, "b")
    async with stream(api, f"/api/stream?runs={first},{second}:{two.epoch}-1") as reader:
        await reader.until('"a"')
        await api.say(two, 2, content("c"), done())
        await reader.until('"done"')
        await api.say(one, 2, done())
        seen = frames(await reader.rest())
    of = {run_id: [frame["seq"] for frame in seen if frame["run_id"] == run_id] for run_id in (first, second)}
    assert of == {first: [1, 2], second: [2, 3]}
    over = await api.http.get(f"/api/stream?runs={first}:{one.epoch}-2,{second}:{two.epoch}-3")
    assert over.status_code == 204


@pytest.mark.parametrize("several", [False, True])
async def test_a_server_that_stops_ends_its_streams_cleanly_and_at_once(
    tmp_path: Path, redis_url: str, database_url: str, several: bool
) -> None:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as api:
        run_id, _ = await begin(api, "a")
        path = f"/api/stream?runs={run_id}" if several else f"/api/stream/{run_id}"
        async with stream(api, path) as reader:
            await reader.until('"a"')
            api.server.should_exit = True
            # The client reads the chunked body to its proper end: anything else raises here.
            text = await reader.rest()
        assert text.endswith("\n\n")
        assert text.count("retry: ") == 2
        assert frames(text)[-1]["text"] == "a"


async def test_a_long_poll_does_not_hold_up_the_end_of_the_server(
    tmp_path: Path, redis_url: str, database_url: str
) -> None:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as api:
        run_id, lease = await begin(api, "a")
        cursor = f"{lease.epoch}-1"
        waiting = asyncio.create_task(api.http.get(f"/api/runs/{run_id}/events", params={"after": cursor, "wait": 25}))
        await eventually(lambda: len(api.graph.streams) == 1)
        api.server.should_exit = True
        assert (await waiting).json() == {"items": [], "cursor": cursor, "reset": False, "done": False}


def deaf_reader(api: Api, path: str) -> socket.socket:
    """A client that asks for a stream and never reads."""
    address = urlsplit(api.base_url)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect((address.hostname, address.port))
    reader.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
    return reader


async def test_a_reader_that_takes_nothing_slows_nobody_and_is_cut_off(
    tmp_path: Path, redis_url: str, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as api:
        api.graph.streams.send_timeout = 2
        run_id, lease = await begin(api, "a")
        deaf = deaf_reader(api, f"/api/stream/{run_id}")
        try:
            await eventually(lambda: len(api.graph.streams) == 1)
            async with stream(api, f"/api/stream/{run_id}") as reader:
                # Reads all the while: a healthy reader must not look like a deaf one.
                rest = asyncio.create_task(reader.rest())
                for seq in range(2, 202):
                    await api.say(lease, seq, content("x" * 40_000))
                await api.say(lease, 202, done())
                assert [frame["seq"] for frame in frames(await rest)] == list(range(1, 203))
            await eventually(lambda: len(api.graph.streams) == 0)
        finally:
            deaf.close()
    # The cut is our decision, not a fault of the application.
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_reader_that_takes_nothing_does_not_hold_up_the_end_of_the_server(
    tmp_path: Path, redis_url: str, database_url: str
) -> None:
    async with serving(settings_for(tmp_path, redis_url, database_url)) as api:
        # Whoever waited for it would not come back while this test lasts.
        api.graph.streams.send_timeout = 3600
        run_id, lease = await begin(api, "a")
        deaf = deaf_reader(api, f"/api/stream/{run_id}")
        try:
            for seq in range(2, 202):
                await api.say(lease, seq, content("x" * 40_000))
            await eventually(lambda: any(one.sending_since for one in api.graph.streams.open_now))
            api.server.should_exit = True
            await eventually(lambda: api.app.graph is None)
        finally:
            deaf.close()


async def test_an_owner_may_have_so_many_streams_and_no_more(tmp_path: Path, redis_url: str, database_url: str) -> None:
    async with serving(settings_for(tmp_path, redis_url, database_url, HEADWATER_MAX_STREAMS=2)) as api:
        run_id, _ = await begin(api, "a")
        async with stream(api, f"/api/stream/{run_id}") as one, stream(api, f"/api/stream/{run_id}") as two:
            await one.until('"a"')
            await two.until('"a"')
            third = await api.http.get(f"/api/stream/{run_id}")
            assert (third.status_code, third.json()["code"]) == (429, "too_many")
            assert third.headers["retry-after"]
        await eventually(lambda: len(api.graph.streams) == 0)
        async with stream(api, f"/api/stream/{run_id}") as again:
            await again.until('"a"')
