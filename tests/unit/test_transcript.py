from __future__ import annotations

from headwater import events
from headwater.events import Event, EventType
from headwater.transcript import Transcript


def test_text_and_reasoning_are_joined_in_order() -> None:
    transcript = Transcript.of(
        [events.reasoning("hm"), events.content("a"), events.reasoning("!"), events.content("b"), events.usage(1, 2)]
    )
    assert (transcript.content, transcript.reasoning) == ("ab", "hm!")
    assert transcript.usage is not None
    assert transcript.usage["total_tokens"] == 3
    assert transcript.pieces == 4


def test_a_reset_forgets_what_was_shown_but_what_follows_counts() -> None:
    reset = Event(EventType.RESET, {"reason": "worker_lost", "attempt": 2})
    transcript = Transcript.of(
        [events.content("old"), events.progress("plan", 0.5), events.usage(1, 1), reset, events.content("new")]
    )
    assert (transcript.content, transcript.progress, transcript.stage, transcript.usage) == ("new", 0.0, None, None)


def test_the_terminal_event_is_kept() -> None:
    end = events.done("length")
    transcript = Transcript.of([events.content("a"), events.progress("render", 0.75), end])
    assert transcript.end == end
    assert (transcript.stage, transcript.progress) == ("render", 0.75)
