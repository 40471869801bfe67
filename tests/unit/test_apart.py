"""One run's trouble beside the others: what is told, how often, and what is not kept apart."""

from __future__ import annotations

import pytest

from headwater.apart import Apart
from headwater.errors import HeadwaterError, LogUnavailable, StoreUnavailable


async def fails(error: Exception) -> int:
    raise error


async def gives(number: int) -> int:
    return number


async def test_it_gives_what_the_work_comes_to() -> None:
    assert await Apart("swept")("run", gives(3)) == 3


@pytest.mark.parametrize(
    ("error", "told", "fault"),
    [
        (StoreUnavailable("PostgreSQL is away."), "Run one cannot be swept now: PostgreSQL is away.", False),
        (RuntimeError("a fault"), "Run one cannot be swept", True),
    ],
)
async def test_trouble_is_told_once_for_each_run_until_it_is_forgotten(
    error: Exception, told: str, fault: bool, caplog: pytest.LogCaptureFixture
) -> None:
    apart = Apart("swept")
    for _ in range(2):
        assert await apart("one", fails(error)) is None
    assert [(record.getMessage(), bool(record.exc_info)) for record in caplog.records] == [(told, fault)]
    await apart("other", fails(error))
    assert len(caplog.records) == 2
    apart.forget(but={"one"})
    await apart("one", fails(error))
    assert len(caplog.records) == 2
    await apart("other", fails(error))
    assert len(caplog.records) == 3
    apart.forget()
    await apart("one", fails(error))
    assert len(caplog.records) == 4


async def test_a_log_that_is_away_is_everybodys_trouble() -> None:
    with pytest.raises(HeadwaterError) as raised:
        await Apart("swept")("run", fails(LogUnavailable("away")))
    assert isinstance(raised.value, LogUnavailable)
