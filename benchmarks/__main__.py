"""`python -m benchmarks [NAME …]`: run benchmarks and write docs/benchmarks/."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from benchmarks import endtoend, journal, polling, readers, worker
from benchmarks.machine import Ticks
from benchmarks.report import Report, machine, write_page

#: A benchmark is told whether to be quick: one short round that shows that everything runs.
ALL: Final[dict[str, Callable[[bool], Awaitable[Report]]]] = {
    "readers": readers.run,
    "worker": worker.run,
    "endtoend": endtoend.run,
    "journal": journal.run,
    "polling": polling.run,
}
RESULTS: Final = Path(__file__).parent.parent / "docs" / "benchmarks"


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Benchmarks, side by side in one run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(ALL)}; default all")
    parser.add_argument("--quick", action="store_true", help="one short round of each; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="print only, leave docs/benchmarks/ as it is")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ALL):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    # A supervisor's SIGTERM is to clean up as Ctrl-C does.
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    for name in arguments.names or ALL:
        before = Ticks.now()
        report = await ALL[name](arguments.quick)
        report.machine = machine(Ticks.now().steal_since(before))
        print(report.markdown(), flush=True)
        if not (arguments.no_write or arguments.quick):
            report.save(RESULTS)
            write_page(RESULTS)


with contextlib.suppress(KeyboardInterrupt):
    try:
        asyncio.run(main())
        sys.exit(0)
    except asyncio.CancelledError:
        sys.exit(143)
sys.exit(130)
