"""The names of a run's keys in Redis, and of the fields of its hash.

| key                        | type   | holds                                                   |
|----------------------------|--------|---------------------------------------------------------|
| `stream:{<run>}:chunks`    | list   | one event as JSON per item; the item's place is its seq |
|                            |        | once packed: some hundreds of events per zstd frame     |
| `stream:{<run>}:metadata`  | hash   | the fields below                                        |
| `stream:{<run>}:run`       | string | the run as JSON, for whoever takes it over              |
| `stream:{<run>}:behind`    | set    | ids of the runs that wait for the end of this one       |
| `stream:{<run>}` (channel) |        | `<epoch> <first seq>`, then one event per line          |
| `headwater:due`            | zset   | run ids; score: when to look whether somebody holds it  |
| `headwater:owner:{<owner>}:<what>:taken`   | zset | run ids; score: when the place is free again |
| `headwater:owner:{<owner>}:<what>:waiting` | zset | run ids; score: the order of their turns     |
| `headwater:workers`        | zset   | workers' names; score: when they count as gone          |

The braces are literal: they put all keys of one run into one hash slot of a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

DUE: Final = "headwater:due"
WORKERS: Final = "headwater:workers"
#: What the keys of all owners' places begin with.
OWNERS: Final = "headwater:owner:"

#: What a `Meta` is made from, in the order it is asked for.
META_FIELDS: Final = (
    "epoch",
    "status",
    "attempt",
    "owner_id",
    "kind",
    "chat_id",
    "chunk_count",
    "cancel",
    "created_at",
    "updated_at",
    "lease_until",
)
_OF_A_RUN: Final = re.compile(r"stream:\{([^}]+)\}:").match


def chunks(run_id: str) -> str:
    return f"stream:{{{run_id}}}:chunks"


def metadata(run_id: str) -> str:
    return f"stream:{{{run_id}}}:metadata"


def run(run_id: str) -> str:
    return f"stream:{{{run_id}}}:run"


def behind(run_id: str) -> str:
    return f"stream:{{{run_id}}}:behind"


def run_of(command: Sequence[Any]) -> str | None:
    """The run whose key a command names first; None when it names none."""
    named = next((found for part in command if isinstance(part, str) and (found := _OF_A_RUN(part))), None)
    return named[1] if named is not None else None


def places(owner_id: str, what: str) -> str:
    """An owner's places for something: braces, because its two sets change in one step."""
    return f"{OWNERS}{{{owner_id}}}:{what}"


def channel(run_id: str) -> str:
    return f"stream:{{{run_id}}}"
