"""Provider: a request to a model's API becomes deltas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What the model is asked."""

    #: `{role, content}` each, oldest first.
    messages: Sequence[Mapping[str, Any]]
    model: str
    #: Longest answer in tokens; None leaves it to the API.
    max_tokens: int | None = None
    #: 0 to 2; None leaves it to the API.
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer. Usually one field is set."""

    content: str = ""
    reasoning: str = ""
    #: `(prompt_tokens, completion_tokens)` as the API reports them.
    usage: tuple[int, int] | None = None
    #: `stop`, `length`, `content_filter`, `tool_calls`; the last delta that carries anything has it.
    finish_reason: str | None = None
    #: A sentence for the person who waits, e.g. that the call is tried again.
    notice: str = ""


class Provider(ABC):
    """One model API. Its connections are shared by all runs of a process."""

    #: The model asked when a request names none.
    model: str
    #: The built-in demo, which must say so.
    demo: bool = False

    @abstractmethod
    def stream(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        """The answer as it comes. Closing the generator (`aclose`) closes the connection to the API.

        Raises ProviderError with one of its codes. Errors before the first token that may pass
        (429, 5xx, no connection) are retried inside, with a `notice` each time.
        """

    @abstractmethod
    async def check(self) -> str:
        """A sentence on what answers, for `headwater doctor`. Raises ProviderError."""

    @abstractmethod
    async def close(self) -> None:
        """Give back the connections."""
