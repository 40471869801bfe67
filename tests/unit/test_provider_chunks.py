"""What chunks say, from servers that differ."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from headwater.providers.base import Delta
from headwater.providers.chunks import ApiError, ChunkReader, Malformed, read_whole


def said(delta: Any, **more: Any) -> Delta | None:
    chunk = {"choices": [{"index": 0, "delta": delta, **more}]}
    return ChunkReader().read(orjson.dumps(chunk))


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ({"content": "a"}, Delta(content="a")),
        ({"content": None, "reasoning_content": "r"}, Delta(reasoning="r")),
        ({"content": "", "reasoning": "r"}, Delta(reasoning="r")),
        ({"reasoning_content": "r", "reasoning": "r"}, Delta(reasoning="r")),
        ({"content": "a", "reasoning": "r"}, Delta(content="a", reasoning="r")),
        ({"reasoning": {"text": "r"}}, Delta(reasoning="r")),
        ({"reasoning": {"content": [{"type": "text", "text": "r"}]}}, Delta(reasoning="r")),
        ({"reasoning": 7}, None),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, Delta(content="ab")),
        ({"refusal": "I will not."}, Delta(content="I will not.")),
        ({"role": "assistant"}, None),
        ({"tool_calls": [{"index": 0}]}, None),
        ({}, None),
        (None, None),
        ("text", None),
    ],
)
def test_a_delta_is_read_whatever_the_server_calls_its_parts(delta: Any, expected: Delta | None) -> None:
    assert said(delta) == expected


def test_finish_reason_and_usage_are_read_together_with_the_last_text() -> None:
    chunk = {
        "choices": [{"index": 0, "delta": {"content": "end"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    }

    assert ChunkReader().read(orjson.dumps(chunk)) == Delta("end", "", (5, 2), "length")


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": []},
        {"choices": None},
        {"choices": [None]},
        {"choices": [], "prompt_filter_results": [{}]},
        {"choices": [{"index": 1, "delta": {"content": "another choice"}}]},
        {"choices": [], "usage": None},
        {"choices": [], "usage": {}},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": ""}]},
        {"error": None, "choices": []},
        {},
    ],
)
def test_a_chunk_that_says_nothing_gives_nothing(chunk: Any) -> None:
    assert ChunkReader().read(orjson.dumps(chunk)) is None


def test_deep_nesting_ends_quietly() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]

    assert said({"content": deep}) is None


@pytest.mark.parametrize("payload", [b"oops", b"[1]", b'"text"', b"null", b'{"a":', b'{"a":"\xff"}', b"<html>"])
def test_what_is_no_json_object_is_malformed_and_not_quoted(payload: bytes) -> None:
    with pytest.raises(Malformed) as caught:
        ChunkReader().read(payload)

    assert "html" not in str(caught.value)


def test_an_error_object_is_raised() -> None:
    with pytest.raises(ApiError) as caught:
        ChunkReader().read(b'{"error":{"message":"no"}}')

    assert caught.value.body == {"message": "no"}


def chunk_of(escaped: str) -> bytes:
    return b'{"choices":[{"index":0,"delta":{"content":"%s"}}]}' % escaped.encode()


def read_all(*payloads: bytes) -> str:
    reader = ChunkReader()
    return "".join(delta.content for payload in payloads if (delta := reader.read(payload)) is not None)


def test_a_character_cut_between_two_chunks_by_utf16_unit_is_joined() -> None:
    assert read_all(chunk_of("a\\ud83c"), chunk_of("\\udf0a b")) == "a🌊 b"
    assert read_all(chunk_of("\\ud83c"), b'{"choices":[]}', chunk_of("\\udf0a")) == "🌊"


def test_half_a_character_that_stays_alone_becomes_the_replacement_character() -> None:
    assert read_all(chunk_of("a\\ud83c"), chunk_of("b")) == "a\ufffdb"
    assert read_all(chunk_of("\\udf0ab")) == "\ufffdb"


def test_a_whole_answer_is_read() -> None:
    body = {
        "choices": [{"message": {"content": "Hi", "reasoning": "Hm"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }

    assert read_whole(orjson.dumps(body)) == Delta("Hi", "Hm", (1, 1), "stop")


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"choices":null}', b"<html>"])
def test_a_whole_answer_that_is_none_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        read_whole(body)


def test_absurd_token_counts_stay_numbers_that_json_can_hold() -> None:
    delta = ChunkReader().read(b'{"choices":[],"usage":{"prompt_tokens":9223372036854775807,"completion_tokens":-5}}')

    assert delta is not None
    assert delta.usage == (2**53 - 1, 0)
