"""Transcript: what a run's events add up to. The runner, the store and every format fold the same way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from headwater.events import Event, EventType


class Transcript:
    """The text, the reasoning and the figures so far.

    Text is kept as pieces and joined on demand, so that folding an answer of n events costs n.
    """

    def __init__(self) -> None:
        #: The terminal event, once it came.
        self.end: Event | None = None
        self._forget()

    def _forget(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.usage: dict[str, Any] | None = None
        self.stage: str | None = None
        self.progress: float = 0.0

    @classmethod
    def of(cls, events: Iterable[Event]) -> Transcript:
        transcript = cls()
        for event in events:
            transcript.fold(event)
        return transcript

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def pieces(self) -> int:
        """How many content and reasoning events there were: an estimate of tokens when none were reported."""
        return len(self._content) + len(self._reasoning)

    def fold(self, event: Event) -> None:
        """Take in the next event of the log."""
        match event.type:
            case EventType.CONTENT:
                self._content.append(event.data["text"])
            case EventType.REASONING:
                self._reasoning.append(event.data["text"])
            case EventType.USAGE:
                self.usage = dict(event.data)
            case EventType.PROGRESS:
                self.stage = event.data["stage"]
                self.progress = event.data["progress"]
            case EventType.RESET:
                self._forget()
            case _ if event.terminal:
                self.end = event
