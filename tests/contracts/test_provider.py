"""What every provider does: the scripted one, the demo model, and the OpenAI-compatible one over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from headwater.errors import ProviderError
from headwater.providers.base import ChatRequest, Delta, Provider
from headwater.providers.openai import OpenAIProvider
from headwater.providers.scripted import ScriptedProvider, Step, demo
from support.openai_scenarios import Scenario
from support.openai_server import OpenAIServer
from support.wait import eventually


@dataclass
class Case:
    """One implementation, brought to answer, to fail midway and to answer without end."""

    provider: Provider
    #: Models (or questions) that make it do so.
    answers: ChatRequest
    fails: ChatRequest
    endless: ChatRequest
    #: Answers that are still under way on the other side.
    under_way: Callable[[], int]


def ask(question: str, model: str = "scripted") -> ChatRequest:
    return ChatRequest([{"role": "user", "content": question}], model, max_tokens=100, temperature=0.5)


def script(request: ChatRequest) -> Iterator[Step]:
    yield Delta(content="Hello")
    if request.messages[-1]["content"] == "fail":
        yield ProviderError("It broke off.", code="provider_cut", retryable=True)
    if request.messages[-1]["content"] == "endless":
        yield asyncio.Event()
    yield Delta(content=", world")
    yield Delta(usage=(3, 2), finish_reason="stop")


async def scripted() -> AsyncIterator[Case]:
    provider = ScriptedProvider(script)
    yield Case(provider, ask("answer"), ask("fail"), ask("endless"), lambda: provider.streaming)


async def demo_model() -> AsyncIterator[Case]:
    provider = demo(pace=1e6)
    slow = demo(pace=1e-3)

    class Demo(ScriptedProvider):
        def stream(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
            chosen = slow if request.messages[-1]["content"] == "wait" else provider
            return chosen.stream(request)

    both = Demo(lambda _: (), model=provider.model, demo=True)
    yield Case(both, ask("hi"), ask("error please"), ask("wait"), lambda: provider.streaming + slow.streaming)


async def openai() -> AsyncIterator[Case]:
    async with OpenAIServer() as server:
        server.scenarios["endless"] = Scenario([{"words": 20_000, "rate": 1000}])
        provider = OpenAIProvider(server.base_url, model="scripted", key="sk-test", idle=5, retries=0)

        def under_way() -> int:
            return sum(1 for chat in server.chats if chat.finished_at is None and chat.disconnected_at is None)

        yield Case(provider, ask("hi", "hello"), ask("hi", "cut"), ask("hi", "endless"), under_way)
        await provider.close()


@pytest.fixture(params=[scripted, demo_model, openai], ids=["scripted", "demo", "openai"])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    async for case in request.param():
        yield case


async def read(provider: Provider, request: ChatRequest) -> list[Delta]:
    return [delta async for delta in provider.stream(request)]


async def test_an_answer_has_text_usage_and_exactly_one_finish_reason(case: Case) -> None:
    deltas = await read(case.provider, case.answers)

    assert "".join(delta.content for delta in deltas)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert [delta.usage for delta in deltas if delta.usage is not None]
    assert not any(delta.notice for delta in deltas)


async def test_the_same_question_can_be_asked_many_times_at_once(case: Case) -> None:
    answers = await asyncio.gather(*(read(case.provider, case.answers) for _ in range(20)))

    assert len({"".join(delta.content for delta in deltas) for deltas in answers}) == 1
    await eventually(lambda: case.under_way() == 0)


async def test_a_failure_midway_comes_after_the_text_before_it(case: Case) -> None:
    deltas: list[Delta] = []

    with pytest.raises(ProviderError) as caught:
        await _collect(case.provider, case.fails, deltas)

    assert caught.value.code == "provider_cut"
    assert str(caught.value).endswith(".")
    assert "".join(delta.content for delta in deltas)


async def _collect(provider: Provider, request: ChatRequest, into: list[Delta]) -> None:
    async for delta in provider.stream(request):
        into.append(delta)  # noqa: PERF401 - what came before the error counts


async def test_closing_the_answer_ends_it_on_the_other_side(case: Case) -> None:
    async with aclosing(case.provider.stream(case.endless)) as stream:
        first = await anext(stream)
        assert first.content or first.reasoning
        assert case.under_way() == 1

    await eventually(lambda: case.under_way() == 0)


async def test_cancelling_the_task_that_reads_ends_the_answer_on_the_other_side(case: Case) -> None:
    begun = asyncio.Event()

    async def follow() -> None:
        async for _ in case.provider.stream(case.endless):
            begun.set()

    task = asyncio.create_task(follow())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await eventually(lambda: case.under_way() == 0)


async def test_a_closed_answer_does_not_disturb_the_next(case: Case) -> None:
    async with aclosing(case.provider.stream(case.endless)) as stream:
        await anext(stream)

    assert (await read(case.provider, case.answers))[-1]


async def test_check_says_a_sentence(case: Case) -> None:
    assert (await case.provider.check()).endswith(".")


async def test_closing_twice_is_harmless(case: Case) -> None:
    await case.provider.close()
    await case.provider.close()
