"""What is said of an id that nobody knows: there is no such thing, or ask again."""

from __future__ import annotations

import pytest

from headwater.absence import ON_ITS_WAY, REMEMBERED, Absence
from headwater.clock import FrozenClock
from headwater.errors import NotFound, NotKnownYet, StoreUnavailable
from headwater.ids import made_at
from headwater.intake.checks import id_of_key
from headwater.store import Store
from support.ids import alien_id, id_made

#: A millisecond, the grain of an id's time.
GRAIN = 0.001


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def store(clock: FrozenClock) -> Store:
    """One whose server is not there; nothing asks it unless told to."""
    return Store("postgresql://postgres@/x?host=/nowhere", pool_size=1, wait=1, clock=clock)


@pytest.mark.parametrize(
    ("age", "coming"),
    [
        (0, True),
        (ON_ITS_WAY - GRAIN, True),
        (ON_ITS_WAY, False),
        (86_400, False),
        # Another host's clock is ahead.
        (-1, True),
        (-ON_ITS_WAY + GRAIN, True),
        (-ON_ITS_WAY, False),
        (-3_600, False),
    ],
)
def test_what_is_young_may_be_on_its_way(clock: FrozenClock, store: Store, age: float, coming: bool) -> None:
    absence, unknown = Absence(store, clock), id_made(age, clock)
    assert made_at(unknown) == clock.now_ms() - round(age * 1000)
    assert absence.may_come(unknown) is coming
    assert type(absence.of(unknown, "run")) is (NotKnownYet if coming else NotFound)


def test_an_id_grows_old(clock: FrozenClock, store: Store) -> None:
    absence, unknown = Absence(store, clock), id_made(0, clock)
    clock.advance(ON_ITS_WAY - GRAIN)
    assert absence.may_come(unknown)
    clock.advance(GRAIN)
    assert not absence.may_come(unknown)


def test_an_id_that_nobody_here_makes_names_nothing(clock: FrozenClock, store: Store) -> None:
    alien = alien_id()
    assert made_at(alien) is None
    assert not Absence(store, clock).may_come(alien)
    assert not Absence(store, clock).chat_may_come(alien)


async def test_while_postgresql_is_away_nothing_can_be_brought_however_old_it_is(
    clock: FrozenClock, store: Store
) -> None:
    absence, unknown, future = Absence(store, clock), id_made(3_600, clock), id_made(-3_600, clock)
    assert not absence.may_come(unknown)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    assert absence.may_come(unknown)
    assert not absence.may_come(future)
    clock.advance(ON_ITS_WAY - GRAIN)
    assert absence.may_come(unknown)
    clock.advance(GRAIN)
    assert not absence.may_come(unknown)


def test_a_chat_made_with_a_key_may_be_on_its_way_from_when_it_is_first_asked_for(
    clock: FrozenClock, store: Store
) -> None:
    absence, unknown = Absence(store, clock), id_of_key("local", "key")
    assert absence.chat_may_come(unknown)
    clock.advance(ON_ITS_WAY - GRAIN)
    assert absence.chat_may_come(unknown)
    clock.advance(GRAIN)
    assert not absence.chat_may_come(unknown)
    assert absence.chat_may_come(id_of_key("local", "another key"))
    # No run has such an id.
    assert type(absence.of(id_of_key("local", "another key"), "run")) is NotFound


def test_few_chats_that_were_asked_for_are_remembered_and_the_oldest_is_forgotten(
    clock: FrozenClock, store: Store
) -> None:
    absence = Absence(store, clock)
    first, *others = [id_of_key("local", f"key-{number}") for number in range(REMEMBERED + 1)]
    for unknown in (first, *others):
        absence.chat_may_come(unknown)
    clock.advance(ON_ITS_WAY)
    assert not absence.chat_may_come(others[0])
    assert absence.chat_may_come(first)
