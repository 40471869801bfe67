"""What Redis's answers mean: the replies of the scripts as values of the log, and as its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from headwater.errors import Fenced, LogClosed, LogLost, LogUnavailable, reason
from headwater.runs import Lease, RunState
from headwater.streams import keys
from headwater.streams.base import Appended, Meta


def appended(lease: Lease, reply: list[Any]) -> Appended:
    """The reply of append.lua or restore.lua. Raises Fenced, LogClosed, LogLost."""
    match reply:
        case [b"ok", count, cancelled]:
            return Appended(count, bool(cancelled))
        case [b"fenced"]:
            raise Fenced(f"Run {lease.run_id}: attempt {lease.attempt} no longer holds it.")
        case [b"closed"]:
            raise LogClosed(f"Run {lease.run_id} has ended.")
        case _:
            raise LogLost(f"Run {lease.run_id}: Redis has no log, or a shorter one than was written. Restore it.")


def meta_of(run_id: str, now: int, values: Sequence[bytes | None], length: int) -> Meta | None:
    """The values of META_FIELDS and the list's length, at `now` of Redis's clock in ms; None when there is no log."""
    if values[0] is None:
        return None
    known = {
        name: value.decode() if value is not None else "" for name, value in zip(keys.META_FIELDS, values, strict=True)
    }
    status = RunState(known["status"])
    return Meta(
        run_id=run_id,
        epoch=known["epoch"],
        status=status,
        attempt=int(known["attempt"]),
        owner_id=known["owner_id"],
        kind=known["kind"],
        chat_id=known["chat_id"] or None,
        # `chunk_count` lags behind while events are written, and says nothing of the items of a packed list.
        count=int(known["chunk_count"]) if status.terminal else length,
        cancelled=known["cancel"] == "1",
        created_at=int(known["created_at"]),
        updated_at=int(known["updated_at"]),
        lease_left=max(0, int(known["lease_until"]) - now),
    )


def unavailable(error: Exception) -> NoReturn:
    """Raise LogUnavailable for it."""
    raise LogUnavailable(
        f"Redis does not answer: {type(error).__name__}: {reason(error)}. Check REDIS_URL and `headwater doctor`."
    ) from error
