"""Every way PostgreSQL can be away, over a real server and a real worker: nobody waits for it, and it gets everything
once and in order when it is back."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import httpx
import psycopg
import pytest
import pytest_asyncio

from headwater.dev.services import Postgres
from support.disk import small_disk
from support.house import frozen
from support.reader import Reader, ask, message_of, new_chat
from support.stack import Stack, StackMaker
from support.wait import eventually

#: Far above what a request takes on a busy machine, far below what a client waits for.
SOON = 20.0
SETTINGS = {"HEADWATER_LEASE_SECONDS": "2", "HEADWATER_QUEUE_GRACE": "3", "HEADWATER_WORKER_CONCURRENCY": "4"}


@pytest_asyncio.fixture(scope="module")
async def stack(stack_maker: StackMaker) -> AsyncIterator[Stack]:
    """One whose PostgreSQL is its own; every test mends what it broke."""
    maker = stack_maker.fresh()
    yield await maker(own_postgres=True, settings=SETTINGS)
    await maker.stop()


# --- the ways to be away ---------------------------------------------------------------------------


@contextmanager
def stopped(stack: Stack) -> Iterator[None]:
    assert stack.postgres_server is not None
    stack.postgres_server.stop()
    try:
        yield
    finally:
        # An object for each life.
        stack.postgres_server = Postgres(stack.postgres_server.data_dir, options=stack.postgres_server.options)
        stack.postgres_server.start()


@contextmanager
def standing_still(stack: Stack) -> Iterator[None]:
    assert stack.postgres_server is not None
    with frozen(stack.postgres_server.pid):
        yield


@contextmanager
def read_only(stack: Stack) -> Iterator[None]:
    # The option lets this session itself write.
    with psycopg.connect(
        stack.database_url, autocommit=True, options="-c default_transaction_read_only=off"
    ) as connection:
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
            connection.execute("SELECT pg_reload_conf()")


@contextmanager
def locked(stack: Stack) -> Iterator[None]:
    with psycopg.connect(stack.database_url) as connection:
        connection.execute("LOCK TABLE chats, messages, runs IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


@contextmanager
def exhausted(stack: Stack) -> Iterator[None]:
    """Somebody else has every connection the server has."""
    with ExitStack() as held:
        admin = held.enter_context(psycopg.connect(stack.database_url, autocommit=True))

        def take() -> None:
            with suppress(psycopg.OperationalError):
                while True:
                    held.enter_context(psycopg.connect(stack.database_url, application_name="greedy"))

        take()
        theirs = "FROM pg_stat_activity WHERE application_name = 'headwater'"
        while admin.execute(f"SELECT count(*) {theirs}".encode()).fetchone() != (0,):
            admin.execute(f"SELECT pg_terminate_backend(pid) {theirs}".encode())
            take()
        yield


@contextmanager
def without_room(stack: Stack) -> Iterator[None]:
    """The tables are on a disk that is full."""
    assert stack.postgres_server is not None
    data = stack.postgres_server.data_dir
    with small_disk(data.with_name("small"), 8, owner=data.stat().st_uid) as disk:
        place = disk.folder / "tables"
        place.mkdir()
        for folder in (place, disk.folder):
            # PostgreSQL's own user, who is another when we are root.
            os.chown(folder, data.stat().st_uid, data.stat().st_gid)
        with psycopg.connect(stack.database_url, autocommit=True) as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'".encode())

            def move(where: str) -> None:
                for table in ("chats", "messages", "runs"):
                    connection.execute(f"ALTER TABLE {table} SET TABLESPACE {where}".encode())

            move("small")
            disk.fill()
            try:
                yield
            finally:
                disk.give_back()
                move("pg_default")
                connection.execute("DROP TABLESPACE small")


WAYS: list[Callable[[Stack], AbstractContextManager[None]]] = [
    stopped, standing_still, read_only, locked, exhausted, without_room,
]  # fmt: skip


# --- what people notice of it ----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_people_are_answered_and_the_history_catches_up(
    stack: Stack, way: Callable[[Stack], AbstractContextManager[None]]
) -> None:
    async with stack.client() as http:
        chat_id = await new_chat(http)
        said: list[tuple[str, str]] = []

        async def say(text: str) -> dict[str, Any]:
            begun = time.monotonic()
            accepted = await ask(http, text, chat_id)
            took = time.monotonic() - begun
            print(f"{way.__name__}: accepted after {took:.2f} s")
            assert took < SOON
            reader = await Reader(stack.base_url, accepted["task_id"]).read()
            assert (reader.end, reader.text) == ("done", "Hello, world")
            said.extend([("user", text), ("assistant", reader.text)])
            return accepted

        await say("Before. [[scenario:hello]]")
        await eventually(lambda: stored(stack, chat_id) == said, every=0.05)
        with way(stack):
            # Longer than a page of a table and not to be compressed, so that it needs room.
            meanwhile = await say(f"Meanwhile. [[scenario:hello]] {os.urandom(8000).hex()}")
            # The next turn builds upon what PostgreSQL has never seen.
            await say("And then. [[scenario:hello]]")
            assert (await message_of(http, meanwhile))["status"] == "done"
            shown = (await http.get(f"/api/chats/{chat_id}")).json()
            assert [(one["role"], one["content"]) for one in shown["messages"]] == said
            listed = (await http.get("/api/chats")).json()
            assert chat_id in [one["id"] for one in listed["items"]]
            if way in (stopped, standing_still):
                assert shown["degraded"]
                assert listed["degraded"]
            await eventually(lambda: told(http), 60, every=0.1)
            assert (await http.get("/readyz")).status_code == 200
        await eventually(lambda: stored(stack, chat_id) == said, 60, every=0.1)
        assert ended(stack, chat_id) == ["done"] * 3
        await eventually(lambda: well(http), 60, every=0.1)
        await say("After. [[scenario:hello]]")
        await eventually(lambda: stored(stack, chat_id) == said, every=0.05)


async def told(http: httpx.AsyncClient) -> bool:
    """Whether health says what the page shows: less than ok, and that the history is catching up."""
    health = (await http.get("/api/health")).json()
    assert health["status"] == "degraded", health
    assert health["parts"]["postgres"]["ok"] is False, health
    assert "catching up" in health["parts"]["journal"]["detail"], health
    return True


async def well(http: httpx.AsyncClient) -> bool:
    health = (await http.get("/api/health")).json()
    assert health["status"] == "ok", health
    return True


def stored(stack: Stack, chat_id: str) -> list[tuple[str, str]]:
    with psycopg.connect(stack.database_url) as connection:
        found = connection.execute(
            "SELECT role, content FROM messages WHERE chat_id = %s AND status = 'done' ORDER BY created_at, id",
            [chat_id],
        )
        return [(role, content) for role, content in found]


def ended(stack: Stack, chat_id: str) -> list[str]:
    with psycopg.connect(stack.database_url) as connection:
        found = connection.execute("SELECT state FROM runs WHERE chat_id = %s ORDER BY created_at", [chat_id])
        return [row[0] for row in found]
