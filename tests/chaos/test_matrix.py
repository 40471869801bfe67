"""The page of faults names tests that exist and every fault of the harness."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from chaos.faults import FAULTS

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "reference" / "faults.md").read_text()
MATRIX, HARNESS = PAGE.split("## What the harness breaks")
ROWS: Final = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in MATRIX.splitlines() if line.startswith("| ")
]
TEST: Final = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_every_row_is_whole() -> None:
    header, *rows = ROWS
    assert header == ["component", "fault", "what people see", "what is kept", "shown by"]
    assert len(rows) > 30
    for row in rows:
        assert len(row) == len(header), row
        assert all(row), row
        assert row[-1] == "not tested yet" or TEST.fullmatch(row[-1]), row


@pytest.mark.parametrize(("file", "name"), sorted(set(TEST.findall(PAGE))))
def test_a_test_that_the_page_names_exists(file: str, name: str) -> None:
    source = (ROOT / file).read_text()
    assert re.search(rf"^\s*(?:async )?def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


def test_the_page_names_every_fault_of_the_harness_and_no_other() -> None:
    table = [line.split("|")[1] for line in HARNESS.splitlines() if line.startswith("| `")]
    named = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(FAULTS)
