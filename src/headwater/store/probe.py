"""What a PostgreSQL server says of itself, for `headwater doctor`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from headwater.store.database import engine_options, explained, parse_url

#: Seconds to wait for a server that does not answer.
_PATIENCE: Final = 3.0


@dataclass(frozen=True, slots=True)
class PostgresFacts:
    """One look at a PostgreSQL server."""

    version: str
    #: It takes no writes: a standby, or set so.
    read_only: bool
    #: Seconds for one round trip.
    round_trip: float
    #: Its clock, Unix milliseconds.
    now_ms: int
    #: Connections it allows in all.
    max_connections: int


def postgres_facts(url: str) -> PostgresFacts:
    """Ask the server. Synchronous. Raises StoreUnavailable, SettingsError."""
    target = parse_url(url)
    engine = create_engine(target, poolclass=NullPool, **engine_options(target, _PATIENCE))
    with explained(), engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        begun = time.perf_counter()
        now = connection.execute(text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")).scalar_one()
        round_trip = time.perf_counter() - begun
        row = connection.execute(
            text(
                "SELECT current_setting('server_version'), current_setting('transaction_read_only') = 'on', "
                "current_setting('max_connections')::int"
            )
        ).one()
    return PostgresFacts(
        version=str(row[0]), read_only=bool(row[1]), round_trip=round_trip, now_ms=int(now), max_connections=int(row[2])
    )
