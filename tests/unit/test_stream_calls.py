"""What a call to Redis makes of what its library does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from headwater.errors import LogUnavailable
from headwater.streams.calls import Calls
from headwater.streams.scripts import Command, Scripts


@pytest.mark.parametrize("instead", [None, ConnectionResetError("the connection broke")])
async def test_a_cancel_that_the_library_loses_is_told(
    monkeypatch: pytest.MonkeyPatch, instead: Exception | None
) -> None:
    calls, waiting = Calls("redis://127.0.0.1:1", Scripts()), asyncio.Event()

    async def trip(commands: Sequence[Command]) -> list[Any]:
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if instead is not None:
                raise instead from None
        return [b"PONG"]

    monkeypatch.setattr(calls, "_trip", trip)
    task = asyncio.create_task(calls.send(("PING",)))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await calls.close()


async def test_a_cancel_of_earlier_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls("redis://127.0.0.1:1", Scripts())

    async def trip(commands: Sequence[Command]) -> list[Any]:
        raise ConnectionResetError("the connection broke")

    monkeypatch.setattr(calls, "_trip", trip)

    async def tidy_up() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            # Whoever ends a run in answer to a cancel still learns what Redis says.
            await calls.send(("PING",))

    task = asyncio.create_task(tidy_up())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(LogUnavailable):
        await task
    await calls.close()
