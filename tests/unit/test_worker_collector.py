from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from headwater.worker import collector


@pytest.fixture
def untouched() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("untouched")
def test_what_a_worker_begins_with_is_left_out_of_collections_and_garbage_is_still_found() -> None:
    collector.relieve()

    assert gc.get_freeze_count() > 1_000
    assert gc.get_threshold() == collector.THRESHOLDS
    circle: list[object] = []
    circle.append(circle)
    del circle
    assert gc.collect() >= 1
