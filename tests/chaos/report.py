"""What came of a run of the harness, and the table that is printed of it."""

from __future__ import annotations

import bisect
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from chaos.checker import Violation
from chaos.history import STORED, History, Reader
from chaos.nemesis import Blow

#: Seconds after the last fault within which every run must end and every reader must know.
SETTLE: Final = 180.0


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
    #: Where history and logs go when a promise was broken or a traceback logged.
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
    #: How often each exception was logged with its traceback: "process: last line".
    tracebacks: Mapping[str, int]
    settled_after: float
    #: Faults that cannot be dealt here, and why.
    left_out: Mapping[str, str]
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

    def standstills(self) -> dict[str, list[float]]:
        """By fault, the times that readers of one run saw nothing while it held or just after, and no other did."""
        held = [
            ((blow.began + self.wall) * 1000, (blow.mended + self.wall) * 1000, blow.fault.name) for blow in self.blows
        ]
        found: dict[str, list[float]] = defaultdict(list)
        for times in arrivals(self.history).values():
            for before, after in pairwise(times):
                names = {name for began, mended, name in held if before < mended and after > began}
                if len(names) == 1:
                    found[names.pop()].append((after - before) / 1000)
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
            f"seed {plan.seed}: {plan.seconds:.0f} s of faults, at most {plan.at_once} at once",
            f"  of          {plan.clients} clients, {plan.hosts} host{'s' if plan.hosts > 1 else ''}",
            *(f"  left out    {name}: {why}" for name, why in sorted(self.left_out.items())),
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
            f"  tracebacks  {sum(self.tracebacks.values())} in the logs",
            *(f"              {times} × {what}" for what, times in sorted(self.tracebacks.items())),
            f"  violations  {len(self.violations)}",
            "",
            # The first may owe to a fault that held as well; the second is of moments with this one alone.
            f"  {'':30} {'':>5}   text flows again,   a run stood still,",
            f"  {'fault':30} {'times':>5}   s: median, most     s: most",
        ]
        flows, stills = self.recoveries(), self.standstills()
        for name, times in sorted(Counter(blow.fault.name for blow in self.blows).items()):
            again = f"{statistics.median(flows[name]):6.2f} {max(flows[name]):6.2f}" if flows[name] else "     -      -"
            still = f"{max(stills[name]):6.2f}" if stills[name] else "     -"
            lines.append(f"  {name:30} {times:5}      {again}         {still}")
        lines += ["", *(f"  VIOLATION {violation}" for violation in self.violations[:50])]
        if self.kept is not None:
            lines.append(f"  history and logs: {self.kept}")
        return "\n".join(lines)


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    return (
        f"{statistics.median(ordered):.2f} median, {ordered[int(len(ordered) * 0.99)]:.2f} p99, {ordered[-1]:.2f} most"
    )


def summary(history: History) -> dict[str, Any]:
    """Figures for the report."""
    states: dict[str, int] = defaultdict(int)
    for row in history.runs:
        states[row["state"]] += 1
    return {
        "promises": len(history.promises),
        "readers": len(history.readers),
        "connections": sum(reader.connections for reader in history.readers),
        "events": sum(len(reader.events) for reader in history.readers),
        "resets": sum(event.type == "reset" for reader in history.readers for event in reader.events),
        "attempts": sum(row["attempt"] for row in history.runs),
        "most_attempts": max((row["attempt"] for row in history.runs), default=0),
        "states": dict(states),
        "failures": dict(Counter(row["code"] for row in history.runs if row["state"] == "failed")),
        "longest_silence": max(map(_longest_silence, history.readers), default=(0.0, 0, "")),
    }


def arrivals(history: History) -> dict[str, list[int]]:
    """By run, when each of its events first reached one of its readers, in Unix milliseconds, in order."""
    first: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
    for reader in history.readers:
        for event in reader.events:
            if event.came and event.epoch != STORED:
                known = first[reader.run_id].setdefault((event.epoch, event.seq), event.came)
                first[reader.run_id][event.epoch, event.seq] = min(known, event.came)
    return {run_id: sorted(times.values()) for run_id, times in first.items()}


def _longest_silence(reader: Reader) -> tuple[float, int, str]:
    """Between two neighbouring events of one log: seconds, when it began in Unix milliseconds, and the run."""
    longest = (0.0, 0, reader.run_id)
    for before, after in pairwise(reader.events):
        # What was made again from the rows has only two times, the run's beginning and its end.
        if before.epoch == after.epoch != STORED and 0 < before.seq < after.seq:
            began, ended = before.data["at"], after.data["at"]
            longest = max(longest, ((ended - began) / 1000, began, reader.run_id))
    return longest
