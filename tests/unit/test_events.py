from __future__ import annotations

import tracemalloc

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater import events
from headwater.errors import BadCursor
from headwater.events import Cursor, Event, EventType

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)
data = st.dictionaries(st.text().filter(lambda key: key not in {"seq", "type", "at"}), json_values, max_size=4)


@given(st.sampled_from(EventType), data, st.integers(1, 2**40), st.integers(0, 2**45))
def test_an_event_reads_back_as_it_was_written(kind: EventType, fields: dict[str, object], seq: int, at: int) -> None:
    event = Event(kind, fields).stamped(seq, at)
    assert Event.decode(event.encode()) == event


@given(st.text())
def test_an_encoded_event_has_no_newline(text: str) -> None:
    assert b"\n" not in events.content(text).stamped(1, 1).encode()


def test_the_encoded_form_begins_with_seq_type_and_time() -> None:
    event = events.content("Hello").stamped(7, 1767225600123)
    assert event.encode() == b'{"seq":7,"type":"content","at":1767225600123,"text":"Hello"}'


def test_a_stamped_event_hands_out_the_same_bytes_every_time() -> None:
    event = events.content("x").stamped(1, 1)
    assert event.encode() is event.encode()


def test_a_kept_event_takes_little_more_than_its_bytes() -> None:
    tracemalloc.start()
    try:
        kept = [events.content("word ").stamped(seq, 1) for seq in range(1, 501)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(kept) < 1_000


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"1", b"{}", b'{"type":"nope","seq":1,"at":1}', b'{"type":"done"}'])
def test_what_is_not_an_event_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        Event.decode(raw)


@pytest.mark.parametrize("kind", EventType)
def test_exactly_three_types_are_terminal(kind: EventType) -> None:
    assert Event(kind, {}).terminal == (kind in {"done", "error", "cancelled"})


def test_usage_adds_up() -> None:
    assert orjson.loads(events.usage(3, 4).encode())["total_tokens"] == 7


@given(st.from_regex(r"[0-9a-z]{1,32}", fullmatch=True), st.integers(0, 10**14))
def test_a_cursor_reads_back_as_it_was_written(epoch: str, seq: int) -> None:
    assert Cursor.parse(str(Cursor(epoch, seq))) == Cursor(epoch, seq)


@pytest.mark.parametrize(
    "text", ["", "-", "a-", "-1", "a", "a-b", "a-01", "a--1", "A-1", "a-1 ", "a-1\n", "a-1-2", "a" * 33 + "-1", "é-1"]
)
def test_a_malformed_cursor_is_refused(text: str) -> None:
    with pytest.raises(BadCursor):
        Cursor.parse(text)
