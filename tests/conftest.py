"""Real servers for every test: one PostgreSQL and one Redis per session, a clean database per test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headwater.dev.services import Postgres, Redis

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def servers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


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
    from headwater.store.migrate import upgrade

    postgres_server.create_database("template_headwater")
    upgrade(postgres_server.url("template_headwater"))
    return "template_headwater"


@pytest.fixture
def database_url(postgres_server: Postgres, template_database: str) -> Iterator[str]:
    """A database of its own, with the schema and no rows."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template_database}"'.encode())
        yield postgres_server.url(name)
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())
