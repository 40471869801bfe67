"""What the scripted OpenAI-compatible server answers: scenarios, as data.

A scenario is a JSON object:

    status      200
    headers     {"content-type": "text/event-stream"} and others
    steps       a list of:
                {"send": text} {"send_b64": base64}     one HTTP chunk
                {"drip": text, "size": 1, "delay": 0}   the text in pieces of `size` bytes
                {"chunk": {...}} {"done": true}         one `data:` frame
                {"words": 40, "rate": 50}               the default answer
                {"sleep": seconds}
                {"wait": name}                          until POST /_release/<name>
                {"hang": true}                          until the client leaves
                {"cut": true}                           reset the connection
    before      steps before the head is sent; of the pausing and the cutting kind only
    cut_after   reset the connection after so many bytes of the body
    framed      true: chunked; false: the body ends with the connection, so a cut looks like an end
    times       answer so many requests with the same question this way, later ones by the default
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Step = Mapping[str, Any]

#: Words of the default answer; some are hard to cut in the middle.
WORDS = """
river stream source water word answer model token question number order light stone bridge morning paper letter
window garden music silver quiet simple early open small clear deep slow bright naïve façade — über 日本語 🌊 1,024
don't (sic) `code` **bold** end.
""".split()  # noqa: SIM905 - a list of quoted words cannot be read


@dataclass
class Scenario:
    """How one kind of request is answered; the module's docstring has the members."""

    steps: Iterable[Step] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    before: Iterable[Step] = ()
    cut_after: int | None = None
    framed: bool = True
    times: int | None = None


def frame(data: Any) -> bytes:
    """One `data:` frame; text goes in as it is, anything else as JSON."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def chunk(
    content: str | None = None,
    *,
    reasoning: str | None = None,
    finish: str | None = None,
    usage: tuple[int, int] | None = None,
    choices: bool = True,
    **delta: Any,
) -> dict[str, Any]:
    """A `chat.completion.chunk`."""
    if content is not None:
        delta["content"] = content
    if reasoning is not None:
        delta["reasoning_content"] = reasoning
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_767_225_600,
        "model": "scripted",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}] if choices else [],
    }
    if usage is not None:
        prompt, completion = usage
        body["usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
    return body


def answer(question: str, words: int) -> str:
    """The default answer's text: `words` words, the same for the same question."""
    chance = random.Random(question)
    return " ".join(chance.choice(WORDS) for _ in range(words))


def pieces(text: str) -> list[str]:
    """The text's words, each with the white space before it."""
    return re.findall(r"\s*\S+", text)


def refusal(status: int, message: str, **more: Any) -> Scenario:
    """An error as OpenAI words it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}
    return Scenario(
        [{"send": json.dumps({"error": error})}], status=status, headers={"content-type": "application/json"}
    )


def _said(*texts: str) -> list[Step]:
    return [{"chunk": chunk(text)} for text in texts]


_END: list[Step] = [{"chunk": chunk(finish="stop")}, {"chunk": chunk(choices=False, usage=(7, 3))}, {"done": True}]
_HELLO: list[Step] = _said("Hello", ", ", "world")
_EVENT_TEXT = "".join(frame(s["chunk"]).decode() if "chunk" in s else "data: [DONE]\n\n" for s in [*_HELLO, *_END])
_PING: list[Step] = [{"send": ": ping\n\n"}, {"sleep": 0.02}]
_WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Hello, world", "reasoning_content": "Hm."},
        }
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}


def builtin_scenarios() -> dict[str, Scenario]:
    """The scenarios every server has. `Hello, world` is the whole answer of those that answer."""
    busy = refusal(429, "Rate limit reached for requests", code="rate_limit_exceeded")
    down = Scenario([{"send": "upstream away"}], status=503, headers={"content-type": "text/plain"})
    return {
        "hello": Scenario([*_HELLO, *_END]),
        "reasoning": Scenario([{"chunk": chunk(reasoning=text)} for text in ("Let me ", "think.")] + _HELLO + _END),
        "no_usage": Scenario([*_HELLO, {"chunk": chunk(finish="stop")}, {"done": True}]),
        "usage_last": Scenario([*_HELLO, {"chunk": chunk(finish="stop", usage=(7, 3))}, {"done": True}]),
        "crlf": Scenario([{"drip": _EVENT_TEXT.replace("\n", "\r\n"), "size": 7}]),
        "cr": Scenario([{"drip": _EVENT_TEXT.replace("\n", "\r"), "size": 7}]),
        "bytewise": Scenario([{"drip": _EVENT_TEXT, "size": 1}]),
        "comments": Scenario([{"send": ": ping\n\n"}, *_HELLO[:1], {"send": ":\n"}, *_HELLO[1:], *_END]),
        "no_done": Scenario([*_HELLO, *_END[:-1]]),
        "no_finish": Scenario([*_HELLO, {"done": True}]),
        "length": Scenario([*_HELLO, {"chunk": chunk(finish="length")}, {"done": True}]),
        "whole": Scenario([{"send": json.dumps(_WHOLE)}], headers={"content-type": "application/json"}),
        # What goes wrong.
        "cut": Scenario([*_HELLO, {"cut": True}]),
        "cut_in_frame": Scenario([*_HELLO, {"send": 'data: {"choices":[{"del'}, {"cut": True}]),
        "ended_early": Scenario(_HELLO, framed=False),
        "nothing": Scenario([]),
        "malformed": Scenario([*_HELLO, {"send": 'data: {"choices": [oops\n\n'}, *_END]),
        "bad_utf8": Scenario([*_HELLO, {"send_b64": base64.b64encode(b'data: {"a":"\xff\xfe"}\n\n').decode()}, *_END]),
        "html": Scenario([{"send": "<html>Sign in</html>"}], headers={"content-type": "text/html"}),
        "error_object": Scenario([*_HELLO, {"chunk": {"error": {"message": "The server had an error", "code": None}}}]),
        "error_first": Scenario([{"chunk": {"error": {"message": "Provider returned error", "code": 502}}}]),
        "auth": refusal(401, "Incorrect API key provided: sk-abcdef123456.", code="invalid_api_key"),
        "forbidden": refusal(403, "Not allowed"),
        "model": refusal(404, "The model `x` does not exist", code="model_not_found"),
        "rejected": refusal(400, "Bad value. Key sk-abcdef1234567890 was used. " + "x" * 1000, param="messages"),
        "quota": refusal(429, "You exceeded your current quota", code="insufficient_quota"),
        "busy": busy,
        "busy_once": Scenario(busy.steps, 429, {**busy.headers, "retry-after": "0"}, times=1),
        "busy_twice": Scenario(busy.steps, 429, {**busy.headers, "retry-after": "0"}, times=2),
        "busy_long": Scenario(busy.steps, 429, {**busy.headers, "retry-after": "3600"}),
        "down": down,
        "down_once": Scenario(down.steps, 503, down.headers, times=1),
        "reset": Scenario(before=[{"cut": True}]),
        "reset_once": Scenario(before=[{"cut": True}], times=1),
        "redirect": Scenario(status=302, headers={"location": "http://127.0.0.1:1/v1/chat/completions"}),
        # What takes time.
        "mute": Scenario(before=[{"hang": True}]),
        "hang": Scenario([*_HELLO, {"hang": True}]),
        "hang_after_finish": Scenario([*_HELLO, *_END[:1], {"hang": True}]),
        "stall": Scenario([*_HELLO, {"wait": "stall"}, *_END]),
        "only_comments": Scenario([*_HELLO[:1], *(_PING * 500)]),
        "slow": Scenario([{"words": 200, "rate": 20}]),
    }
