"""The OpenAI-compatible provider against a scripted HTTP server: what it reads, what goes wrong, what is tried again.

The official SDK is the judge of what a stream says.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import APIError, AsyncOpenAI

import support.openai_server
from headwater.errors import ProviderError, SettingsError
from headwater.providers import reading
from headwater.providers.base import ChatRequest, Delta
from headwater.providers.openai import OpenAIProvider
from headwater.providers.sse import SseParser
from headwater.settings import Settings
from headwater.telemetry import Telemetry
from support.openai_scenarios import Scenario, Step, answer, chunk, frame
from support.openai_server import OpenAIServer
from support.wait import eventually

KEY = "sk-test-0123456789"


class Sleeps:
    """Stands in for sleeping between tries: remembers how long, waits not at all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest_asyncio.fixture(scope="module")
async def shared() -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer() as server:
        yield server


@pytest.fixture
def server(shared: OpenAIServer) -> OpenAIServer:
    shared.reset()
    return shared


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest_asyncio.fixture
async def provider(server: OpenAIServer, sleeps: Sleeps) -> AsyncIterator[OpenAIProvider]:
    provider = OpenAIProvider(
        server.base_url, model="scripted", key=KEY, idle=5, retries=3, sleep=sleeps, jitter=lambda: 0.5
    )
    yield provider
    await provider.close()


def ask(model: str, question: str = "Hi", **more: Any) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": question}], model, **more)


async def read(provider: OpenAIProvider, request: ChatRequest, into: list[Delta] | None = None) -> list[Delta]:
    into = [] if into is None else into
    async for delta in provider.stream(request):
        into.append(delta)
    return into


def text(deltas: list[Delta]) -> str:
    return "".join(delta.content for delta in deltas)


def figures(deltas: list[Delta]) -> tuple[str | None, tuple[int, int] | None]:
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason]
    usages = [delta.usage for delta in deltas if delta.usage]
    return (reasons[-1] if reasons else None, usages[-1] if usages else None)


# --- what it sends ------------------------------------------------------------------------------


async def test_the_request_carries_what_was_asked_and_the_key(provider: OpenAIProvider, server: OpenAIServer) -> None:
    await read(provider, ask("hello", max_tokens=7, temperature=0.5))

    (request,) = server.chats
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "hello",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 7,
        "temperature": 0.5,
    }


async def test_without_a_key_and_limits_nothing_of_them_is_sent(server: OpenAIServer) -> None:
    settings_ = Settings(_env_file=None, OPENAI_BASE_URL=server.base_url + "/", OPENAI_API_KEY=None)
    provider = OpenAIProvider.of(settings_)
    await read(provider, ask("hello"))
    await provider.close()

    (request,) = server.chats
    assert request.path == "/v1/chat/completions"
    assert "authorization" not in request.headers
    assert not {"max_tokens", "temperature"} & request.body.keys()


async def test_a_query_in_the_address_is_kept(server: OpenAIServer) -> None:
    provider = OpenAIProvider(server.base_url + "?api-version=1", model="hello")
    await read(provider, ask("hello"))
    await provider.close()

    assert server.chats[0].path == "/v1/chat/completions?api-version=1"


@pytest.mark.parametrize(
    ("base_url", "key"),
    [("localhost:8000/v1", None), ("ftp://a/v1", None), ("", None), ("http://u:p@a/v1", None), ("http://a/v1", "a\nb")],
)
async def test_an_address_or_a_key_that_cannot_be_used_is_refused_at_once_and_not_quoted(
    base_url: str, key: str | None
) -> None:
    with pytest.raises(SettingsError, match="OPENAI_") as caught:
        OpenAIProvider(base_url, model="m", key=key)

    assert "u:p" not in str(caught.value)
    assert "a\nb" not in str(caught.value)


# --- what it reads ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason", "usage"),
    [
        ("hello", "stop", (7, 3)),
        ("reasoning", "stop", (7, 3)),
        ("no_usage", "stop", None),
        ("usage_last", "stop", (7, 3)),
        ("crlf", "stop", (7, 3)),
        ("cr", "stop", (7, 3)),
        ("bytewise", "stop", (7, 3)),
        ("comments", "stop", (7, 3)),
        ("no_done", "stop", (7, 3)),
        ("no_finish", None, None),
        ("length", "length", None),
        ("whole", "stop", (7, 3)),
    ],
)
async def test_the_answer_is_read_from_every_kind_of_server(
    provider: OpenAIProvider, name: str, reason: str | None, usage: tuple[int, int] | None
) -> None:
    deltas = await read(provider, ask(name))

    assert text(deltas) == "Hello, world"
    assert figures(deltas) == (reason, usage)
    reasoning = {"reasoning": "Let me think.", "whole": "Hm."}.get(name, "")
    assert "".join(delta.reasoning for delta in deltas) == reasoning


async def test_a_token_is_given_before_the_next_one_is_made(provider: OpenAIProvider, server: OpenAIServer) -> None:
    async with aclosing(provider.stream(ask("stall"))) as stream:
        assert [(await anext(stream)).content for _ in range(3)] == ["Hello", ", ", "world"]
        server.release("stall")
        assert figures([delta async for delta in stream]) == ("stop", (7, 3))


async def test_a_server_that_hangs_after_the_finish_reason_costs_seconds_and_not_the_answer(
    provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "AFTER_FINISH", 0.05)

    deltas = await read(provider, ask("hang_after_finish"))

    assert text(deltas) == "Hello, world"
    assert figures(deltas) == ("stop", None)


async def test_rubbish_behind_the_finish_reason_does_not_spoil_the_answer(
    provider: OpenAIProvider, server: OpenAIServer
) -> None:
    server.scenarios["rubbish"] = Scenario([{"chunk": chunk("Hi", finish="stop")}, {"send": "data: oops\n\n"}])

    assert text(await read(provider, ask("rubbish"))) == "Hi"


async def test_a_stream_with_a_vague_type_is_read(provider: OpenAIProvider, server: OpenAIServer) -> None:
    server.scenarios["vague"] = Scenario(server.scenarios["hello"].steps, headers={"content-type": "text/plain"})

    assert text(await read(provider, ask("vague"))) == "Hello, world"


async def test_a_last_frame_without_its_blank_line_is_read(provider: OpenAIProvider, server: OpenAIServer) -> None:
    last = frame(chunk("!", finish="stop")).decode().rstrip("\n")
    server.scenarios["open"] = Scenario([{"chunk": chunk("Hi")}, {"send": last}])

    assert text(await read(provider, ask("open"))) == "Hi!"


async def test_a_connection_is_used_again_after_a_whole_answer_and_not_after_a_closed_one(
    provider: OpenAIProvider, server: OpenAIServer
) -> None:
    for _ in range(3):
        await read(provider, ask("hello"))
    async with aclosing(provider.stream(ask("hang"))) as stream:
        await anext(stream)
    await read(provider, ask("hello"))

    first, second, third, closed, fresh = (request.connection for request in server.chats)
    assert first == second == third == closed
    assert fresh != closed


@pytest.mark.parametrize("name", ["hang", "mute"])
async def test_the_server_sees_at_once_that_the_reader_left(
    provider: OpenAIProvider, server: OpenAIServer, name: str
) -> None:
    task = asyncio.create_task(read(provider, ask(name)))
    await eventually(lambda: server.chats)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await eventually(lambda: server.chats[0].disconnected_at)


async def test_an_abandoned_answer_is_closed_too(provider: OpenAIProvider, server: OpenAIServer) -> None:
    stream = provider.stream(ask("hang"))
    await anext(stream)
    del stream
    gc.collect()

    await eventually(lambda: server.chats[0].disconnected_at)


# --- compared with the official SDK -------------------------------------------------------------

pieces = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
chunks = st.one_of(
    st.builds(chunk, pieces),
    st.builds(lambda content: chunk(content, role="assistant"), st.none() | pieces),
    st.builds(lambda reasoning: chunk(reasoning=reasoning), pieces),
    st.builds(lambda content, reasoning: chunk(content, reasoning=reasoning), pieces, pieces),
    st.builds(lambda: chunk(choices=False)),
)
endings = st.tuples(
    st.sampled_from(["stop", "length", "content_filter", "tool_calls"]),
    st.none() | st.tuples(st.integers(0, 9999), st.integers(0, 9999)),
    st.booleans(),
    st.booleans(),
)
line_ends = st.sampled_from(["\n", "\r\n", "\r"])
noise = st.sampled_from(["", "", "", ": ping\n\n", "event: message\n", ":\n", "\n\n"])


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """A stream as a server may send it, and cut as a network may cut it."""
    bodies = draw(st.lists(chunks, max_size=6))
    reason, usage, apart, done = draw(endings)
    bodies.append(chunk(finish=reason, usage=None if apart else usage))
    if apart and usage is not None:
        bodies.append(chunk(choices=False, usage=usage))
    frames = [draw(noise) + frame(body).decode() for body in bodies]
    if draw(st.booleans()):
        # JSON may be broken over data lines wherever it allows white space.
        frames = [part.replace(',"choices"', ',\ndata: "choices"') for part in frames]
    if done:
        frames.append("data: [DONE]\n\n")
    stream = "".join(frames).replace("\n", draw(line_ends)).encode()
    cuts = sorted({0, len(stream), *draw(st.lists(st.integers(0, len(stream)), max_size=8))})
    return [stream[a:b] for a, b in pairwise(cuts)]


@pytest_asyncio.fixture(scope="module")
async def both(shared: OpenAIServer) -> AsyncIterator[tuple[OpenAIServer, OpenAIProvider, AsyncOpenAI]]:
    ours = OpenAIProvider(shared.base_url, model="scripted", idle=60, retries=0)
    theirs = AsyncOpenAI(base_url=shared.base_url, api_key=KEY, max_retries=0)
    yield shared, ours, theirs
    await ours.close()
    await theirs.close()


@settings(max_examples=60)
@given(parts=streams())
async def test_any_stream_says_the_same_to_us_and_to_the_official_sdk(
    both: tuple[OpenAIServer, OpenAIProvider, AsyncOpenAI], parts: list[bytes]
) -> None:
    server, ours, theirs = both
    server.scenarios["drawn"] = Scenario([{"send_b64": base64.b64encode(part).decode()} for part in parts])

    deltas = await read(ours, ask("drawn"))

    assert heard(deltas) == (await told(theirs, "drawn"))[0]


Heard = tuple[str, str, str | None, tuple[int, int] | None]


def heard(deltas: list[Delta]) -> Heard:
    """Text, reasoning, finish reason and usage."""
    return text(deltas), "".join(delta.reasoning for delta in deltas), *figures(deltas)


async def told(theirs: AsyncOpenAI, model: str) -> tuple[Heard, APIError | None]:
    """The same as the SDK says it, and the error with which it ended."""
    content = reasoning = ""
    reason = usage = None
    try:
        async for part in await theirs.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], stream=True
        ):
            for choice in part.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                reason = choice.finish_reason or reason
            if part.usage is not None:
                usage = (part.usage.prompt_tokens, part.usage.completion_tokens)
    except APIError as error:
        return (content, reasoning, reason, usage), error
    return (content, reasoning, reason, usage), None


def said(*pieces: str) -> bytes:
    return b"".join(frame(chunk(piece)) for piece in pieces)


END = frame(chunk(finish="stop"))
USAGE = frame(chunk(choices=False, usage=(7, 3)))
DONE = frame("[DONE]")
USUAL = said("Hel", "lo, ", "wörld 日本語 🌊") + END + USAGE + DONE
FAULT = frame({"error": {"message": "The model broke", "type": "server_error", "code": "internal"}})

AWKWARD = {
    "the usual one": USUAL,
    "CRLF": USUAL.replace(b"\n", b"\r\n"),
    "CR": USUAL.replace(b"\n", b"\r"),
    "keep-alive comments": b": OPENROUTER PROCESSING\n\n" + USUAL.replace(b"\n\n", b"\n\n: ping\n\n:\n\n"),
    "a comment inside a frame": USUAL.replace(b"data: ", b": here it comes\ndata: "),
    "event names, ids and retry times": USUAL.replace(b"data: ", b"event: message\nid: 1\nretry: 10\ndata: "),
    "no space behind the colon": USUAL.replace(b"data: ", b"data:"),
    "JSON over several data lines": USUAL.replace(b',"choices"', b',\ndata: "choices"'),
    "blank lines everywhere": b"\n\n" + USUAL.replace(b"\n\n", b"\n\n\n\n\n"),
    "no [DONE]": said("Hello") + END,
    "something behind [DONE]": USUAL + said("never said"),
    "escaped characters": b"".join(
        b"data: " + json.dumps(chunk(piece)).encode() + b"\n\n" for piece in ("naïve ", "日本", "🌊\u2028", '"\\\n\t')
    )
    + END
    + DONE,
    "empty, null and missing contents": said("", "a")
    + b"".join(frame(chunk(**delta)) for delta in ({"role": "assistant"}, {"refusal": None}))
    + frame({**chunk("b"), "usage": None, "system_fingerprint": None})
    + frame(chunk(choices=False))
    + END
    + DONE,
    "reasoning first": frame(chunk(reasoning="Hm, ")) + frame(chunk(reasoning="🌊.")) + USUAL,
    "line separators of other worlds in the text": said("a\x0bb\x0cc\x85d\u2028e\u2029f\x1c") + END + DONE,
    "a frame of a megabyte": said("x" * 1_000_000, "y") + END + DONE,
    "usage together with the end": said("Hello") + frame(chunk(finish="length", usage=(1, 2))) + DONE,
    "an error in the middle": said("Hel", "lo") + FAULT + said("never said") + DONE,
    "an error instead of an answer": FAULT,
}


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("name", AWKWARD)
async def test_awkward_streams_say_the_same_to_us_and_to_the_official_sdk(
    both: tuple[OpenAIServer, OpenAIProvider, AsyncOpenAI], name: str, size: int
) -> None:
    """Whole, byte by byte so that every frame and every wide character is cut everywhere, and in small pieces."""
    server, ours, theirs = both
    stream = AWKWARD[name]
    # A megabyte byte by byte takes a minute and cuts nothing that others do not.
    size = size * (1 if len(stream) < 10_000 else 1000) or len(stream)
    parts = [stream[at : at + size] for at in range(0, len(stream), size)]
    server.scenarios["awkward"] = Scenario([{"send_b64": base64.b64encode(part).decode()} for part in parts])
    theirs_say, their_error = await told(theirs, "awkward")
    deltas: list[Delta] = []
    if their_error is None:
        await read(ours, ask("awkward"), deltas)
    else:
        with pytest.raises(ProviderError, match="The model broke"):
            await read(ours, ask("awkward"), deltas)
        assert "The model broke" in str(their_error)
    assert heard(deltas) == theirs_say
    assert theirs_say[0] or their_error is not None


async def test_hundreds_of_answers_are_read_at_once(server: OpenAIServer) -> None:
    # aiohttp's own limit is 100 connections; more would wait for each other.
    count = 300
    release: Step = {"wait": "all are here"}
    server.scenarios["crowd"] = Scenario([release, {"send_b64": base64.b64encode(USUAL).decode()}])
    provider = OpenAIProvider(server.base_url, model="crowd", idle=120, retries=0)
    answers = [asyncio.create_task(read(provider, ask("crowd"))) for _ in range(count)]
    await eventually(lambda: len(server.chats) == count, 60)
    server.release("all are here")
    assert {text(deltas) for deltas in await asyncio.gather(*answers)} == {"Hello, wörld 日本語 🌊"}
    await provider.close()


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "said", "names"),
    [
        ("auth", "provider_auth", "", "OPENAI_API_KEY"),
        ("forbidden", "provider_auth", "", "OPENAI_API_KEY"),
        ("model", "provider_model", "", "OPENAI_MODEL"),
        ("rejected", "provider_rejected", "", "Bad value"),
        ("quota", "provider_rejected", "", "credit"),
        ("redirect", "provider_rejected", "", "redirect"),
        ("busy", "provider_rate_limited", "", "busy"),
        ("busy_long", "provider_rate_limited", "", "3600 s"),
        ("down", "provider_unavailable", "", "503"),
        ("reset", "provider_unavailable", "", "closed the connection"),
        ("html", "provider_malformed", "", "text/html"),
        ("malformed", "provider_malformed", "Hello, world", "JSON"),
        ("bad_utf8", "provider_malformed", "Hello, world", "UTF-8"),
        ("error_first", "provider_unavailable", "", "502"),
        ("error_object", "provider_unavailable", "Hello, world", "The server had an error"),
        ("cut", "provider_cut", "Hello, world", "middle of the answer"),
        ("cut_in_frame", "provider_cut", "Hello, world", "middle of the answer"),
        ("ended_early", "provider_cut", "Hello, world", "middle of the answer"),
        ("nothing", "provider_cut", "", "middle of the answer"),
    ],
)
async def test_each_fault_has_its_code_and_a_sentence_and_keeps_what_was_said(
    provider: OpenAIProvider, server: OpenAIServer, name: str, code: str, said: str, names: str
) -> None:
    deltas: list[Delta] = []

    with pytest.raises(ProviderError) as caught:
        await read(provider, ask(name), deltas)

    assert caught.value.code == code
    assert names in str(caught.value)
    assert "sk-" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert text(deltas) == said


async def test_text_that_is_no_stream_is_malformed(provider: OpenAIProvider, server: OpenAIServer) -> None:
    server.scenarios["prose"] = Scenario([{"send": "It works!\n"}], headers={"content-type": "text/plain"})

    with pytest.raises(ProviderError, match="not an event stream") as caught:
        await read(provider, ask("prose"))

    assert caught.value.code == "provider_malformed"


async def test_a_frame_without_end_is_malformed(
    provider: OpenAIProvider, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SseParser.__init__, "__defaults__", (100_000,))
    server.scenarios["huge"] = Scenario([{"send": "data: "}, *([{"send": "x" * 10_000}] * 100)])

    with pytest.raises(ProviderError, match="longer than") as caught:
        await read(provider, ask("huge"))

    assert caught.value.code == "provider_malformed"


@pytest.mark.parametrize("name", ["hang", "mute", "only_comments"])
async def test_a_silent_server_is_given_up(server: OpenAIServer, name: str) -> None:
    provider = OpenAIProvider(server.base_url, model="scripted", idle=0.1, retries=3)
    try:
        with pytest.raises(ProviderError) as caught:
            await read(provider, ask(name))
    finally:
        await provider.close()

    assert caught.value.code == "provider_timeout"
    assert caught.value.retryable
    # It was asked, though it may read so only after it was given up.
    await eventually(lambda: server.chats)
    assert len(server.chats) == 1
    await eventually(lambda: server.chats[0].disconnected_at)


async def test_signs_of_life_keep_a_slow_answer_alive(server: OpenAIServer) -> None:
    provider = OpenAIProvider(server.base_url, model="scripted", idle=1.5)
    comments: list[Step] = [{"send": ": ping\n\n"}, {"sleep": 0.25}]
    server.scenarios["thinking"] = Scenario([*comments * 8, *server.scenarios["hello"].steps])

    assert text(await read(provider, ask("thinking"))) == "Hello, world"
    await provider.close()


async def test_an_answer_cut_after_any_byte_is_whole_or_cut_and_never_anything_else(
    provider: OpenAIProvider, server: OpenAIServer
) -> None:
    said = ['{"content":"Hé"}', '{"content":" 🌊"}', '{},"finish_reason":"stop"']
    stream = "".join(f'data: {{"choices":[{{"delta":{delta}}}]}}\n\n' for delta in said).encode()
    whole_from = len(stream) - len(b"\n\n")

    async def outcome(length: int) -> str:
        name = f"cut-{length}"
        server.scenarios[name] = Scenario([{"send_b64": base64.b64encode(stream[:length]).decode()}], framed=False)
        deltas: list[Delta] = []
        try:
            await read(provider, ask(name), deltas)
        except ProviderError as error:
            assert "Hé 🌊".startswith(text(deltas))
            return str(error.code)
        assert text(deltas) == "Hé 🌊"
        return "whole"

    lengths = range(len(stream) + 1)
    outcomes = await asyncio.gather(*map(outcome, lengths))

    assert outcomes == ["provider_cut" if length < whole_from else "whole" for length in lengths]


async def test_a_closed_port_a_wrong_name_and_no_http_are_named(sleeps: Sleeps) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def said(base_url: str) -> ProviderError:
        provider = OpenAIProvider(base_url, model="m", retries=1, sleep=sleeps)
        try:
            with pytest.raises(ProviderError) as caught:
                await read(provider, ask("m"))
        finally:
            await provider.close()
        return caught.value

    refused = await said(f"http://127.0.0.1:{port}/v1")
    assert (refused.code, len(sleeps.seconds)) == ("provider_unavailable", 1)
    assert "127.0.0.1 cannot be reached" in str(refused)

    unknown = await said("http://no-such-host.invalid/v1")
    assert unknown.code == "provider_unavailable"

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as other:
        mail = await said(f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}/v1")
    assert mail.code == "provider_malformed"


async def test_a_connection_that_is_never_taken_times_out_and_is_tried_again(sleeps: Sleeps) -> None:
    # A TLS handshake that is never answered; a full backlog would depend on the kernel.
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(ignore, "127.0.0.1", 0) as mute:
        port = mute.sockets[0].getsockname()[1]
        provider = OpenAIProvider(f"https://127.0.0.1:{port}/v1", model="m", connect=0.1, retries=2, sleep=sleeps)
        with pytest.raises(ProviderError, match="did not take the connection") as caught:
            await read(provider, ask("m"))
        await provider.close()

    assert caught.value.code == "provider_timeout"
    assert len(sleeps.seconds) == 2


async def test_a_certificate_that_is_not_trusted_is_refused_and_not_tried_again(sleeps: Sleeps) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(100))
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Self-signed, so nobody trusts it.
    tls = Path(support.openai_server.__file__).with_name("tls")
    context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as untrusted:
        port = untrusted.sockets[0].getsockname()[1]
        provider = OpenAIProvider(f"https://127.0.0.1:{port}/v1", model="m", key=KEY, sleep=sleeps)
        with pytest.raises(ProviderError, match="is not trusted") as caught:
            await read(provider, ask("m"))
        await provider.close()

    assert caught.value.code == "provider_unavailable"
    assert (asked, sleeps.seconds) == ([], [])


# --- what is tried again ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tries", "notice"),
    [
        ("busy_once", 2, "The model is busy; trying again in 1 s (1 of 3)"),
        ("busy_twice", 3, "The model is busy; trying again in 1 s (1 of 3)"),
        ("down_once", 2, "The model's API cannot be reached; trying again in 1 s (1 of 3)"),
        ("reset_once", 2, "The model's API cannot be reached; trying again in 1 s (1 of 3)"),
    ],
)
async def test_what_passes_is_tried_again_with_a_notice(
    provider: OpenAIProvider, server: OpenAIServer, name: str, tries: int, notice: str
) -> None:
    deltas = await read(provider, ask(name, "Why?"))

    assert text(deltas) == answer("Why?", 40)
    assert next(delta.notice for delta in deltas if delta.notice) == notice
    assert len([delta for delta in deltas if delta.notice]) == tries - 1
    assert len(server.chats) == tries


async def test_the_wait_doubles_with_jitter_and_the_last_error_is_raised(
    provider: OpenAIProvider, server: OpenAIServer, sleeps: Sleeps
) -> None:
    with pytest.raises(ProviderError):
        await read(provider, ask("down"))

    assert sleeps.seconds == [0.25, 0.5, 1.0]
    assert len(server.chats) == 4


async def test_the_wait_the_api_asks_for_is_kept_up_to_a_bound(
    provider: OpenAIProvider, server: OpenAIServer, sleeps: Sleeps
) -> None:
    busy = server.scenarios["busy"]
    server.scenarios["wait"] = Scenario(busy.steps, 429, {**busy.headers, "retry-after": "8"}, times=1)

    deltas = await read(provider, ask("wait"))
    assert sleeps.seconds == [pytest.approx(8.4)]
    assert "in 9 s (1 of 3)" in deltas[0].notice

    with pytest.raises(ProviderError) as caught:
        await read(provider, ask("busy_long"))
    assert len(sleeps.seconds) == 1
    assert caught.value.retry_after == 3600


@pytest.mark.parametrize("name", ["auth", "model", "rejected", "quota", "html", "nothing"])
async def test_what_does_not_pass_is_not_tried_again(
    provider: OpenAIProvider, server: OpenAIServer, sleeps: Sleeps, name: str
) -> None:
    with pytest.raises(ProviderError):
        await read(provider, ask(name))

    assert len(server.chats) == 1
    assert sleeps.seconds == []


async def test_nothing_is_tried_again_after_the_first_token(
    provider: OpenAIProvider, server: OpenAIServer, sleeps: Sleeps
) -> None:
    broken = frame({"error": {"message": "overloaded", "code": 503}}).decode()
    server.scenarios["late"] = Scenario([{"chunk": chunk("Hello")}, {"send": broken}])

    with pytest.raises(ProviderError) as caught:
        await read(provider, ask("late"))

    assert caught.value.code == "provider_unavailable"
    assert len(server.chats) == 1


async def test_an_error_in_the_place_of_the_first_token_is_tried_again(
    provider: OpenAIProvider, server: OpenAIServer
) -> None:
    server.scenarios["error_first"].times = 1

    assert text(await read(provider, ask("error_first", "Why?"))) == answer("Why?", 40)


async def test_tries_and_tokens_are_counted(server: OpenAIServer, sleeps: Sleeps) -> None:
    telemetry = Telemetry()
    counted: list[tuple[str, float, dict[str, str]]] = []
    telemetry.listen(lambda name, value, labels: counted.append((name, value, labels)))
    provider = OpenAIProvider(server.base_url, model="m", sleep=sleeps, telemetry=telemetry)

    await read(provider, ask("busy_once", "[[words:10]]"))
    await provider.close()

    assert counted == [
        ("headwater_provider_retries_total", 1, {"code": "provider_rate_limited"}),
        ("headwater_provider_tokens_total", 12, {}),
    ]


# --- parameters that a server does not take ------------------------------------------------------


@pytest.mark.parametrize(
    ("unsupported", "sent"),
    [
        ({"stream_options"}, {"max_tokens", "temperature"}),
        ({"max_tokens"}, {"stream_options", "max_completion_tokens", "temperature"}),
        ({"temperature"}, {"stream_options", "max_tokens"}),
        ({"max_tokens", "temperature", "stream_options"}, {"max_completion_tokens"}),
        ({"max_tokens", "max_completion_tokens"}, {"stream_options", "temperature"}),
    ],
)
async def test_a_refused_parameter_is_left_out_and_remembered_for_that_model(
    provider: OpenAIProvider, server: OpenAIServer, unsupported: set[str], sent: set[str]
) -> None:
    server.unsupported = unsupported
    request = ask("m", "[[words:3]]", max_tokens=5, temperature=0.7)

    assert text(await read(provider, request))
    tries = len(server.chats)
    assert tries == len(unsupported) + 1
    assert server.chats[-1].body.keys() - {"model", "messages", "stream"} == sent

    assert text(await read(provider, request))
    assert len(server.chats) == tries + 1

    server.unsupported = set()
    await read(provider, ask("another", max_tokens=5))
    assert server.chats[-1].body.keys() - {"model", "messages", "stream"} == {"stream_options", "max_tokens"}


async def test_a_400_for_another_reason_is_not_tried_again(provider: OpenAIProvider, server: OpenAIServer) -> None:
    server.scenarios["large"] = Scenario(
        [{"send": '{"error":{"message":"max_tokens is too large: 9. At most 4.","param":"max_tokens"}}'}],
        status=400,
        headers={"content-type": "application/json"},
    )

    with pytest.raises(ProviderError, match="too large"):
        await read(provider, ask("large", max_tokens=9))

    assert len(server.chats) == 1


# --- the rest -----------------------------------------------------------------------------------


async def test_check_names_the_host_and_whether_it_has_the_model(server: OpenAIServer) -> None:
    async def checked(base_url: str, model: str) -> str:
        provider = OpenAIProvider(base_url, model=model)
        try:
            return await provider.check()
        finally:
            await provider.close()

    assert await checked(server.base_url, "scripted") == "127.0.0.1 answers and offers “scripted”."
    assert "Check OPENAI_MODEL" in await checked(server.base_url, "other")
    server.listing = False
    assert "no list of models" in await checked(server.base_url, "m")


async def test_neither_the_key_nor_what_was_said_is_logged(
    provider: OpenAIProvider, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        await read(provider, ask("hello", "a private question"))
        with pytest.raises(ProviderError):
            await read(provider, ask("rejected", "a private question"))

    assert KEY not in caplog.text
    assert "private" not in caplog.text
    assert "Hello" not in caplog.text


async def test_a_provider_says_so_when_it_is_used_on_a_second_event_loop(provider: OpenAIProvider) -> None:
    await read(provider, ask("hello"))

    def elsewhere() -> None:
        asyncio.run(read(provider, ask("hello")))

    with pytest.raises(RuntimeError, match="one per loop"):
        await asyncio.to_thread(elsewhere)
