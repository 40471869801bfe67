"""The sentences and codes of what goes wrong with a model's API."""

from __future__ import annotations

import orjson
import pytest

from headwater.providers.faults import MESSAGE_LENGTH, Complaint, Where, mid_stream, refused, retry_after

WHERE = Where("api.example.com", "some-model", "sk-secret-secret-1234")


def complaint(message: str = "", **more: object) -> Complaint:
    return Complaint.read(orjson.dumps({"error": {"message": message, **more}}))


@pytest.mark.parametrize(
    ("status", "said", "code", "retryable"),
    [
        (400, complaint("bad"), "provider_rejected", False),
        (400, complaint("no such model", code="model_not_found"), "provider_model", False),
        (401, complaint(), "provider_auth", False),
        (402, complaint("Insufficient Balance"), "provider_rejected", False),
        (403, complaint(), "provider_auth", False),
        (403, complaint(code="model_not_found"), "provider_model", False),
        (404, complaint(), "provider_model", False),
        (408, complaint(), "provider_unavailable", True),
        (422, Complaint.read(b"not json"), "provider_rejected", False),
        (429, complaint(), "provider_rate_limited", True),
        (429, complaint(code="insufficient_quota"), "provider_rejected", False),
        (429, complaint(type="insufficient_quota"), "provider_rejected", False),
        (500, Complaint.read(b"<html>"), "provider_unavailable", True),
        (503, complaint(), "provider_unavailable", True),
        (302, complaint(), "provider_rejected", False),
    ],
)
def test_each_status_has_its_code(status: int, said: Complaint, code: str, retryable: bool) -> None:
    error = refused(status, {}, said, WHERE)

    assert (error.code, error.retryable) == (code, retryable)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"message": "x", "code": 502}, "provider_unavailable"),
        ({"message": "x", "code": 429}, "provider_rate_limited"),
        ({"message": "x", "code": "insufficient_quota"}, "provider_rejected"),
        ({"message": "x", "code": "rate_limit_exceeded"}, "provider_rate_limited"),
        ({"message": "x", "type": "invalid_request_error"}, "provider_rejected"),
        ({"message": "x", "type": "server_error"}, "provider_unavailable"),
        ("only words", "provider_unavailable"),
        (["a list"], "provider_unavailable"),
        (True, "provider_unavailable"),
    ],
)
def test_an_error_in_the_stream_has_a_code(error: object, code: str) -> None:
    assert mid_stream(Complaint.of(error), WHERE).code == code


def test_without_a_key_the_sentence_says_to_set_one() -> None:
    with_key = refused(401, {}, complaint(), WHERE)
    without = refused(401, {}, complaint(), Where("localhost", "m", None))

    assert str(with_key) == "The model's API refused the key. Check OPENAI_API_KEY."
    assert str(without) == "The model's API wants a key. Set OPENAI_API_KEY."


@pytest.mark.parametrize(
    "leak",
    [
        "sk-secret-secret-1234",
        "sk-proj-AbCd_1234",
        "Bearer abcdefgh",
        "gsk_abcdefgh1",
        "AIzaSyA1234567890",
        "sk-abc***xyz",
    ],
)
def test_keys_are_removed_from_the_apis_own_message(leak: str) -> None:
    text = str(refused(400, {}, complaint(f"You sent {leak} as a key."), WHERE))

    assert leak not in text
    assert "You sent [key]" in text


def test_the_key_in_use_is_removed_whatever_it_looks_like() -> None:
    where = Where("api.example.com", "some-model", "0123-local-key")

    assert "0123" not in str(refused(400, {}, complaint("You sent 0123-local-key as a key."), where))


def test_a_long_message_is_cut_and_put_on_one_line() -> None:
    text = str(refused(400, {}, complaint("a\n b " * 500), WHERE))

    assert "a b a b" in text
    assert text.endswith("…")
    assert len(text) < MESSAGE_LENGTH + 80


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"Retry-After": "5", "retry-after-ms": "1500"}, 1.5),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:05 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 5.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:27:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:05 GMT"}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        (
            b'{"error":{"message":"Not supported. Use \'max_completion_tokens\' instead.","param":"max_tokens"}}',
            "max_tokens",
        ),
        (
            b'{"error":{"message":"\'temperature\' does not support 0.7 with this model.","param":"temperature"}}',
            "temperature",
        ),
        (b'{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"]}]}', "stream_options"),
        (b"Unrecognized request argument supplied: stream_options", "stream_options"),
        (b'{"error":"unknown field max_completion_tokens"}', "max_completion_tokens"),
    ],
)
def test_an_unsupported_parameter_is_recognised(body: bytes, parameter: str) -> None:
    said = Complaint.read(body)

    others = {"stream_options", "max_completion_tokens", "max_tokens", "temperature"} - {parameter}
    assert said.refuses(parameter)
    # OpenAI names the other name as the remedy, which is no complaint about it.
    assert not any(said.refuses(other) for other in others)


def test_a_value_that_is_too_large_is_no_unsupported_parameter() -> None:
    said = complaint("max_tokens is too large: 100000. This model supports at most 4096 tokens.", param="max_tokens")

    assert not said.refuses("max_tokens")
