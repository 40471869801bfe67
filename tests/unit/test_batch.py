"""A batch made of what was published says what one made of the same events says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.events import Event, EventType
from headwater.streams.batch import Batch

EVENTS = st.lists(
    st.builds(
        lambda kind, text, at: (kind, text, at),
        st.sampled_from(EventType),
        st.text(),
        st.integers(min_value=0, max_value=10**14),
    ),
    min_size=1,
    max_size=4,
)


@given(EVENTS, st.integers(min_value=1, max_value=10**9))
def test_it_says_the_same_however_it_was_made(parts: list[tuple[EventType, str, int]], first: int) -> None:
    events = [Event(kind, {"text": text}).stamped(first + i, at) for i, (kind, text, at) in enumerate(parts)]
    made = Batch("epoch", events)
    heard = Batch.published(b"epoch %d\n" % first + b"\n".join(event.encode() for event in events))
    for name in ("epoch", "first", "last", "terminal", "size", "timed", "reset"):
        assert getattr(heard, name) == getattr(made, name), name
    assert list(heard.lines) == list(made.lines)
    assert list(heard.events) == list(made.events) == events


def test_without_events_it_is_empty() -> None:
    heard = Batch.published(b"epoch 7\n")
    assert (heard.epoch, list(heard.lines), list(heard.events), heard.terminal) == ("epoch", [], [], False)


def test_an_event_in_another_order_is_read_all_the_same() -> None:
    heard = Batch.published(b'epoch 7\n{"type":"done","text":"x","at":5,"seq":7}')
    assert (heard.first, heard.last, heard.terminal, heard.events[0].at) == (7, 7, True, 5)
    assert heard.events[0].data == {"text": "x"}


@pytest.mark.parametrize("raw", [b"nonsense", b"{}", b'{"seq":1,"type":"done","at":5}\nnonsense', b"\n"])
def test_what_is_no_event_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not an event"):
        Batch.published(b"epoch 1\n" + raw)


def test_a_batch_is_timed_once_and_only_when_it_is_to_be() -> None:
    heard = Batch.published(b'epoch 1\n{"seq":1,"type":"content","at":5,"text":"x"}')
    assert heard.take_born() == 0
    heard.timed = True
    assert (heard.take_born(), heard.take_born()) == (5, 0)
