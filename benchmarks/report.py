"""One benchmark's outcome as tables, JSON and pictures, and the page that holds all of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

Row = Mapping[str, Any]

HEAD: Final = """# Benchmarks

Made by `scripts/bench` and printed as measured, also where a figure falls short.
[How to read them](../guides/benchmarks.md).
"""


@dataclass(slots=True)
class Report:
    """One benchmark's outcome. `rows` is its only table, `tables` are further ones by their titles."""

    name: str
    about: str
    rows: list[Row] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    goals: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Where and how quietly it ran; set once it is over.
    machine: Row = field(default_factory=dict)
    #: Single measurements behind the tables; in the JSON only.
    data: list[Row] = field(default_factory=list)
    #: SVG pictures by file name.
    pictures: dict[str, str] = field(default_factory=dict)

    def goal(self, what: str, measured: float, reach: str, met: bool) -> None:
        """A figure to reach, as measured, also where it falls short."""
        self.goals.append({"goal": what, "measured": round(measured, 4), "reach": reach, "met": met})

    def markdown(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        parts = [f"## {self.name}", self.about, f"Machine: {about}." if about else ""]
        parts += [f"![{self.name}]({name})" for name in self.pictures]
        parts.append(table(self.rows))
        for title, rows in self.tables.items():
            parts += [f"### {title}", table(rows)]
        if self.goals:
            parts += ["### Goals"] if self.tables else []
            parts.append(table([{**goal, "met": "yes" if goal["met"] else "**no**"} for goal in self.goals]))
        return "\n\n".join(part for part in [*parts, *self.notes] if part) + "\n"

    def save(self, folder: Path) -> None:
        """`<name>.json` and the pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in self.pictures.items():
            (folder / name).write_text(picture)
        document = asdict(self) | {"pictures": sorted(self.pictures)}
        (folder / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        return cls(**{**data, "pictures": {name: path.with_name(name).read_text() for name in data["pictures"]}})


def write_page(folder: Path) -> None:
    """`README.md` from every saved report, so that one benchmark can be run again without the others."""
    reports = [Report.load(path) for path in sorted(folder.glob("*.json"))]
    (folder / "README.md").write_text("\n".join([HEAD, *(report.markdown() for report in reports)]))


def machine(steal: float) -> dict[str, Any]:
    """What the figures were measured on."""
    built = sysconfig.get_config_var("CONFIG_ARGS") or ""
    guided = "with" if "--enable-optimizations" in built else "without"
    return {
        "cores": os.cpu_count(),
        "python": f"{platform.python_version()}, configured {guided} --enable-optimizations",
        "system": platform.platform(terse=True),
        "steal": round(steal, 4),
    }


def table(rows: Sequence[Row]) -> str:
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
