"""What the machine did during a measurement: CPU time by process, what others took, and memory.

From Linux's /proc. Where there is none, CPU and memory read as not a number and are printed as such.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HERTZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Ticks:
    """CPU time of the whole machine since boot, in seconds."""

    busy: float
    steal: float
    total: float

    @classmethod
    def now(cls) -> Ticks:
        try:
            line = Path("/proc/stat").read_text().split("\n", 1)[0]
        except OSError:
            return cls(float("nan"), float("nan"), float("nan"))
        ticks = [int(part) / _HERTZ for part in line.split()[1:]]
        idle, steal = ticks[3] + ticks[4], ticks[7]
        return cls(sum(ticks[:8]) - idle - steal, steal, sum(ticks[:8]))

    def steal_since(self, earlier: Ticks) -> float:
        """Share of the machine's time that the hypervisor took."""
        return (self.steal - earlier.steal) / max(1e-9, self.total - earlier.total)


#: The benchmark and everything it started.
_OURS: Final = "all of ours"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a window cost."""

    #: CPU seconds of each named group of processes.
    cpu: Mapping[str, float]
    #: Shares of the whole machine: taken by the hypervisor, and by processes that are none of ours.
    steal: float
    foreign: float


class Watch:
    """Measures from its making to `usage()`. Processes that end in between are not counted."""

    def __init__(self, **groups: Sequence[int]) -> None:
        """`groups`: names and the processes that belong to each, in full (`family`)."""
        self._groups = groups
        self._before = self._sample()

    def usage(self) -> Usage:
        ticks, cpu = self._sample()
        ticks_before, before = self._before
        total = max(1e-9, ticks.total - ticks_before.total)
        spent = {name: sum(at - before[name].get(pid, 0.0) for pid, at in cpu[name].items()) for name in cpu}
        foreign = (ticks.busy - ticks_before.busy) - spent.pop(_OURS)
        return Usage(spent, ticks.steal_since(ticks_before), max(0.0, foreign / total))

    def _sample(self) -> tuple[Ticks, dict[str, dict[int, float]]]:
        groups = {_OURS: family(os.getpid()), **self._groups}
        return Ticks.now(), {name: _each(pids) for name, pids in groups.items()}


def cpu_of(pids: Iterable[int]) -> float:
    """CPU seconds of these processes since their start, their ended threads included."""
    return sum(_each(pids).values())


def _each(pids: Iterable[int]) -> dict[int, float]:
    """CPU seconds of each that lives."""
    if not Path("/proc/self/stat").exists():
        return dict.fromkeys(pids, float("nan"))
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            # The name in parentheses may hold spaces.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = (int(fields[11]) + int(fields[12])) / _HERTZ
    return found


def family(pid: int) -> list[int]:
    """The process and everything it started that lives."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def memory_of(pids: Iterable[int]) -> float:
    """Bytes of memory of these processes, what they share counted once (PSS)."""
    total = 0.0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            return float("nan")
        total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def pinned(command: Sequence[str], core: int | None) -> list[str]:
    """The command, held on one core where that can be done; a process keeps its id."""
    taskset = shutil.which("taskset")
    if core is None or taskset is None or (os.cpu_count() or 1) < 2:
        return [*command]
    return [taskset, "-c", str(core), *command]


def raise_descriptors() -> int:
    """Let this process and its children open as many files as the system allows; returns how many."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
