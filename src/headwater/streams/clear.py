"""Everything of ours in a Redis, deleted: for `headwater db clear` and `headwater db reset`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import redis.asyncio

from headwater.streams import keys
from headwater.streams.probe import look

#: Keys looked at, and deleted, in one step.
_STEP: Final = 500


async def clear(url: str, queues: Sequence[str]) -> int:
    """Delete the logs of all runs, what is due, and the messages in these queues; nothing else. The number of runs.

    Raises LogUnavailable.
    """
    async with look(url) as client:
        # First what would begin a run again.
        await client.unlink(*queues, keys.DUE)
        await _unlink(client, f"{keys.OWNERS}*")
        return len({key.rpartition(":")[0] for key in await _unlink(client, keys.channel("*") + ":*")})


async def _unlink(client: redis.asyncio.Redis, pattern: str) -> set[str]:
    names: set[str] = set()
    cursor = 0
    while True:
        cursor, found = await client.scan(cursor, match=pattern, count=_STEP)
        if found:
            names |= {str(key) for key in found}
            await client.unlink(*found)
        if cursor == 0:
            return names
