"""The scripted provider and what the demo model says."""

from __future__ import annotations

import pytest

from headwater.errors import ProviderError
from headwater.providers import connect
from headwater.providers.base import ChatRequest, Delta
from headwater.providers.demo import DEMO_MODEL
from headwater.providers.scripted import ScriptedProvider, demo
from headwater.settings import Settings


def ask(question: str) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": question}], DEMO_MODEL)


async def answer(question: str, pace: float = 1e6) -> list[Delta]:
    return [delta async for delta in demo(pace).stream(ask(question))]


async def read(provider: ScriptedProvider, question: str, into: list[Delta]) -> None:
    async for delta in provider.stream(ask(question)):
        into.append(delta)  # noqa: PERF401 - what came before an error counts


def text(deltas: list[Delta]) -> str:
    return "".join(delta.content for delta in deltas)


async def test_a_script_says_waits_and_fails_in_its_order() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    provider = ScriptedProvider(lambda _: [Delta("a"), 2.5, Delta("b"), ValueError("no")], sleep=sleep)
    said: list[Delta] = []
    with pytest.raises(ValueError, match="no"):
        await read(provider, "", said)

    assert (text(said), slept) == ("ab", [2.5])
    assert provider.streaming == 0


async def test_the_demo_says_that_it_is_one_quotes_the_question_and_says_how_to_set_a_key() -> None:
    deltas = await answer("Why is the sky\nblue?")

    assert "built-in demo model" in text(deltas)
    assert "> Why is the sky blue?" in text(deltas)
    assert "OPENAI_API_KEY" in text(deltas)
    assert "OPENAI_BASE_URL" in text(deltas)
    assert "\n- " in text(deltas)
    assert text(deltas).count("```") == 2
    assert deltas[0].reasoning
    assert deltas[-1].finish_reason == "stop"


async def test_the_demo_says_the_same_to_the_same_question() -> None:
    assert await answer("a long one") == await answer("a long one")
    assert text(await answer("a long one")) != text(await answer("another long one"))


@pytest.mark.parametrize(("word", "sign"), [("table", "|:---"), ("code", "```python"), ("long", "### Part 28 of 28")])
async def test_words_in_the_question_steer_the_demo(word: str, sign: str) -> None:
    assert sign in text(await answer(f"Please a {word}!"))
    assert sign not in text(await answer("Please!"))
    assert f"`{word}`" in text(await answer("Please!"))


async def test_short_is_one_sentence_and_think_is_much_reasoning() -> None:
    assert len(text(await answer("short"))) < 120
    assert len([d for d in await answer("think") if d.reasoning]) > 3 * len(
        [d for d in await answer("x") if d.reasoning]
    )


async def test_error_breaks_the_demo_off_in_the_middle() -> None:
    said: list[Delta] = []
    with pytest.raises(ProviderError) as caught:
        await read(demo(1e6), "an error", said)

    assert caught.value.code == "provider_cut"
    assert 0 < len(text(said)) < len(text(await answer("no mistake")))


@pytest.mark.parametrize(("question", "low", "high"), [("x", 3, 12), ("a long one", 50, 75)])
async def test_the_demo_speaks_at_a_human_pace(question: str, low: float, high: float) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    provider = demo()
    provider._sleep = sleep
    words = len([delta async for delta in provider.stream(ask(question))])

    assert low < sum(slept) < high
    assert 25 < words / sum(slept) < 40


async def test_the_demo_counts_what_it_said() -> None:
    deltas = await answer("x" * 40)

    assert deltas[-1].usage == (10, len(deltas) - 1)


async def test_without_a_key_and_an_address_the_demo_is_connected() -> None:
    assert connect(Settings(_env_file=None, OPENAI_API_KEY=None, OPENAI_BASE_URL=None)).demo
    assert not connect(Settings(_env_file=None, OPENAI_API_KEY=None, OPENAI_BASE_URL="http://127.0.0.1:1/v1")).demo
    assert not connect(Settings(_env_file=None, OPENAI_API_KEY="sk-x", OPENAI_BASE_URL=None)).demo
