"""The way to PostgreSQL: the engine, time limits, and what its errors mean.

A look-up is one statement by SQLAlchemy, committed by itself. A transaction goes by the driver: its statements
travel together, as every round trip and every statement of SQLAlchemy's would be on the way of each message.

Nothing here may hang. A server can be stopped, frozen, full, read-only or behind a cut cable, and
each of these must come out as StoreUnavailable within the caller's wait; data that PostgreSQL will
never take must come out as RecordRefused, so that it can be set aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import psycopg
from psycopg.adapt import AdaptersMap
from psycopg.rows import namedtuple_row
from psycopg.types.string import TextLoader
from sqlalchemy import Executable, Row
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from headwater.clock import Clock
from headwater.errors import RecordRefused, SettingsError, StoreUnavailable

T = TypeVar("T")

#: Classes of SQLSTATE that blame the data: data exception, integrity violation, program limit exceeded.
#: All others count as the server's trouble: a record must not be set aside because a table is missing.
_REFUSALS: Final = ("22", "23", "54")
#: Class 42: the statement does not fit the schema, or may not be executed.
_SCHEMA: Final = "42"
_RIGHTS: Final = "42501"


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL as the driver takes it, with its parameters."""

    sql: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, statement: Executable) -> Self:
        """What SQLAlchemy makes of a statement."""
        compiled = statement.compile(dialect=PGDialect_psycopg())  # type: ignore[attr-defined, no-untyped-call]
        return cls(str(compiled), dict(compiled.params))

    def with_values(self, **values: Any) -> Statement:
        return Statement(self.sql, {**self.values, **values})


_BEGIN: Final = Statement("BEGIN", {})
_COMMIT: Final = Statement("COMMIT", {})


def parse_url(url: str) -> URL:
    """A libpq URL as SQLAlchemy's, with psycopg as its driver. Raises SettingsError."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The URL may hold a password, so it is not repeated.
        raise SettingsError("DATABASE_URL cannot be read. It looks like postgresql://user:password@host/db.") from None
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise SettingsError("DATABASE_URL does not start with postgresql://; only PostgreSQL is supported.")
    return parsed.set(drivername="postgresql+psycopg")


def engine_options(target: URL, wait: float) -> dict[str, Any]:
    """Arguments of `create_engine` that bound every phase of a connection's life by about `wait` seconds."""
    limit = max(1, round(wait * 1000))
    settings = {
        "statement_timeout": limit,
        # A little less, so that a wait for a lock ends with its own error and keeps the connection.
        "lock_timeout": max(1, round(limit * 0.8)),
        # A process that was stopped in the middle of a transaction must not keep its locks.
        "idle_in_transaction_session_timeout": max(limit, 1000) * 5,
    }
    given = target.query.get("options", "")
    options = [given if isinstance(given, str) else " ".join(given)]
    arguments = {
        "application_name": "headwater",
        "connect_timeout": max(2, math.ceil(wait)),
        # What the URL says comes last and so wins.
        "options": " ".join([f"-c {name}={value}" for name, value in settings.items()] + options).strip(),
        # A peer that vanished without a word is noticed by the kernel.
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": max(limit, 1000) * 10,
    }
    return {"connect_args": arguments}


class _Connection(psycopg.AsyncConnection[Any]):
    """A psycopg connection that is given up when a call on it is cancelled.

    By default psycopg asks the server to cancel the query and waits for up to ten seconds, which a
    frozen server uses to the full. Here the socket is shut, the waiting call ends at once, and
    SQLAlchemy throws the connection away. The server ends the orphaned statement by its time limit.
    """

    async def cancel_safe(self, *, timeout: float = 0.0) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as twin:
            twin.shutdown(socket.SHUT_RDWR)


class Transaction:
    """A transaction of several flights; what its last one does not commit is rolled back."""

    def __init__(self, database: Database, connection: psycopg.AsyncConnection[Any]) -> None:
        self._database = database
        self._connection = connection
        self._begun = False

    async def fly(self, *statements: Statement, commit: bool = False) -> list[list[Any]]:
        """Execute statements in one round trip. Returns the rows of each.

        After an error none of them holds. Raises StoreUnavailable or RecordRefused.
        """
        begin = () if self._begun else (_BEGIN,)
        self._begun = True
        rows = await self._database.limited(self._fly(*begin, *statements, *((_COMMIT,) if commit else ())))
        return rows[len(begin) : len(begin) + len(statements)]

    async def _fly(self, *statements: Statement) -> list[list[Any]]:
        cursors = []
        async with self._connection.pipeline():
            for statement in statements:
                cursor = self._connection.cursor(row_factory=namedtuple_row)
                await cursor.execute(statement.sql, statement.values)
                cursors.append(cursor)
        return [await cursor.fetchall() if cursor.description else [] for cursor in cursors]


class Database:
    """A pool of connections, and calls with a time limit. One event loop uses it."""

    def __init__(self, url: str, *, pool_size: int, wait: float, clock: Clock) -> None:
        self.wait = wait
        #: When it was last found away, by the clock's `monotonic`.
        self.lost_at: float | None = None
        self._clock = clock
        target = parse_url(url)
        options = engine_options(target, wait)
        # Ids are text with us.
        adapters = AdaptersMap(psycopg.adapters)
        adapters.register_loader("uuid", TextLoader)
        options["connect_args"] |= {"async_creator_fn": _Connection.connect, "context": _Adapters(adapters)}
        # Each statement is its own transaction, unless there is a BEGIN: a look-up is one round trip and not three.
        options["isolation_level"] = "AUTOCOMMIT"
        self._engine = create_async_engine(target, pool_size=pool_size, max_overflow=0, pool_timeout=wait, **options)
        pool = type(self._engine.pool)
        logging.getLogger(f"{pool.__module__}.{pool.__name__}").addFilter(_one_line)

    async def close(self) -> None:
        """Close all connections. One that is in use is closed when it is given back."""
        await self.limited(self._engine.dispose())

    async def rows(self, statement: Executable, **values: Any) -> Sequence[Row[Any]]:
        """Execute a single statement within the time limit; its rows. Raises StoreUnavailable or RecordRefused."""
        with self._explained():
            async with asyncio.timeout(self.wait), self._lent() as connection:
                return (await connection.execute(statement, values)).all()

    async def fly(self, *statements: Statement) -> list[list[Any]]:
        """One transaction in one round trip. Returns the rows of each statement. Raises as `rows`."""
        async with self.transaction() as transaction:
            return await transaction.fly(*statements, commit=True)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction of several flights, each within the time limit."""
        async with self._lent() as connection:
            raw = _driver_of(connection)
            try:
                yield Transaction(self, raw)
            except Exception:
                await self._roll_back(connection, raw)
                raise
            await self._roll_back(connection, raw)

    async def _roll_back(self, connection: AsyncConnection, raw: psycopg.AsyncConnection[Any]) -> None:
        """Undo what was not committed; costs nothing when all was."""
        # The first error is the one to tell. A connection that cannot even roll back is given up by `limited`.
        with contextlib.suppress(StoreUnavailable):
            await self.limited(raw.rollback())
        if raw.closed:
            await connection.invalidate()

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator[AsyncConnection]:
        connection = await self.limited(self._connect())
        try:
            yield connection
        except Exception:
            raise
        except BaseException:
            await connection.invalidate()
            raise
        finally:
            await connection.close()

    async def limited(self, call: Awaitable[T]) -> T:
        """One call within the time limit. Raises StoreUnavailable or RecordRefused."""
        with self._explained():
            async with asyncio.timeout(self.wait):
                return await call

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with explained():
                yield
        except StoreUnavailable:
            self.lost_at = self._clock.monotonic()
            raise

    async def _connect(self) -> AsyncConnection:
        """A connection from the pool that was not closed behind our back."""
        while True:
            connection = await self._engine.connect()
            if not _has_news(_driver_of(connection).pgconn.socket):
                return connection
            await connection.invalidate()
            await connection.close()


@dataclass(frozen=True, slots=True)
class _Adapters:
    """What psycopg takes for the context of a new connection."""

    adapters: AdaptersMap
    connection: None = None


def _driver_of(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    assert connection.sync_connection is not None
    raw: Any = connection.sync_connection.connection.driver_connection
    return raw  # type: ignore[no-any-return]


def _one_line(record: logging.LogRecord) -> bool:
    """A connection that is given up because the server is away is a warning of one line, not an alarm."""
    if isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], (asyncio.CancelledError, psycopg.Error)):
        record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
    return True


def _has_news(fd: int) -> bool:
    """Whether bytes or an end wait on an idle connection.

    After a restart of the server every pooled connection holds its farewell. Looking costs no
    round trip, which a ping before each transaction would; a peer that went without a word is
    caught by the time limit either way.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


@contextmanager
def explained() -> Iterator[None]:
    """Turn what SQLAlchemy, psycopg and the time limit raise into our errors."""
    try:
        yield
    except DBAPIError as error:
        raise _explain(error.orig or error) from error
    except psycopg.Error as error:
        raise _explain(error) from error
    except UnicodeError as error:
        raise RecordRefused("PostgreSQL cannot store this text: it is not valid Unicode.") from error
    except TimeoutError as error:
        raise StoreUnavailable("PostgreSQL did not answer in time.") from error
    except (SQLAlchemyError, OSError) as error:
        raise _unusable(_first_line(error)) from error


def _explain(cause: BaseException) -> StoreUnavailable | RecordRefused:
    if isinstance(cause, psycopg.errors.PipelineAborted) and isinstance(cause.__context__, psycopg.Error):
        # Of several errors of a flight the driver tells the last: that what came behind the first was not executed.
        cause = cause.__context__
    state = getattr(cause, "sqlstate", None) or ""
    reason = _first_line(cause)
    if state.startswith(_REFUSALS) or (not state and isinstance(cause, psycopg.DataError)):
        return RecordRefused(f"PostgreSQL refuses this data: {reason}")
    if state == _RIGHTS:
        return StoreUnavailable(f"The user in DATABASE_URL lacks a right: {reason}. Grant it, or name another user.")
    if state.startswith(_SCHEMA):
        return StoreUnavailable(f"The database's schema does not fit; run `headwater db upgrade`: {reason}")
    return _unusable(reason)


def _unusable(reason: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"PostgreSQL cannot be used: {reason.removesuffix('.')}. Check DATABASE_URL and `headwater doctor`."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
