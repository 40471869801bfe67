"""Nemesis: breaks a cluster at random from a seed, a few things at a time, and mends all of it in the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from chaos.cluster import Cluster
from chaos.faults import FAULTS, Fault


@dataclass(slots=True)
class Blow:
    """One fault as it was dealt; times by time.monotonic()."""

    fault: Fault
    began: float
    #: Everything it broke runs again.
    mended: float = 0.0
    #: Breaking or mending did not go as it must.
    failure: str = ""


#: Faults that are dealt in any case: a run on a slow machine takes longer, and proves as much.
LEAST: Final = 5


class Nemesis:
    """Deals faults. The seed fixes which, in what order, for how long and how far apart."""

    def __init__(
        self, cluster: Cluster, seed: int, *, at_once: int = 2, faults: Sequence[str], gap: tuple[float, float]
    ) -> None:
        self.blows: list[Blow] = []
        self._cluster = cluster
        self._chance = random.Random(f"nemesis-{seed}")
        self._at_once = at_once
        self._choice = [FAULTS[name] for name in faults]
        self._gap = gap
        self._held: dict[str, asyncio.Task[None]] = {}

    async def rage(self, seconds: float) -> None:
        """Deal faults for so long, and LEAST of them, then wait until all of them are mended."""
        end = time.monotonic() + seconds
        bag: list[Fault] = []
        while time.monotonic() < end or len(self.blows) < LEAST:
            if not bag:
                # Every kind once before any comes again.
                bag = self._chance.sample(self._choice, len(self._choice))
            fault, seed = bag.pop(), self._chance.random()
            await asyncio.sleep(self._chance.uniform(*self._gap))
            await self._free(fault.part)
            self._held[fault.part] = asyncio.create_task(self._deal(fault, random.Random(seed)))
        await self._mended()

    async def _free(self, part: str) -> None:
        """Wait until the part is whole and there is room for one more fault."""
        while True:
            self._held = {name: task for name, task in self._held.items() if not task.done()}
            if part in self._held:
                await asyncio.wait({self._held[part]})
            elif len(self._held) >= self._at_once:
                await asyncio.wait(self._held.values(), return_when=asyncio.FIRST_COMPLETED)
            else:
                return

    async def _mended(self) -> None:
        while self._held:
            await asyncio.wait(self._held.values())
            self._held = {name: task for name, task in self._held.items() if not task.done()}

    async def _deal(self, fault: Fault, chance: random.Random) -> None:
        blow = Blow(fault, time.monotonic())
        self.blows.append(blow)
        try:
            async with fault.hold(self._cluster, chance):
                await asyncio.sleep(chance.uniform(*fault.lasts))
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the report
            blow.failure = f"{fault.name}: {type(error).__name__}: {error}"
        blow.mended = time.monotonic()
