"""The schema's changes: to the newest, back to empty. Synchronous; for commands and start-up.

Every function takes the libpq URL of the database and raises StoreUnavailable when it cannot be
reached, SettingsError when the URL cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from headwater.errors import SettingsError
from headwater.store.database import engine_options, explained, parse_url
from headwater.store.tables import metadata

#: A name of our own, so that an application with an Alembic of its own can share the database.
VERSION_TABLE: Final = "headwater_version"
#: PostgreSQL's advisory lock that lets one process at a time change the schema.
_LOCK: Final = 0x68656164
#: Seconds a change of the schema may wait for a lock or take as one statement.
_PATIENCE: Final = 60.0


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema to the newest revision. Safe to run from several processes at once."""
    with _connection(url) as connection:
        command.upgrade(_config(connection), revision)


def downgrade(url: str, revision: str = "base") -> None:
    """Take the schema back to `revision`. What newer tables and columns held is gone."""
    with _connection(url) as connection:
        command.downgrade(_config(connection), revision)


def clear(url: str) -> None:
    """Delete every row and keep the schema."""
    names = ", ".join(table.name for table in metadata.sorted_tables)
    with _connection(url) as connection:
        connection.execute(text(f"TRUNCATE {names}"))


def reset(url: str) -> None:
    """Drop our tables, and nothing else in the database, and make them again."""
    with _connection(url) as connection:
        # Not by downgrading: a reset must also work where the schema is of no known revision.
        metadata.drop_all(connection)
        connection.execute(text(f"DROP TABLE IF EXISTS {VERSION_TABLE}"))
        command.upgrade(_config(connection), "head")


def current(url: str) -> str | None:
    """The revision the database has; None when it has none of our tables yet."""
    with _connection(url) as connection:
        return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def head() -> str:
    """The newest revision this package knows."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def init(url: str) -> None:
    """Make the database itself unless it exists, then bring its schema to the newest revision."""
    target = parse_url(url)
    name = target.database or "headwater"
    options = engine_options(target, _PATIENCE)
    engine = create_engine(target.set(database="postgres"), poolclass=NullPool, isolation_level="AUTOCOMMIT", **options)
    with explained(), engine.connect() as connection:
        query = text("SELECT 1 FROM pg_database WHERE datname = :name")
        if connection.execute(query, {"name": name}).first() is None:
            # A name cannot be a parameter; and to the driver a percent sign begins one.
            quoted = name.replace('"', '""').replace("%", "%%")
            connection.exec_driver_sql(f'CREATE DATABASE "{quoted}"')
    upgrade(url)


@contextmanager
def _connection(url: str) -> Iterator[Connection]:
    """A connection in one transaction that holds the schema's lock."""
    target = parse_url(url)
    engine = create_engine(target, poolclass=NullPool, **engine_options(target, _PATIENCE))
    try:
        with explained(), engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            yield connection
    except CommandError as error:
        raise SettingsError(
            f"The database's schema is of another version of headwater: {error}. "
            "Install the version that made it, or run `headwater db reset` to begin anew."
        ) from error


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    # Alembic reads the option through configparser, to which a percent sign is special.
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["version_table"] = VERSION_TABLE
    return config
