"""`python -m benchmarks [NAME …]`: run benchmarks and write docs/benchmarks/."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from benchmarks import journal
from benchmarks.report import Report, Ticks, write

ALL: Final[dict[str, Callable[[], Awaitable[Report]]]] = {"journal": journal.run}
RESULTS: Final = Path(__file__).parent.parent / "docs" / "benchmarks"


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Benchmarks, side by side in one run.")
    parser.add_argument(
        "names", nargs="*", choices=[*ALL, []], default=[], help=f"any of: {', '.join(ALL)}; default all"
    )
    parser.add_argument("--no-write", action="store_true", help="print only, leave docs/benchmarks/ as it is")
    arguments = parser.parse_args()
    before, reports = Ticks.now(), []
    for name in arguments.names or ALL:
        reports.append(await ALL[name]())
        print(reports[-1].markdown(), flush=True)
    steal = Ticks.now().steal_since(before)
    print(f"The hypervisor took {steal:.1%} of the machine's time meanwhile.")
    if not arguments.no_write:
        write(RESULTS, reports, steal)


asyncio.run(main())
