"""What the embedded servers change on this machine."""

from __future__ import annotations

from pathlib import Path

from headwater.dev.services import _let_through


def test_only_folders_that_had_to_be_opened_are_named_and_the_second_time_none(tmp_path: Path) -> None:
    closed, open_already = tmp_path / "closed", tmp_path / "open"
    closed.mkdir(mode=0o700)
    open_already.mkdir()
    open_already.chmod(0o755)
    assert _let_through((closed, open_already)) == (closed,)
    assert closed.stat().st_mode & 0o777 == 0o701
    assert _let_through((closed, open_already)) == ()
