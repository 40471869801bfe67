"""The migrations make exactly the tables that the store declares, and can be taken back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect
from sqlalchemy.pool import NullPool

from headwater.dev.services import Postgres
from headwater.errors import SettingsError, StoreUnavailable
from headwater.store import migrate
from headwater.store.database import parse_url
from headwater.store.tables import metadata

TABLES = {"chats", "messages", "runs"}


@pytest.fixture
def empty_url(postgres_server: Postgres) -> Iterator[str]:
    """A database without any table."""
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute('CREATE DATABASE "empty %"')
        yield postgres_server.url("empty%20%25")
        connection.execute('DROP DATABASE "empty %" WITH (FORCE)')


def fetch(url: str, statement: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(statement.encode()).fetchall()


def tables(url: str) -> set[str]:
    rows = fetch(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return {row[0] for row in rows}


def shape(url: str) -> dict[str, list[Any]]:
    """Columns, constraints and indices of our tables, as PostgreSQL itself spells them."""
    ours = "('chats', 'messages', 'runs')"
    return {
        "columns": fetch(
            url,
            "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
            f"WHERE table_name IN {ours} ORDER BY 1, 2",
        ),
        "constraints": fetch(
            url,
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
            f"WHERE conrelid::regclass::text IN {ours} ORDER BY 1, 2",
        ),
        "indices": fetch(url, f"SELECT indexdef FROM pg_indexes WHERE tablename IN {ours} ORDER BY 1"),
    }


def test_from_nothing_to_head_is_what_the_tables_declare(empty_url: str) -> None:
    assert migrate.current(empty_url) is None
    migrate.upgrade(empty_url)
    assert migrate.current(empty_url) == migrate.head()

    engine = create_engine(parse_url(empty_url), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": migrate.VERSION_TABLE})
        assert compare_metadata(context, metadata) == []
        assert set(inspect(connection).get_table_names()) == TABLES | {migrate.VERSION_TABLE}

    migrated = shape(empty_url)
    assert [len(part) for part in migrated.values()] == [7 + 14 + 20, len(migrated["constraints"]), 3 + 6]
    migrate.downgrade(empty_url)
    with engine.begin() as connection:
        metadata.create_all(connection)
    assert shape(empty_url) == migrated


def test_down_and_up_again(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    before = shape(empty_url)
    migrate.downgrade(empty_url)
    assert tables(empty_url) == {migrate.VERSION_TABLE}
    assert migrate.current(empty_url) is None
    migrate.upgrade(empty_url)
    assert shape(empty_url) == before


def test_an_upgrade_of_what_is_newest_already_changes_nothing(database_url: str) -> None:
    before = shape(database_url)
    migrate.upgrade(database_url)
    assert shape(database_url) == before


def test_upgrades_at_the_same_time_wait_for_each_other(empty_url: str) -> None:
    problems: list[BaseException] = []

    def upgrade() -> None:
        try:
            migrate.upgrade(empty_url)
        except BaseException as error:  # noqa: BLE001 - told by the assertion below
            problems.append(error)

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert problems == []
    assert tables(empty_url) == TABLES | {migrate.VERSION_TABLE}


INSERT = (
    "INSERT INTO chats (id, owner_id, created_at, updated_at, version) "
    "VALUES (gen_random_uuid(), 'local', now(), now(), 1)"
)


def test_clear_deletes_the_rows_and_keeps_the_schema(database_url: str) -> None:
    before = shape(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute(INSERT.encode())
    migrate.clear(database_url)
    assert fetch(database_url, "SELECT count(*) FROM chats") == [(0,)]
    assert shape(database_url) == before
    assert migrate.current(database_url) == migrate.head()


def test_reset_makes_our_tables_anew_and_touches_no_others(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(INSERT.encode())
        connection.execute("CREATE TABLE theirs AS SELECT 1 AS x")
        connection.execute("DROP TABLE runs")
    migrate.reset(database_url)
    assert tables(database_url) == TABLES | {migrate.VERSION_TABLE, "theirs"}
    assert fetch(database_url, "SELECT count(*) FROM chats") == [(0,)]
    assert fetch(database_url, "SELECT x FROM theirs") == [(1,)]


def test_init_makes_the_database_too(postgres_server: Postgres) -> None:
    url = postgres_server.url("made%20%22here%22%20%25")
    with pytest.raises(StoreUnavailable, match="does not exist"):
        migrate.upgrade(url)
    try:
        migrate.init(url)
        migrate.init(url)
        assert tables(url) == TABLES | {migrate.VERSION_TABLE}
    finally:
        with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
            connection.execute('DROP DATABASE IF EXISTS "made ""here"" %"')


def test_a_schema_of_a_later_version_is_named(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999'".encode())
    with pytest.raises(SettingsError, match="another version"):
        migrate.upgrade(database_url)
    migrate.reset(database_url)
    assert migrate.current(database_url) == migrate.head()


@pytest.mark.parametrize("url", ["not a url", "mysql://root@localhost/x", "postgresql://host:port/x"])
def test_a_url_that_cannot_be_read_is_a_setting_to_mend(url: str) -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        migrate.current(url)


def test_a_server_that_is_not_there_is_said() -> None:
    with pytest.raises(StoreUnavailable):
        migrate.upgrade("postgresql://postgres@/x?host=/nowhere")
