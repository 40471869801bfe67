"""The way to PostgreSQL, as far as it can be seen without one."""

from __future__ import annotations

import asyncio
import logging

import psycopg
import pytest

from headwater.clock import SystemClock
from headwater.errors import StoreUnavailable
from headwater.store.database import Database, explained


def test_a_connection_that_is_given_up_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    Database("postgresql://127.0.0.1/x", pool_size=1, wait=1, clock=SystemClock())
    # What SQLAlchemy's pool says when a roll-back on a frozen server is cancelled by the time limit.
    pool = logging.getLogger("sqlalchemy.pool.impl.AsyncAdaptedQueuePool")
    pool.error("Exception during reset or similar", exc_info=asyncio.CancelledError())
    pool.error("Something of ours", exc_info=ValueError("bad"))
    given_up, ours = caplog.records
    assert (given_up.levelname, given_up.exc_info) == ("WARNING", None)
    assert (ours.levelname, ours.exc_info is not None) == ("ERROR", True)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (psycopg.errors.InsufficientPrivilege("permission denied for table chats"), "Grant it"),
        (psycopg.errors.UndefinedColumn('column "priority" does not exist'), "headwater db upgrade"),
    ],
)
def test_what_a_database_lacks_is_said_with_what_to_do(error: psycopg.Error, advice: str) -> None:
    with pytest.raises(StoreUnavailable, match=advice), explained():
        raise error
