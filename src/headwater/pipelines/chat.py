"""The chat pipeline: a conversation becomes the events of an answer, and the message that keeps it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from headwater import events
from headwater.events import Event
from headwater.messages import Message, MessageStatus, Role, mended
from headwater.pipelines.base import Pipeline
from headwater.providers.base import ChatRequest, Provider
from headwater.runs import Run, RunState
from headwater.settings import Settings
from headwater.transcript import Transcript

#: Characters per token, where the API does not count. English text has about four.
CHARACTERS_PER_TOKEN: Final = 4

_STATUS: Final = {
    RunState.DONE: MessageStatus.DONE,
    RunState.FAILED: MessageStatus.FAILED,
    RunState.CANCELLED: MessageStatus.CANCELLED,
}


class Turn(BaseModel):
    """One message as the model sees it."""

    model_config = ConfigDict(extra="forbid")

    role: Role
    content: str
    #: The run that was still giving this answer when the input was made; its text takes the place of `content`.
    run_id: str | None = Field(None, exclude_if=lambda value: value is None)


class ChatInput(BaseModel):
    """What a chat run answers."""

    model_config = ConfigDict(extra="forbid")

    #: The branch that is answered, oldest first.
    messages: list[Turn] = Field(min_length=1)
    #: The message the answer follows; None for a run outside a conversation.
    parent_id: str | None = None
    #: None for the provider's own.
    model: str | None = None


class ChatPipeline(Pipeline):
    """Asks the provider and passes on what it says. An attempt after a lost worker begins again."""

    kind: ClassVar[str] = "chat"
    input_model: ClassVar[type[BaseModel]] = ChatInput

    def __init__(self, provider: Provider, settings: Settings) -> None:
        self._provider = provider
        self._settings = settings

    async def events(self, run: Run, said: Transcript) -> AsyncGenerator[Event, None]:
        request = ChatRequest(
            messages=self._messages(run),
            model=self._model(run),
            max_tokens=self._settings.openai_max_tokens,
            temperature=self._settings.openai_temperature,
        )
        finish_reason = "stop"
        async with aclosing(self._provider.stream(request)) as stream:
            async for delta in stream:
                if delta.notice:
                    yield events.log(delta.notice, "warning")
                if delta.reasoning:
                    yield events.reasoning(mended(delta.reasoning))
                if delta.content:
                    yield events.content(mended(delta.content))
                if delta.usage is not None:
                    # The demo's figures are a guess, as no model counted.
                    yield events.usage(*delta.usage, estimated=self._provider.demo)
                finish_reason = delta.finish_reason or finish_reason
        yield events.done(finish_reason)

    def complete(self, run: Run, answers: Mapping[str, str]) -> Run:
        messages = [
            {"role": turn["role"], "content": answers.get(turn["run_id"], "")} if turn.get("run_id") else turn
            for turn in run.input["messages"]
        ]
        return replace(run, input={**run.input, "messages": messages})

    def usage(self, run: Run, transcript: Transcript) -> dict[str, Any] | None:
        """What the API counted; else an estimate, marked as one, of what was asked and said.

        The prompt's tokens are its characters / 4. The completion's are its characters / 4 or its
        pieces, whichever is more: an API sends a token a piece, but pieces that come together are
        joined. None when nothing was said: then it is not known whether the model was asked at all.
        """
        if transcript.usage is not None or not transcript.pieces:
            return transcript.usage
        asked = sum(len(message["content"]) for message in self._messages(run))
        said = len(transcript.content) + len(transcript.reasoning)
        return dict(events.usage(_tokens(asked), max(_tokens(said), transcript.pieces), estimated=True).data)

    def results(self, run: Run, transcript: Transcript) -> Sequence[Message]:
        if run.message_id is None or run.chat_id is None:
            return ()
        return (
            Message(
                id=run.message_id,
                chat_id=run.chat_id,
                owner_id=run.owner_id,
                role=Role.ASSISTANT,
                content=transcript.content,
                created_at=run.created_at,
                status=_STATUS.get(run.state, MessageStatus.PROCESSING),
                parent_id=run.input.get("parent_id"),
                reasoning=transcript.reasoning or None,
                run_id=run.id,
                model=self._model(run),
                usage=self.usage(run, transcript),
                error=run.error,
                version=run.version,
            ),
        )

    def _messages(self, run: Run) -> list[dict[str, Any]]:
        return fit(run.input["messages"], self._settings.max_history)

    def _model(self, run: Run) -> str:
        return run.input.get("model") or self._provider.model


def fit(messages: Sequence[Mapping[str, Any]], max_characters: int) -> list[dict[str, Any]]:
    """The newest messages that together have at most `max_characters`, as `Turn`s, oldest first.

    System messages at the beginning, the last user message and what follows it are kept whatever
    their length. Empty messages, such as answers that were stopped before their first word, are
    left out, because APIs refuse them. After a cut the rest begins with a user's message.
    """
    kept = [
        {name: str(message[name]) for name in ("role", "content", "run_id") if message.get(name) is not None}
        for message in messages
        if message["content"] or message.get("run_id")
    ]
    head = next((index for index, message in enumerate(kept) if message["role"] != Role.SYSTEM), len(kept))
    users = [index for index, message in enumerate(kept) if message["role"] == Role.USER]
    start = users[-1] if users else max(head, len(kept) - 1)
    room = max_characters - sum(len(message["content"]) for message in (*kept[:head], *kept[start:]))
    while start > head and len(kept[start - 1]["content"]) <= room:
        start -= 1
        room -= len(kept[start]["content"])
    if start > head:
        start = next((index for index in users if index >= start), start)
    return kept[:head] + kept[start:]


def _tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)
