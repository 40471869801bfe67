"""Pipeline: *what* to emit. An async generator of events from a run's input; knows no Redis, no HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel

from headwater.events import Event
from headwater.messages import Message
from headwater.runs import Run
from headwater.transcript import Transcript


class OnWorkerLost(StrEnum):
    """What becomes of a run whose worker died in the middle."""

    #: The next attempt says `reset` and begins again.
    RESTART = "restart"
    #: The partial result is kept and the run fails with `worker_lost`.
    INTERRUPT = "interrupt"
    #: The next attempt goes on behind what was said; the pipeline sees it as `said`.
    CONTINUE = "continue"


class Pipeline(ABC):
    """One kind of run."""

    #: Its name in `Run.kind` and in the API.
    kind: ClassVar[str]
    #: Checks `Run.input`.
    input_model: ClassVar[type[BaseModel]]
    on_worker_lost: ClassVar[OnWorkerLost] = OnWorkerLost.RESTART
    #: Longest time of one attempt, in seconds; None for the setting's.
    deadline: ClassVar[float | None] = None

    @abstractmethod
    def events(self, run: Run, said: Transcript) -> AsyncIterator[Event]:
        """Unstamped events, as they come.

        `said` holds what earlier attempts wrote when the kind continues, else nothing.
        Ends by returning, or by yielding `done(...)` as its last event. An exception ends the run
        as failed: a RunFailed by its code, anything else as `internal`. Closing the generator
        must give back what it holds.
        """

    def results(self, run: Run, transcript: Transcript) -> Sequence[Message]:
        """The rows that keep what the run said, once it ended; also after a cancel or an error."""
        return ()

    def usage(self, run: Run, transcript: Transcript) -> dict[str, Any] | None:
        """The tokens a run took: what was counted, or an estimate marked `estimated`. None when nothing is known.

        A pipeline that is closed can say nothing more, so this is asked after every end.
        """
        return transcript.usage

    def complete(self, run: Run, answers: Mapping[str, str]) -> Run:
        """The run with its input whole, now that the runs it waited for have ended: what each of them said, by id."""
        return run

    def check(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The input as JSON values, checked and filled in. Raises pydantic's ValidationError."""
        return self.input_model.model_validate(data).model_dump(mode="json")
