"""The native format: frames that any SSE parser reads, and nothing encoded twice."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.events import Event, EventType, content
from headwater.formats.native import HEARTBEAT, Native, NativeOf, native, said
from headwater.hub import Batch

RUN = "0198c0de-7abc-7def-8123-456789abcdef"


def parse(raw: bytes) -> list[dict[str, str]]:
    """Frames as the SSE specification reads them."""
    frames = []
    for block in raw.decode().split("\n\n")[:-1]:
        lines = [line.partition(": ") for line in block.split("\n") if not line.startswith(":")]
        frames.append({name: value for name, _, value in lines})
    return frames


def test_a_frame_carries_the_cursor_the_type_and_the_event_as_the_log_has_it() -> None:
    event = content("Hello").stamped(7, 1_767_225_600_123)
    assert native(Batch("abc", [event])) == (
        b'id: abc-7\nevent: content\ndata: {"seq":7,"type":"content","at":1767225600123,"text":"Hello"}\n\n'
    )


def test_a_frame_of_several_runs_names_its_run_first() -> None:
    event = content("Hello").stamped(1, 5)
    (frame,) = parse(native(Batch("abc", [event]), RUN))
    assert frame["data"].startswith(f'{{"run_id":"{RUN}","seq":1,')
    assert orjson.loads(frame["data"]) == {"run_id": RUN, "seq": 1, "type": "content", "at": 5, "text": "Hello"}


@pytest.mark.parametrize("run_id", [None, RUN])
def test_a_reset_says_that_history_was_lost_and_moves_the_cursor_to_the_new_log(run_id: str | None) -> None:
    frames = parse(native(Batch("new", [content("a").stamped(1, 5)], reset=True), run_id))
    assert [frame["id"] for frame in frames] == ["new-0", "new-1"]
    assert frames[0]["event"] == "reset"
    data = orjson.loads(frames[0]["data"])
    assert (data["seq"], data["type"], data["reason"]) == (0, "reset", "history_lost")
    assert data.get("run_id") == run_id


def test_a_batch_without_anything_to_say_is_empty_so_that_the_transport_can_tell() -> None:
    assert native(Batch("abc")) == b""
    assert HEARTBEAT.startswith(b":")


def test_a_frame_said_about_a_run_has_no_id_and_no_seq() -> None:
    (frame,) = parse(said(RUN, EventType.ERROR, {"code": "not_found"}))
    assert "id" not in frame
    assert orjson.loads(frame["data"]) == {"run_id": RUN, "type": "error", "code": "not_found"}


def test_many_readers_of_a_batch_share_one_encoding() -> None:
    batch = Batch("abc", [content("x").stamped(1, 1)])
    form = Native()
    assert form.render(batch) is form.render(batch)
    # The other form of the same batch is kept apart.
    assert NativeOf(RUN).render(batch) != form.render(batch)
    assert NativeOf(RUN).render(batch) is NativeOf(RUN).render(batch)


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5))
def test_any_text_survives_the_frame(texts: list[str]) -> None:
    events: list[Event] = [content(text).stamped(seq, 1) for seq, text in enumerate(texts, 1)]
    for run_id in (None, RUN):
        raw = native(Batch("abc", events), run_id)
        # A carriage return would end a line for an SSE parser as well.
        assert b"\r" not in raw
        assert [orjson.loads(frame["data"])["text"] for frame in parse(raw)] == texts
