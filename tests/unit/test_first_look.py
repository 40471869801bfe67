"""What a server says of its parts in the log after its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from headwater.api.graph import _FirstLook
from headwater.api.health import Checkup
from headwater.telemetry import Telemetry


class Parts:
    """A Redis that is away; the worker is there from the second look on, or never."""

    def __init__(self, *, worker_comes: bool) -> None:
        self.worker_comes = worker_comes
        self.looks = 0

    async def redis(self) -> Mapping[str, Any]:
        return {"ok": False, "detail": "Redis is away."}

    async def worker(self) -> Mapping[str, Any]:
        self.looks += 1
        return {"ok": self.worker_comes and self.looks > 1, "detail": "No worker runs."}


@pytest.mark.parametrize("worker_comes", [True, False])
async def test_a_worker_has_time_to_come_and_everything_else_is_said_at_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, worker_comes: bool
) -> None:
    monkeypatch.setattr("headwater.api.health.KEEP", -1.0)
    parts = Parts(worker_comes=worker_comes)
    checkup = Checkup({"redis": parts.redis, "worker": parts.worker}, vital=frozenset(), telemetry=Telemetry())
    await _FirstLook(checkup, settled=0).run()
    await checkup.close()
    said = ["redis: Redis is away."] if worker_comes else ["redis: Redis is away.", "worker: No worker runs."]
    assert [record.getMessage() for record in caplog.records] == said
    assert parts.looks == 2
