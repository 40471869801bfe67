"""Tables, JSON and what the machine was doing meanwhile."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Ticks:
    """CPU time of the whole machine since boot, in seconds."""

    busy: float
    steal: float
    total: float

    @classmethod
    def now(cls) -> Ticks:
        ticks = [
            int(part) / os.sysconf("SC_CLK_TCK") for part in Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        ]
        idle, steal = ticks[3] + ticks[4], ticks[7]
        return cls(sum(ticks[:8]) - idle - steal, steal, sum(ticks[:8]))

    def steal_since(self, earlier: Ticks) -> float:
        """Share of the machine's time that the hypervisor took."""
        return (self.steal - earlier.steal) / max(1e-9, self.total - earlier.total)


@dataclass(slots=True)
class Report:
    """One benchmark's outcome."""

    name: str
    about: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    goals: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def goal(self, what: str, measured: float, reach: str, met: bool) -> None:
        """A figure to reach, as measured, also where it falls short."""
        self.goals.append({"goal": what, "measured": round(measured, 3), "reach": reach, "met": met})

    def markdown(self) -> str:
        parts = [f"## {self.name}", self.about, table(self.rows)]
        if self.goals:
            parts.append(table([{**goal, "met": "yes" if goal["met"] else "**no**"} for goal in self.goals]))
        parts.extend(self.notes)
        return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the first row names the columns."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in head) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return "" if value is None else str(value)


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which the share `q` lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def write(folder: Path, reports: Sequence[Report], steal: float) -> None:
    """`results.json` and `README.md` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "steal": round(steal, 4),
    }
    document = {
        "machine": machine,
        "reports": [
            {"name": report.name, "rows": report.rows, "goals": report.goals, "notes": report.notes}
            for report in reports
        ],
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = "\n".join(report.markdown() for report in reports)
    (folder / "README.md").write_text(f"# Benchmarks\n\nMade by `scripts/bench` on one machine: {about}.\n\n{text}")
