"""What every Feed does, over all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from headwater.events import Event
from headwater.streams.base import Feed
from headwater.streams.batch import Batch
from support.streams import MemoryWorld, RedisWorld, World, end, new_run, numbered, seqs
from support.wait import eventually


class Ear:
    """Remembers what its followers hear."""

    def __init__(self) -> None:
        self.confirmed: list[str] = []
        self.heard: list[tuple[str, str, list[Event]]] = []
        self.breaks = 0

    def lost(self) -> None:
        self.breaks += 1

    def of(self, run_id: str) -> Listener:
        return Listener(self, run_id)

    def seqs(self, run_id: str) -> list[int]:
        return [event.seq for heard, _, events in self.heard if heard == run_id for event in events]


class Listener:
    """Follows one run."""

    def __init__(self, ear: Ear, run_id: str) -> None:
        self._ear = ear
        self._run_id = run_id

    def subscribed(self) -> None:
        self._ear.confirmed.append(self._run_id)

    def published(self, batch: Batch) -> None:
        self._ear.heard.append((self._run_id, batch.epoch, list(batch.events)))


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    world: World = MemoryWorld() if request.param == "memory" else RedisWorld(request.getfixturevalue("redis_url"))
    yield world
    await world.close()


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture
async def feed(world: World, ear: Ear) -> AsyncIterator[Feed]:
    feed = world.log.feed()
    await feed.start(ear.lost)
    yield feed
    await feed.stop()


async def test_a_followed_run_is_confirmed_and_then_heard_in_order(world: World, feed: Feed, ear: Ear) -> None:
    run = new_run()
    feed.follow(run.id, ear.of(run.id))
    await eventually(lambda: ear.confirmed == [run.id])
    lease = await world.log.claim(run, "worker")
    await world.log.append(lease, numbered(1, 2))
    await world.log.append(lease, numbered(3, 3))
    await world.log.append(lease, [end(4)])
    await eventually(lambda: ear.seqs(run.id) == [1, 2, 3, 4])
    assert ear.heard[0] == (run.id, lease.epoch, numbered(1, 2))
    assert [events[-1].terminal for _, _, events in ear.heard] == [False, False, True]


async def test_only_followed_runs_are_heard(world: World, feed: Feed, ear: Ear) -> None:
    mine, other = new_run(), new_run()
    feed.follow(mine.id, ear.of(mine.id))
    await eventually(lambda: ear.confirmed == [mine.id])
    await world.written(other, 2)
    await world.written(mine, 1)
    await eventually(lambda: ear.seqs(mine.id) == [1])
    assert ear.seqs(other.id) == []


async def test_an_append_that_is_repeated_is_not_heard_again_and_what_is_missing_of_it_is(
    world: World, feed: Feed, ear: Ear
) -> None:
    run = new_run()
    feed.follow(run.id, ear.of(run.id))
    await eventually(lambda: ear.confirmed == [run.id])
    lease = await world.written(run, 2)
    await world.log.append(lease, numbered(1, 2))
    await world.log.append(lease, numbered(2, 4))
    await eventually(lambda: ear.seqs(run.id) == [1, 2, 3, 4])


async def test_a_log_that_was_written_again_is_said_without_events(world: World, feed: Feed, ear: Ear) -> None:
    run = new_run()
    lease = await world.written(run, 2)
    await world.log.forget(run.id)
    feed.follow(run.id, ear.of(run.id))
    await eventually(lambda: ear.confirmed == [run.id])
    await world.log.restore(lease, run, numbered(1, 2))
    await eventually(lambda: ear.heard == [(run.id, lease.epoch, [])])


async def test_what_is_no_longer_followed_is_no_longer_heard(world: World, feed: Feed, ear: Ear) -> None:
    left, kept = new_run(), new_run()
    feed.follow(left.id, ear.of(left.id))
    feed.follow(kept.id, ear.of(kept.id))
    await eventually(lambda: sorted(ear.confirmed) == sorted([left.id, kept.id]))
    feed.unfollow(left.id)
    await world.written(left, 1)
    await world.written(kept, 1)
    await eventually(lambda: ear.seqs(kept.id) == [1])
    assert ear.seqs(left.id) == []


async def test_left_and_followed_again_in_one_breath_it_is_confirmed_and_heard(
    world: World, feed: Feed, ear: Ear
) -> None:
    run = new_run()
    feed.follow(run.id, ear.of(run.id))
    await eventually(lambda: ear.confirmed == [run.id])
    feed.unfollow(run.id)
    feed.follow(run.id, ear.of(run.id))
    await eventually(lambda: ear.confirmed == [run.id, run.id])
    await world.written(run, 1)
    await eventually(lambda: ear.seqs(run.id) == [1])


async def test_every_feed_hears_the_same(world: World, feed: Feed, ear: Ear) -> None:
    run, second = new_run(), Ear()
    other = world.another().feed()
    await other.start(second.lost)
    feed.follow(run.id, ear.of(run.id))
    other.follow(run.id, second.of(run.id))
    await eventually(lambda: ear.confirmed and second.confirmed)
    await world.written(run, 3)
    await eventually(lambda: ear.seqs(run.id) == second.seqs(run.id) == [1, 2, 3])
    await other.stop()


async def test_thousands_of_runs_are_followed_at_once(world: World, feed: Feed, ear: Ear) -> None:
    runs = [new_run() for _ in range(2_000)]
    for run in runs:
        feed.follow(run.id, ear.of(run.id))
    await eventually(lambda: len(ear.confirmed) == 2_000)
    await world.written(runs[-1], 1)
    await eventually(lambda: seqs([event for _, _, events in ear.heard for event in events]) == [1])


async def test_stopped_it_is_silent_and_may_be_stopped_again(world: World, ear: Ear) -> None:
    run, feed = new_run(), world.log.feed()
    await feed.start(ear.lost)
    feed.follow(run.id, ear.of(run.id))
    await eventually(lambda: ear.confirmed)
    await feed.stop()
    await world.written(run, 1)
    await feed.stop()
    assert ear.heard == []
    assert ear.breaks == 0
