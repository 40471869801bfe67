"""One run of the harness: a cluster, clients, a nemesis, the checker, a report.

    python -m chaos.run --seed 7 --minutes 5 --clients 8

Exits with 1 when a promise was broken, and then keeps the history and the logs of all processes.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import random
import shutil
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from chaos.clients import Person, World
from chaos.cluster import HEARTBEAT, Cluster
from chaos.faults import FAULTS
from chaos.history import History, Violation, check, summary
from chaos.nemesis import Blow, Nemesis
from headwater.clock import SystemClock

#: Seconds after the last fault within which every run must end and every reader must know.
SETTLE: Final = 90.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do."""

    seed: int
    seconds: float
    clients: int
    at_once: int = 2
    #: Names of faults; empty for all.
    faults: Sequence[str] = ()
    #: Seconds between faults: least and most.
    gap: tuple[float, float] = (0.5, 3.0)
    settle: float = SETTLE
    #: Hosts, each with a journal of its own: 1 or 2.
    hosts: int = 1
    #: Settings of all processes, over those of the cluster.
    settings: Mapping[str, str] = field(default_factory=dict)
    #: Seconds that the log of an ended run stays.
    ttl: int = 15
    #: Where history and logs go when a promise was broken.
    keep: Path = Path("var/chaos")


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    plan: Plan
    history: History
    blows: list[Blow]
    violations: list[Violation]
    pulse: list[float]
    #: Seconds that accepted questions took, with all repeats of the request.
    accepted_after: list[float]
    #: When the request that was answered with 202 began, and seconds it took.
    requests: list[tuple[float, float]]
    tracebacks: int
    settled_after: float
    #: What makes time.monotonic() Unix time.
    wall: float
    kept: Path | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def recoveries(self) -> dict[str, list[float]]:
        """By fault, seconds from the moment it was mended until fresh text reached a reader; other faults may hold on.

        Left out where nothing was said any more.
        """
        found: dict[str, list[float]] = defaultdict(list)
        for blow in self.blows:
            index = bisect.bisect(self.pulse, blow.mended)
            if index < len(self.pulse):
                found[blow.fault.name].append(self.pulse[index] - blow.mended)
        return found

    def during(self, began: float, ended: float) -> str:
        """The faults that held between two moments of time.monotonic()."""
        names = {blow.fault.name for blow in self.blows if blow.began < ended and blow.mended > began}
        return f"during {', '.join(sorted(names))}" if names else "without a fault"

    def undisturbed(self) -> list[float]:
        """Seconds of the requests during which servers and network were whole: what Redis and PostgreSQL may cost."""
        outer = [blow for blow in self.blows if blow.fault.part in {"servers", "network"}]
        return [
            took
            for began, took in self.requests
            if not any(blow.began < began + took and blow.mended > began for blow in outer)
        ]

    def timeline(self) -> str:
        """Every fault with its times in Unix milliseconds, as events have them."""
        return "\n".join(
            f"{round((blow.began + self.wall) * 1000)} to {round((blow.mended + self.wall) * 1000)} {blow.fault.name}"
            for blow in self.blows
        )

    def report(self) -> str:
        """The table that is printed."""
        figures = self.figures
        states = ", ".join(f"{count} {state}" for state, count in sorted(figures["states"].items()))
        plan = self.plan
        slowest = sorted(self.requests, key=lambda one: -one[1])[:5]
        silence, at = figures["longest_silence"][0], figures["longest_silence"][1] / 1000 - self.wall
        failures = ", ".join(f"{count} {code}" for code, count in sorted(figures["failures"].items()))
        lines = [
            f"seed {plan.seed}: {plan.seconds:.0f} s of faults, at most {plan.at_once} at once; {plan.clients} clients",
            f"  promises    {figures['promises']} ({states})",
            f"  failures    {failures or '-'}",
            f"  attempts    {figures['attempts']}, at most {figures['most_attempts']} of one run",
            f"  readers     {figures['readers']} over {figures['connections']} connections",
            f"  events      {figures['events']}, {figures['resets']} resets",
            f"  202 after   {_spread([took for _, took in self.requests])} s",
            f"              {_spread(self.undisturbed())} s where neither server nor network was at fault",
            f"              {_spread(self.accepted_after)} s with lost replies",
            *(f"              {took:.1f} s {self.during(began, began + took)}" for began, took in slowest),
            f"  silence     {silence:.1f} s at most inside a run {self.during(at, at + silence)}",
            f"  settled     {self.settled_after:.1f} s after the last fault was mended",
            f"  tracebacks  {self.tracebacks} in the logs",
            f"  violations  {len(self.violations)}",
            "",
            f"  {'fault':30} {'times':>5}  until text flows again, s: median, longest",
        ]
        recoveries = self.recoveries()
        for name, times in sorted(Counter(blow.fault.name for blow in self.blows).items()):
            took = recoveries.get(name, [])
            again = f"{statistics.median(took):6.2f} {max(took):6.2f}" if took else "     -      -"
            lines.append(f"  {name:30} {times:5}  {again}")
        lines += ["", *(f"  VIOLATION {violation}" for violation in self.violations[:50])]
        if self.kept is not None:
            lines.append(f"  history and logs: {self.kept}")
        return "\n".join(lines)


async def play(plan: Plan) -> Outcome:
    """Run the plan. Raises nothing for broken promises: they are in the outcome."""
    history = History()
    settings = {"HEADWATER_STREAM_TTL": str(plan.ttl), **plan.settings}
    async with (
        Cluster.running(hosts=plan.hosts, settings=settings) as cluster,
        aiohttp.ClientSession(connector=_connector()) as http,
    ):
        world = World(cluster.endpoints, http, history, patience=HEARTBEAT * 3, late=plan.ttl + 2)
        people = [asyncio.create_task(Person(world, n, plan.seed).live()) for n in range(1, plan.clients + 1)]
        nemesis = Nemesis(cluster, plan.seed, at_once=plan.at_once, faults=plan.faults, gap=plan.gap)
        try:
            # Something to break first.
            await asyncio.sleep(1.0)
            await nemesis.rage(plan.seconds)
            mended = time.monotonic()
            await _settle(cluster, world, people, plan.settle)
            settled_after = time.monotonic() - mended
        finally:
            world.over.set()
            await _end([*people, *world.tasks])
        history.complaints += [*cluster.fallen, *(blow.failure for blow in nemesis.blows if blow.failure)]
        outcome = Outcome(
            plan=plan,
            history=history,
            blows=nemesis.blows,
            violations=check(history),
            pulse=world.pulse,
            accepted_after=world.accepted_after,
            requests=world.requests,
            tracebacks=cluster.tracebacks(),
            settled_after=settled_after,
            wall=SystemClock().now_ms() / 1000 - time.monotonic(),
            figures=summary(history),
        )
        if outcome.violations:
            outcome.kept = _keep(plan, cluster.folder, history, outcome, await cluster.autopsy(history))
    return outcome


def _connector() -> aiohttp.TCPConnector:
    # Connections of its own for every stream, and none that a fault has left half dead for the next request.
    return aiohttp.TCPConnector(limit=0, force_close=True)


async def _settle(cluster: Cluster, world: World, people: Iterable[asyncio.Task[None]], timeout: float) -> None:
    """No more questions; wait until what was promised is kept and everybody has read it."""
    world.closing.set()
    end = time.monotonic() + timeout
    with suppress(TimeoutError, AssertionError):
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + timeout):
            await cluster.whole()
            await asyncio.wait(people)
            await cluster.settled(world.history, max(1.0, end - time.monotonic()))
            while world.tasks and not all(task.done() for task in world.tasks):
                await asyncio.wait(world.tasks)
    # Once more, so that the rows are of this moment whatever came in between.
    await asyncio.to_thread(cluster.rows, world.history)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Let them notice that it is over; what hangs is cancelled. Raises what one of them raised."""
    if tasks:
        _, hanging = await asyncio.wait(tasks, timeout=15)
        for task in hanging:
            task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


def _keep(plan: Plan, folder: Path, history: History, outcome: Outcome, autopsy: dict[str, Any]) -> Path:
    kept = plan.keep / f"seed-{plan.seed}-{time.strftime('%H%M%S')}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "history.json").write_text(json.dumps(history.to_json(), ensure_ascii=False))
    (kept / "autopsy.json").write_text(json.dumps(autopsy, indent=1))
    (kept / "report.txt").write_text(f"{outcome.report()}\n\n{outcome.timeline()}\n")
    for log in folder.glob("*.log"):
        shutil.copy(log, kept / log.name)
    return kept


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    return (
        f"{statistics.median(ordered):.2f} median, {ordered[int(len(ordered) * 0.99)]:.2f} p99, {ordered[-1]:.2f} most"
    )


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, help="fixes faults and questions; default: a new one, which is printed")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are dealt (5)")
    parser.add_argument("--clients", type=int, default=8, help="people who ask at once (8)")
    parser.add_argument("--at-once", type=int, default=2, help="faults that hold at once, at most (2)")
    parser.add_argument("--faults", default="", help=f"only these, comma separated, of: {', '.join(FAULTS)}")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="2: each with a journal of its own (1)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all processes")
    parser.add_argument("--keep", type=Path, default=Path("var/chaos"), help="for the history and logs of violations")
    parser.add_argument("--check", type=Path, help="only judge the history.json that an earlier run kept")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """The exit code: 1 when a promise was broken."""
    arguments = _arguments(given)
    if arguments.check is not None:
        violations = check(History.from_json(json.loads(arguments.check.read_text())))
        print("\n".join(map(str, violations)) or "no violation")
        return bool(violations)
    seed = arguments.seed if arguments.seed is not None else random.randrange(1_000_000)
    names = tuple(name.strip() for name in arguments.faults.split(",") if name.strip())
    unknown = set(names) - set(FAULTS)
    if unknown:
        print(f"There are no faults {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}", file=sys.stderr)
        return 2
    plan = Plan(
        seed,
        arguments.minutes * 60,
        arguments.clients,
        arguments.at_once,
        names,
        hosts=arguments.hosts,
        settings=dict(pair.split("=", 1) for pair in arguments.set),
        keep=arguments.keep.absolute(),
    )
    print(f"seed {seed} …", flush=True)
    outcome = asyncio.run(play(plan))
    print(outcome.report())
    return bool(outcome.violations)


if __name__ == "__main__":
    sys.exit(main())
