"""The chat pipeline: deltas become events, a transcript becomes the message, a history fits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from headwater import events
from headwater.errors import ProviderError
from headwater.events import Event, EventType
from headwater.messages import MessageStatus, Role
from headwater.pipelines.chat import ChatPipeline, fit
from headwater.providers.base import ChatRequest, Delta
from headwater.providers.scripted import ScriptedProvider, Step, demo
from headwater.runs import Run, RunState
from headwater.settings import Settings
from headwater.transcript import Transcript

SETTINGS = Settings(_env_file=None, OPENAI_MAX_TOKENS=50, OPENAI_TEMPERATURE=0.3, HEADWATER_MAX_HISTORY=100)


def pipeline(*steps: Step, asked: list[ChatRequest] | None = None) -> ChatPipeline:
    def script(request: ChatRequest) -> Iterable[Step]:
        if asked is not None:
            asked.append(request)
        return steps

    return ChatPipeline(ScriptedProvider(script), SETTINGS)


def run(**changes: Any) -> Run:
    question = {"messages": [{"role": "user", "content": "Why?"}], "parent_id": "question", "model": None}
    first = Run("run", "chat", "owner", question, 1000, chat_id="chat", message_id="answer")
    return replace(first.started(1, 2000), **changes)


async def collect(chat: ChatPipeline, of: Run | None = None, into: list[Event] | None = None) -> list[Event]:
    into = [] if into is None else into
    async for event in chat.events(of or run(), Transcript()):
        into.append(event)
    return into


async def test_deltas_become_events_in_their_order() -> None:
    chat = pipeline(
        Delta(notice="The model is busy; trying again in 2 s (1 of 3)"),
        Delta(reasoning="Hm."),
        Delta(content="Because"),
        Delta(content=".", reasoning="Done", usage=(4, 3), finish_reason="length"),
    )

    assert await collect(chat) == [
        events.log("The model is busy; trying again in 2 s (1 of 3)", "warning"),
        events.reasoning("Hm."),
        events.content("Because"),
        events.reasoning("Done"),
        events.content("."),
        events.usage(4, 3),
        events.done("length"),
    ]


async def test_an_answer_without_a_finish_reason_is_done_all_the_same() -> None:
    assert (await collect(pipeline(Delta("a"))))[-1] == events.done("stop")


async def test_the_demos_usage_is_marked_as_an_estimate() -> None:
    chat = ChatPipeline(demo(1e6), SETTINGS)

    (usage,) = [event for event in await collect(chat) if event.type is EventType.USAGE]
    assert usage.data["estimated"] is True


async def test_the_model_is_asked_with_the_settings_and_the_history_that_fits() -> None:
    asked: list[ChatRequest] = []
    messages = [{"role": "user", "content": "x" * 200}, {"role": "user", "content": "Why?"}]

    await collect(pipeline(asked=asked), run(input={"messages": messages}))
    await collect(pipeline(asked=asked), run(input={"messages": messages, "model": "other"}))

    assert asked[0] == ChatRequest([{"role": "user", "content": "Why?"}], "scripted", 50, 0.3)
    assert asked[1].model == "other"


async def test_what_postgresql_cannot_keep_is_replaced_before_it_is_shown() -> None:
    said = Transcript.of(await collect(pipeline(Delta("a\0b", "c\0"))))

    assert (said.content, said.reasoning) == ("a\ufffdb", "c\ufffd")


async def test_a_providers_error_passes_through_after_the_text_before_it() -> None:
    seen: list[Event] = []
    with pytest.raises(ProviderError, match="cut"):
        await collect(pipeline(Delta("a"), ProviderError("cut")), into=seen)

    assert seen == [events.content("a")]


async def test_closing_the_events_closes_the_providers_stream() -> None:
    provider = ScriptedProvider(lambda _: [Delta("a"), asyncio.Event(), Delta("b")])
    async with aclosing(ChatPipeline(provider, SETTINGS).events(run(), Transcript())) as stream:
        await anext(stream)
        assert provider.streaming == 1

    assert provider.streaming == 0


# --- the message --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "status", "error"),
    [
        (RunState.DONE, MessageStatus.DONE, None),
        (RunState.FAILED, MessageStatus.FAILED, {"code": "provider_cut", "message": "It broke off."}),
        (RunState.CANCELLED, MessageStatus.CANCELLED, None),
    ],
)
async def test_the_message_keeps_what_was_said_however_the_run_ended(
    state: RunState, status: MessageStatus, error: dict[str, str] | None
) -> None:
    said = Transcript.of([events.reasoning("Hm."), events.content("Be"), events.content("cause"), events.usage(4, 3)])
    ended = run().ended(state, 3000, error=error)

    (message,) = pipeline().results(ended, said)

    assert message.to_json() == {
        "id": "answer",
        "chat_id": "chat",
        "owner_id": "owner",
        "role": Role.ASSISTANT,
        "content": "Because",
        "created_at": 1000,
        "status": status,
        "parent_id": "question",
        "reasoning": "Hm.",
        "run_id": "run",
        "model": "scripted",
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "estimated": False},
        "error": error,
        "version": ended.version,
    }


def test_a_run_outside_a_conversation_leaves_no_message() -> None:
    ended = run(chat_id=None, message_id=None).ended(RunState.DONE, 3000)

    assert pipeline().results(ended, Transcript()) == ()


def test_usage_is_estimated_where_the_api_did_not_count() -> None:
    cancelled = run().ended(RunState.CANCELLED, 3000)
    words = Transcript.of([events.content("a ")] * 10)
    lump = Transcript.of([events.reasoning("x" * 30), events.content("y" * 31)])

    def estimate(prompt: int, completion: int) -> dict[str, Any]:
        return dict(events.usage(prompt, completion, estimated=True).data)

    assert pipeline().usage(cancelled, words) == estimate(1, 10)
    assert pipeline().usage(cancelled, lump) == estimate(1, 16)


def test_usage_is_unknown_where_nothing_was_said() -> None:
    failed = run().ended(RunState.FAILED, 3000, error={"code": "provider_auth", "message": "No."})

    assert pipeline().usage(failed, Transcript()) is None
    assert pipeline().results(failed, Transcript())[0].usage is None


# --- the input ----------------------------------------------------------------------------------


def test_an_input_is_checked_and_filled_in() -> None:
    assert pipeline().check({"messages": [{"role": "user", "content": "Why?"}]}) == {
        "messages": [{"role": "user", "content": "Why?"}],
        "parent_id": None,
        "model": None,
    }


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "x"}], "modle": "typo"},
    ],
)
def test_an_input_that_cannot_be_answered_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        pipeline().check(data)


# --- the history --------------------------------------------------------------------------------


def turns(*parts: str) -> list[dict[str, Any]]:
    """`u:text` for a user, `a:` for an assistant, `s:` for the system."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[part[0]], "content": part[2:]} for part in parts]


@pytest.mark.parametrize(
    ("messages", "room", "kept"),
    [
        (turns("u:one", "a:two", "u:three"), 11, turns("u:one", "a:two", "u:three")),
        (turns("u:one", "a:two", "u:three"), 10, turns("u:three")),
        (turns("u:1", "a:2", "u:3", "a:4", "u:5"), 3, turns("u:3", "a:4", "u:5")),
        (turns("u:1", "a:2", "u:3", "a:4", "u:5"), 4, turns("u:3", "a:4", "u:5")),
        (turns("u:1", "a:long answer", "u:3", "a:4", "u:5"), 6, turns("u:3", "a:4", "u:5")),
        (turns("u:much too long"), 3, turns("u:much too long")),
        (turns("s:be brief", "u:1", "a:2", "u:3"), 10, turns("s:be brief", "u:3")),
        (turns("s:be brief", "u:1", "a:2", "u:3"), 11, turns("s:be brief", "u:1", "a:2", "u:3")),
        (turns("u:1", "a:", "u:3"), 10, turns("u:1", "u:3")),
        (turns("u:1", "a:par"), 1, turns("u:1", "a:par")),
        ([], 10, []),
    ],
)
def test_the_oldest_messages_are_left_out_first(
    messages: list[dict[str, Any]], room: int, kept: list[dict[str, Any]]
) -> None:
    assert fit(messages, room) == kept


def test_only_the_role_and_the_content_are_sent() -> None:
    assert fit([{"role": Role.USER, "content": "x", "id": "1"}], 10) == [{"role": "user", "content": "x"}]


histories = st.lists(
    st.builds(
        lambda role, size: {"role": role, "content": "x" * size},
        st.sampled_from(["user", "assistant", "system"]),
        st.integers(0, 9),
    ),
    max_size=12,
)


@given(histories, st.integers(1, 60))
def test_a_history_that_fits_is_a_subsequence_with_the_last_question_and_fitting_again_changes_nothing(
    messages: list[dict[str, Any]], room: int
) -> None:
    kept = fit(messages, room)

    rest = iter(messages)
    assert all(message in rest for message in kept)
    asked = [message for message in messages if message["role"] == "user" and message["content"]]
    assert [message for message in kept if message["role"] == "user"][-1:] == asked[-1:]
    assert fit(kept, room) == kept
