"""Two hosts, a journal each: what one has taken while PostgreSQL was away from it and what Redis then forgot is unknown
to the other, and is asked for again until it is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import orjson
import pytest
import redis

from chaos.proxy import Proxy
from headwater.events import content, done
from headwater.ids import new_id
from support.api import Api, serving, settings_for
from support.wait import eventually


@dataclass
class Hosts:
    """`here` takes what is asked of it; `there` is another server with a journal of its own."""

    here: Api
    there: Api
    #: Here's way to PostgreSQL.
    way: Proxy
    redis_url: str

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """PostgreSQL is away, for here alone."""
        self.way.refusing = True
        self.way.cut()
        try:
            yield
        finally:
            self.way.refusing = False

    def flush(self) -> None:
        """Redis forgets everything."""
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()

    async def chat(self) -> str:
        """A chat as the page begins one: its id is made from the key and tells no time."""
        made = await self.here.http.post("/api/chats", json={}, headers={"Idempotency-Key": new_id()})
        assert made.status_code == 201, made.text
        return str(made.json()["id"])

    async def state(self, run_id: str) -> str:
        """What there says of a run."""
        return str((await self.there.http.get(f"/api/task/{run_id}")).json().get("status"))


@pytest.fixture
async def hosts(tmp_path: Path, redis_url: str, database_url: str) -> AsyncIterator[Hosts]:
    address = urlsplit(database_url)
    async with Proxy(f"{parse_qs(address.query)['host'][0]}/.s.PGSQL.5432").run() as way:
        by_way = f"postgresql://postgres@127.0.0.1:{way.port}{address.path}"
        async with (
            serving(settings_for(tmp_path / "here", redis_url, by_way)) as here,
            serving(settings_for(tmp_path / "there", redis_url, database_url)) as there,
        ):
            yield Hosts(here, there, way, redis_url)


def not_known_yet(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, "not_known_yet"), answer.text
    assert answer.headers["retry-after"] == "1"


async def test_what_another_host_took_is_not_known_yet_and_then_it_is(hosts: Hosts) -> None:
    here, there = hosts.here, hosts.there
    older = await hosts.chat()
    assert (await there.http.get(f"/api/chats/{older}")).status_code == 200
    with hosts.cut_off():
        chat_id, said = await hosts.chat(), await here.ask(older)
        run_id = (await here.ask(chat_id))["task_id"]
        hosts.flush()
        chat, run, question = f"/api/chats/{chat_id}", f"/api/task/{run_id}", {"content": "Hello?"}
        requests: list[tuple[str, str, dict[str, Any] | None]] = [
            ("GET", chat, None),
            ("PATCH", chat, {"title": "Mine"}),
            ("DELETE", chat, None),
            ("GET", f"{chat}/active-task", None),
            ("POST", f"{chat}/messages", question),
            ("POST", f"/api/chats/{older}/messages", {**question, "parent_id": said["message_id"]}),
            ("POST", f"/api/chats/{older}/messages/{said['message_id']}/regenerate", None),
            ("GET", run, None),
            ("GET", f"/api/stream/{run_id}", None),
            ("GET", f"/api/runs/{run_id}/events", None),
        ]
        for answer in await asyncio.gather(*(there.http.request(how, path, json=body) for how, path, body in requests)):
            not_known_yet(answer)
        many = await there.http.get(f"/api/stream?runs={run_id}")
        told = orjson.loads(next(line for line in many.text.split("\n") if line.startswith("data: "))[6:])
        assert (told["code"], told["retryable"]) == ("not_known_yet", True)
        assert (await here.http.get(chat)).status_code == (await here.http.get(run)).status_code == 200

    async def known() -> bool:
        return (await there.http.get(chat)).status_code == 200 == (await there.http.get(run)).status_code

    await eventually(known, 30)
    await here.say(await here.claim(run_id), 1, content("Here I am."), done("stop"))
    assert "Here I am." in (await there.http.get(f"/api/stream/{run_id}")).text
    assert (await there.http.post(f"{chat}/messages", json=question)).status_code == 202


async def test_a_reader_who_comes_a_little_too_early_waits(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    # As long as its worker takes, also on a busy machine.
    monkeypatch.setattr("headwater.reading.PATIENCE", 20.0)
    with hosts.cut_off():
        run_id = (await hosts.here.ask(await hosts.chat()))["task_id"]
        hosts.flush()
        readers = {
            asyncio.create_task(hosts.there.http.get(path))
            for path in (f"/api/stream/{run_id}", f"/api/runs/{run_id}/events?wait=10")
        }
        over, _ = await asyncio.wait(readers, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        assert not over
        # Its worker writes the log again.
        await hosts.here.say(await hosts.here.claim(run_id), 1, content("Here I am."), done("stop"))
        for answer in await asyncio.gather(*readers):
            assert answer.status_code == 200
            assert "Here I am." in answer.text


async def test_a_stop_is_kept_until_the_run_is_known(hosts: Hosts) -> None:
    with hosts.cut_off():
        promised, wished = [(await hosts.here.ask(await hosts.chat()))["task_id"] for _ in range(2)]
        for run_id in (promised, wished):
            # The first while its log was there, so that its owner was known; the second when nothing was.
            stopped = await hosts.there.http.post(f"/api/task/{run_id}/cancel")
            assert (stopped.status_code, stopped.json()["status"]) == (202, "cancelling")
            hosts.flush()
        await hosts.there.graph.intake.stops.look()

    async def both_are_over() -> bool:
        return [await hosts.state(run_id) for run_id in (promised, wished)] == ["cancelled", "cancelled"]

    await eventually(both_are_over, 30)
