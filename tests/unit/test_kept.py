"""What a worker keeps of a run until it ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headwater.events import Event, EventType, content
from headwater.runner.kept import BLOCK, Kept

TEXTS = st.lists(st.one_of(st.text(max_size=40), st.sampled_from(["\n", "\r\n\u2028", "x" * BLOCK])), max_size=60)


def stamped(texts: list[str]) -> list[Event]:
    return [content(text).stamped(seq, 1767225600000 + seq) for seq, text in enumerate(texts, 1)]


@given(TEXTS, TEXTS)
def test_events_come_back_in_order_and_byte_for_byte(earlier: list[str], later: list[str]) -> None:
    events = stamped([*earlier, *later])
    kept = Kept(events[: len(earlier)])

    assert [event.encode() for event in kept] == [event.encode() for event in events[: len(earlier)]]
    kept.extend(events[len(earlier) :])

    assert len(kept) == len(events)
    assert [event.encode() for event in kept] == [event.encode() for event in events]


def test_an_answer_of_a_thousand_tokens_takes_some_kilobytes() -> None:
    words = [" the", " of", " and", " to", " river", " water", " is", " from", " in", " head", "s", ",", ".", " it"]
    kept = Kept(stamped([words[number * number % len(words)] for number in range(1000)]))

    # As it grows a run holds at most one block that is not packed.
    assert sum(map(len, kept._blocks)) + BLOCK <= 24 * 1024
    assert kept._blocks


def test_an_event_of_another_type_keeps_its_fields() -> None:
    events = [Event(EventType.TOOL_RESULT, {"id": "1", "output": {"rows": ["a\nb"]}}).stamped(1, 5)]

    assert list(Kept(events)) == events
