"""A disk of a test's own that is small enough to be filled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headwater.settings import child_environment


class SmallDisk:
    """A mounted folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def fill(self) -> None:
        """Leave not a byte, unless somebody gives one back meanwhile."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (65_536, 4096, 512, 1):
                try:
                    while file.write(b"\0" * size) == size:
                        pass
                except OSError:
                    continue

    def give_back(self) -> None:
        """Take the filler away."""
        self._filler.unlink(missing_ok=True)


class CannotMount(Exception):
    """Nobody may mount a disk here."""


@contextmanager
def mounted(folder: Path, megabytes: int, owner: int | None = None) -> Iterator[SmallDisk]:
    """Mount one at `folder`. Raises CannotMount."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    uid = os.geteuid() if owner is None else owner
    options = f"size={megabytes}m,mode=0700,uid={uid}"
    mount = [*prefix, "mount", "-t", "tmpfs", "-o", options, "headwater-test", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotMount(str(error)) from error
    if made.returncode:
        raise CannotMount(made.stderr.strip())
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run([*prefix, "umount", "-l", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, megabytes: int, owner: int | None = None) -> Iterator[SmallDisk]:
    """Mount one at `folder`. Where nobody may mount the test is skipped, but not in CI, where it must run."""
    try:
        with mounted(folder, megabytes, owner) as disk:
            yield disk
    except CannotMount as error:
        if child_environment().get("CI"):
            pytest.fail(f"a small disk cannot be mounted: {error}")
        pytest.skip(f"needs to mount a small disk: {error}")
