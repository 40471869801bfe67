"""Bars as SVG, by a few lines of our own; they can be read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isnan
from typing import Final

WIDTH: Final = 860
LABEL: Final = 190
VALUE: Final = 190
ROW: Final = 24
HEAD: Final = 46

STYLE: Final = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.note { fill: #59636e; font-size: 12px }
.bar { fill: #9aa4ae }
.ours { fill: #0969da }
@media (prefers-color-scheme: dark) {
 text { fill: #e6edf3 } .note { fill: #9198a1 } .bar { fill: #59636e } .ours { fill: #4493f8 }
}
</style>"""


@dataclass(frozen=True, slots=True)
class Bars:
    """One group of bars. The first bar is ours; a value that is not a number has its text alone."""

    title: str
    note: str
    #: Label, length, text behind the bar.
    bars: Sequence[tuple[str, float, str]]


def draw(groups: Sequence[Bars]) -> str:
    """The groups below each other, every one on a scale of its own that begins at 0."""
    parts, y = [], 10.0
    for group in groups:
        parts.append(f'<text class="title" x="10" y="{y + 16}">{escape(group.title)}</text>')
        parts.append(f'<text class="note" x="10" y="{y + 34}">{escape(group.note)}</text>')
        y += HEAD
        longest = max((value for _, value, _ in group.bars if not isnan(value)), default=0.0) or 1.0
        for index, (label, value, text) in enumerate(group.bars):
            parts.append(_bar(y, label, value / longest, text, "bar" if index else "bar ours"))
            y += ROW
        y += 16
    size = f'width="{WIDTH}" height="{y:.0f}" viewBox="0 0 {WIDTH} {y:.0f}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', STYLE, *parts, "</svg>\n"])


def _bar(y: float, label: str, share: float, text: str, kind: str) -> str:

    length = max(2.0, share * (WIDTH - LABEL - VALUE)) if not isnan(share) else 0.0
    return (
        f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>'
        f'<rect class="{kind}" x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{ROW - 8}" rx="2"/>'
        f'<text x="{LABEL + length + 8:.1f}" y="{y + 15}">{escape(text)}</text>'
    )
