"""Short runs of the harness with fixed seeds; `scripts/chaos` makes long ones."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from chaos.faults import FAULTS
from chaos.history import History
from chaos.nemesis import LEAST, Blow
from chaos.report import Plan
from chaos.run import excuse, main, play

#: Where history and logs of a broken promise are kept.
KEEP: Final = Path(__file__).parents[2] / "var" / "chaos"


# On a machine with much else to do it is the processes' starts that take long.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "hosts"), [(1, 1), (2, 2)])
async def test_promises_hold_while_things_break(seed: int, hosts: int) -> None:
    plan = Plan(seed, seconds=15, clients=4, at_once=3, gap=(0.2, 1.0), hosts=hosts, ttl=5, keep=KEEP)
    outcome = await play(plan)
    assert not outcome.violations, outcome.report()
    # It would prove nothing if nothing had happened.
    assert len(outcome.blows) >= LEAST, outcome.report()
    assert outcome.figures["states"].get("done", 0) >= 3, outcome.report()
    assert outcome.figures["connections"] > outcome.figures["readers"], outcome.report()


def test_a_kept_history_is_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "history.json"
    kept.write_text(
        '{"promises": [], "unanswered": [], "readers": [], "messages": [], "hosts": 1, "away": [], '
        '"complaints": ["500 from GET /"], '
        '"runs": [{"id": "r", "state": "done", "attempt": 1, "idempotency_key": null, "code": null}]}'
    )
    assert main(["--check", str(kept)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "one answer: run r was never asked for",
        "degrades by name: 500 from GET /",
    ]


def test_only_a_full_disk_excuses_a_refusal_for_want_of_room_and_only_some_faults_a_standstill() -> None:
    history = History()
    blows = [
        Blow(FAULTS["journal_full"], began=1.0, mended=2.0),
        Blow(FAULTS["redis_frozen"], began=3.0, mended=4.0),
        # Another worker takes over, and neither PostgreSQL nor a server is needed to go on.
        Blow(FAULTS["worker_killed"], began=5.0, mended=6.0),
        Blow(FAULTS["postgres_killed"], began=5.0, mended=6.0),
        Blow(FAULTS["server_killed"], began=5.0, mended=6.0),
    ]
    excuse(history, [(11_500, 11_600, "507 from here"), (14_500, 14_600, "507 from there")], blows, wall=10.0)
    assert history.complaints == ["507 from there, although there was room"]
    assert history.away == [(13_000, 14_000)]


def test_an_unknown_fault_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--faults", "meteor"]) == 2
    assert "no faults meteor" in capsys.readouterr().err
