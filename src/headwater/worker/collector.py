"""Python's garbage collector in a worker: rarer, and past what lives as long as the process."""

from __future__ import annotations

import gc
from typing import Final

#: Allocations before the youngest are looked at, and how many such looks come before one at the next older ones.
#: By Python's own figures, 700, 10 and 10, a worker with hundreds of answers collects hundreds of times a second and
#: finds next to nothing: what a token leaves behind is freed by reference counts.
THRESHOLDS: Final = (20_000, 20, 100)


def relieve() -> None:
    """Leave what there is now, modules above all, out of every collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
