"""How the system is: every part asked at once, each for a short time, the answer kept for a moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from headwater.errors import HeadwaterError
from headwater.telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds one part may take to answer.
PATIENCE: Final = 1.5
#: Seconds an answer holds, so that many pages that ask cost one look.
KEEP: Final = 1.0

#: Looks at one part: what to show besides `ok` and `detail`. Raises when the part is away.
Probe = Callable[[], Awaitable[Mapping[str, Any]]]


class Checkup:
    """Probes by part. `down` when a part that accepting needs is away, `degraded` when another is."""

    def __init__(self, probes: Mapping[str, Probe], *, vital: frozenset[str], telemetry: Telemetry) -> None:
        self._probes = probes
        self._vital = vital
        self._telemetry = telemetry
        self._asking: asyncio.Task[dict[str, dict[str, Any]]] | None = None
        self._asked_at = 0.0

    async def parts(self) -> dict[str, dict[str, Any]]:
        """`{part: {ok, detail, …}}`, at most a second old."""
        now = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now - self._asked_at > KEEP):
            self._asked_at = now
            self._asking = asyncio.create_task(self._look())
        # Shielded: one caller that hangs up must not take the answer from the others.
        return await asyncio.shield(self._asking)

    def status(self, parts: Mapping[str, Mapping[str, Any]]) -> str:
        """`ok`, `degraded` or `down`."""
        away = {name for name, part in parts.items() if not part["ok"]}
        return "down" if away & self._vital else "degraded" if away else "ok"

    async def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _look(self) -> dict[str, dict[str, Any]]:
        found = await asyncio.gather(*(self._probe(name, probe) for name, probe in self._probes.items()))
        return dict(zip(self._probes, found, strict=True))

    async def _probe(self, name: str, probe: Probe) -> dict[str, Any]:
        part: dict[str, Any]
        try:
            async with asyncio.timeout(PATIENCE):
                part = {"ok": True, "detail": "", **await probe()}
        except HeadwaterError as error:
            part = {"ok": False, "detail": str(error)}
        except TimeoutError:
            part = {"ok": False, "detail": f"did not answer within {PATIENCE:.1f} s"}
        except Exception as error:
            logger.exception("the probe of %s failed", name)
            part = {"ok": False, "detail": type(error).__name__}
        self._telemetry.gauge("headwater_up", 1 if part["ok"] else 0, part=name)
        return part
