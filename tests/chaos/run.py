"""One run of the harness: a cluster, clients, a nemesis, the checker, a report.

    python -m chaos.run --seed 7 --minutes 5 --clients 8

Exits with 1 when a promise was broken. Then, and when a process logged a traceback, the history and the
logs of all processes are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import aiohttp

from chaos.checker import check
from chaos.cluster import HEARTBEAT, Cluster
from chaos.faults import FAULTS
from chaos.history import History
from chaos.nemesis import Blow, Nemesis
from chaos.people import Person
from chaos.readers import Refusal, World
from chaos.report import Outcome, Plan, summary
from headwater.clock import SystemClock

#: Faults of these parts let nobody go on with a run, but for those of which the promise is that somebody does.
_AWAY: Final = frozenset({"workers", "redis", "provider"})
_NOTICED: Final = frozenset({"worker_killed", "worker_terminated", "worker_frozen", "orders_lost", "orders_doubled"})
#: Milliseconds after the disk has room again in which it may still be said to be full.
_ROOM: Final = 2_000


async def play(plan: Plan) -> Outcome:
    """Run the plan. Raises nothing for broken promises: they are in the outcome."""
    history = History(hosts=plan.hosts)
    settings = {"HEADWATER_STREAM_TTL": str(plan.ttl), **plan.settings}
    async with (
        Cluster.running(hosts=plan.hosts, settings=settings) as cluster,
        aiohttp.ClientSession(connector=_connector()) as http,
    ):
        world = World(cluster.endpoints, http, history, patience=HEARTBEAT * 3, late=plan.ttl + 2)
        faults = [name for name in plan.faults or FAULTS if name not in cluster.missing]
        people = [asyncio.create_task(Person(world, n, plan.seed).live()) for n in range(1, plan.clients + 1)]
        nemesis = Nemesis(cluster, plan.seed, at_once=plan.at_once, faults=faults, gap=plan.gap)
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
        autopsy = await cluster.autopsy(history)
        await _stop(cluster)
        excuse(history, world.refused, nemesis.blows, _wall())
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
            left_out=cluster.missing,
            wall=_wall(),
            figures=summary(history),
        )
        if outcome.violations or outcome.tracebacks:
            outcome.kept = _keep(plan, cluster.folder, history, outcome, autopsy)
    return outcome


def _wall() -> float:
    return SystemClock().now_ms() / 1000 - time.monotonic()


async def _stop(cluster: Cluster) -> None:
    """End all processes as a deployment does; one that has to be killed is a complaint."""
    try:
        await cluster.stop()
    except AssertionError as error:
        cluster.fallen.append(str(error))


def excuse(history: History, refused: Iterable[Refusal], blows: Iterable[Blow], wall: float) -> None:
    """Tell the checker when nobody could go on, and which refusals for want of room had no cause.

    `wall` is what makes time.monotonic() Unix time.
    """
    full: list[tuple[int, int]] = []
    for blow in blows:
        held = round((blow.began + wall) * 1000), round((blow.mended + wall) * 1000)
        if blow.fault.part in _AWAY and blow.fault.name not in _NOTICED:
            history.away.append(held)
        elif blow.fault.name == "journal_full":
            full.append((held[0], held[1] + _ROOM))
    for began, ended, what in refused:
        if not any(gone < ended and back > began for gone, back in full):
            history.complaints.append(f"{what}, although there was room")


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


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, help="fixes faults and questions; default: a new one, which is printed")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are dealt (5)")
    parser.add_argument("--clients", type=int, default=8, help="people who ask at once (8)")
    parser.add_argument("--at-once", type=int, default=2, help="faults that hold at once, at most (2)")
    parser.add_argument("--faults", default="", help=f"only these, comma separated, of: {', '.join(FAULTS)}")
    parser.add_argument("--ttl", type=int, default=15, help="seconds that the log of an ended run stays (15)")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="2: each with a journal of its own (1)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all processes")
    parser.add_argument("--keep", type=Path, default=Path("var/chaos"), help="for history and logs (var/chaos)")
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
        ttl=arguments.ttl,
        settings=dict(pair.split("=", 1) for pair in arguments.set),
        keep=arguments.keep.absolute(),
    )
    print(f"seed {seed} …", flush=True)
    outcome = asyncio.run(play(plan))
    print(outcome.report())
    return bool(outcome.violations)


if __name__ == "__main__":
    sys.exit(main())
