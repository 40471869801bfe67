"""What the chunks of an OpenAI-compatible chat completion say. Pure: payload in, Delta out.

Lenient where servers differ, because nothing is gained by refusing an answer that can be read:
`content` may be null, missing or a list of parts; reasoning comes as `reasoning_content` or
`reasoning`; usage comes alone or with the last choice. What is not JSON is refused.
"""

from __future__ import annotations

import json
from typing import Any, Final

import orjson

from headwater.providers.base import Delta

#: How deep text may be wrapped in lists and objects.
_DEPTH: Final = 4
#: No answer has more tokens; a number beyond cannot be written as JSON again.
_MOST_TOKENS: Final = 2**53 - 1


class Malformed(ValueError):
    """The payload is not a JSON object. The message says what it is, without quoting it."""


class ApiError(Exception):
    """The API sent an `error` instead of a chunk. `body` is what it sent."""

    def __init__(self, body: Any) -> None:
        super().__init__("the stream carries an error")
        self.body = body


class ChunkReader:
    """Reads one answer's payloads in order; keeps what must be carried from one to the next."""

    def __init__(self) -> None:
        # Servers written in JavaScript cut text by UTF-16 unit; half of a pair waits for the other.
        self._content_half = ""
        self._reasoning_half = ""

    def read(self, payload: bytes) -> Delta | None:
        """The chunk's delta; None when it says nothing. Raises Malformed, ApiError."""
        surrogates = False
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError:
            # orjson refuses a lone surrogate, which JSON's grammar allows.
            chunk, surrogates = _loads_lenient(payload), True
        if not isinstance(chunk, dict):
            raise Malformed(f"a chunk is a JSON {type(chunk).__name__}, not an object")
        if chunk.get("error"):
            raise ApiError(chunk["error"])
        delta = _delta_of(chunk, "delta")
        if delta is not None and (surrogates or self._content_half or self._reasoning_half):
            delta = self._mend(delta)
        return delta

    def _mend(self, delta: Delta) -> Delta | None:
        content, reasoning = delta.content, delta.reasoning
        if content:
            content, self._content_half = _join(self._content_half + content)
        if reasoning:
            reasoning, self._reasoning_half = _join(self._reasoning_half + reasoning)
        if not (content or reasoning or delta.usage or delta.finish_reason):
            return None
        return Delta(content, reasoning, delta.usage, delta.finish_reason)


def read_whole(body: bytes) -> Delta | None:
    """The answer of a server that does not stream. Raises Malformed, ApiError."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = _loads_lenient(body)
    if not isinstance(answer, dict):
        raise Malformed(f"the answer is a JSON {type(answer).__name__}, not an object")
    if answer.get("error"):
        raise ApiError(answer["error"])
    if not isinstance(answer.get("choices"), list):
        raise Malformed("the answer has no choices")
    delta = _delta_of(answer, "message")
    if delta is None:
        return None
    return Delta(_join(delta.content)[0], _join(delta.reasoning)[0], delta.usage, delta.finish_reason)


def _delta_of(chunk: dict[str, Any], member: str) -> Delta | None:
    content = reasoning = ""
    finish_reason = None
    choices = chunk.get("choices")
    # One answer is asked for; a chunk of another choice is none of ours.
    if isinstance(choices, list) and choices and isinstance(choices[0], dict) and not choices[0].get("index"):
        choice = choices[0]
        said = choice.get(member)
        if isinstance(said, dict):
            # Null, "" and a missing member mean the same. A refusal is what the person should read.
            content = _text(said.get("content")) or _text(said.get("refusal"))
            # Some servers send both names with the same text.
            reasoning = _text(said.get("reasoning_content")) or _text(said.get("reasoning"))
        reason = choice.get("finish_reason")
        finish_reason = reason if isinstance(reason, str) and reason else None
    figures = chunk.get("usage")
    usage = _usage(figures) if isinstance(figures, dict) else None
    if not (content or reasoning or finish_reason or usage):
        return None
    return Delta(content, reasoning, usage, finish_reason)


def _text(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value
    if depth < _DEPTH:
        if isinstance(value, list):
            return "".join(_text(part, depth + 1) for part in value)
        if isinstance(value, dict):
            return _text(value.get("text") or value.get("content"), depth + 1)
    return ""


def _usage(figures: dict[str, Any]) -> tuple[int, int] | None:
    prompt, completion = figures.get("prompt_tokens"), figures.get("completion_tokens")
    if not isinstance(prompt, int) and not isinstance(completion, int):
        return None
    return _count(prompt), _count(completion)


def _count(value: Any) -> int:
    return min(max(value, 0), _MOST_TOKENS) if isinstance(value, int) else 0


def _loads_lenient(payload: bytes) -> Any:
    try:
        return json.loads(payload.decode("utf-8"))
    except UnicodeDecodeError:
        raise Malformed("a chunk is not UTF-8") from None
    except (ValueError, RecursionError):
        raise Malformed("a chunk is not JSON") from None


def _join(text: str) -> tuple[str, str]:
    """Join surrogate pairs; a half at the end is given back apart, any other lone half becomes U+FFFD."""
    half = ""
    if "\ud800" <= text[-1:] <= "\udbff":
        text, half = text[:-1], text[-1]
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), half
