"""Real servers for every test: one PostgreSQL and one Redis per session, a clean database per test."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from headwater.dev.services import Postgres, Redis
from support.openai_server import OpenAIServer
from support.stack import Stack, StackMaker

_numbers = itertools.count(1)

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def servers_dir() -> Iterator[Path]:
    """Where servers keep their data. Not below pytest's own folder, which the next pytest that starts closes to others:
    to PostgreSQL as well, which runs as another user when we are root.
    """
    with tempfile.TemporaryDirectory(prefix="headwater-tests-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def redis_server(servers_dir: Path) -> Iterator[Redis]:
    server = Redis(servers_dir / "redis", options={"appendonly": "no"})
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_server(servers_dir: Path) -> Iterator[Postgres]:
    server = Postgres(servers_dir / "postgres", options={"fsync": "off"})
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    """An empty Redis database."""
    import redis

    with redis.Redis.from_url(redis_server.url()) as client:
        client.flushall()
    return redis_server.url()


@pytest.fixture(scope="session")
def template_database(postgres_server: Postgres) -> str:
    """A migrated database to copy: copying takes a fraction of migrating."""
    from headwater.store.migrate import init

    init(postgres_server.url("template_headwater"))
    return "template_headwater"


@pytest.fixture
def database_url(postgres_server: Postgres, template_database: str) -> Iterator[str]:
    """A database of its own, with the schema and no rows."""
    name = _copy_database(postgres_server, template_database)
    yield postgres_server.url(name)
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


def _copy_database(server: Postgres, template: str) -> str:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
    return name


@pytest_asyncio.fixture(scope="session")
async def openai_server() -> AsyncIterator[OpenAIServer]:
    """A scripted model API, shared: a question chooses its scenario by `[[scenario:NAME]]`."""
    async with OpenAIServer() as server:
        yield server


@pytest.fixture(scope="session")
def stack_maker(
    servers_dir: Path, postgres_server: Postgres, template_database: str, openai_server: OpenAIServer
) -> StackMaker:
    return StackMaker(
        servers_dir / "stacks",
        postgres_server,
        lambda: _copy_database(postgres_server, template_database),
        openai_server.base_url,
    )


@pytest_asyncio.fixture(scope="session")
async def stack(stack_maker: StackMaker) -> AsyncIterator[Stack]:
    """One running server and worker for all tests that leave them alive and look only at what they made themselves."""
    maker = stack_maker.fresh()
    yield await maker()
    await maker.stop()


@pytest_asyncio.fixture
async def make_stack(stack_maker: StackMaker) -> AsyncIterator[StackMaker]:
    """Stacks for one test that may kill their parts: `await make_stack(servers=2, own_postgres=True, settings={…})`.

    Takes Stack's arguments; `openai_url=None` gives the demo model. They run when you get them.
    """
    maker = stack_maker.fresh()
    yield maker
    await maker.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A test that failed shows the logs of its stacks."""
    report = yield
    if report.failed:
        values = getattr(item, "funcargs", {}).values()
        makers = [value for value in values if isinstance(value, StackMaker)]
        stacks = [value for value in values if isinstance(value, Stack)]
        for each in [*stacks, *(stack for maker in makers for stack in maker.made)]:
            report.sections.append((f"logs of {each.folder}", each.tail()))
    return report
