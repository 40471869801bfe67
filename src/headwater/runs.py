"""Run: one execution, and the only place that knows its legal moves.

    queued ──▶ running ──▶ done
      │          │  ▲ └───▶ failed
      │          │  └─ a further attempt (running ──▶ running, attempt + 1)
      └──────────┴───────▶ cancelled

Terminal states absorb. The documents' `task_id` and `run_id` are both the run's id, and so is the
id of its Celery task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final


class RunState(StrEnum):
    """Where a run is."""

    #: Accepted; no worker has it yet.
    QUEUED = "queued"
    #: A worker holds its lease.
    RUNNING = "running"
    #: It ended well.
    DONE = "done"
    #: It ended with an error, which has a code.
    FAILED = "failed"
    #: Somebody stopped it and the worker confirmed.
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


class Priority(StrEnum):
    """Which of the runs that wait goes first. The order here is the order of going."""

    #: Before everything else that waits.
    URGENT = "urgent"
    NORMAL = "normal"
    #: When nothing else waits.
    BACKGROUND = "background"


_TERMINAL: Final = frozenset({RunState.DONE, RunState.FAILED, RunState.CANCELLED})
_RANK: Final = {RunState.QUEUED: 0, RunState.RUNNING: 1}


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of a pipeline. It carries its input, so a worker needs no database to begin."""

    #: UUIDv7.
    id: str
    #: The pipeline's name, e.g. `chat`.
    kind: str
    owner_id: str
    #: What the pipeline reads; JSON values, checked by the pipeline's input model.
    input: Mapping[str, Any]
    #: Unix milliseconds.
    created_at: int
    state: RunState = RunState.QUEUED
    #: How often a worker has claimed it. Grows only.
    attempt: int = 0
    #: The chat and the assistant's message it answers into; None for jobs.
    chat_id: str | None = None
    message_id: str | None = None
    stage: str | None = None
    #: 0 to 1.
    progress: float = 0.0
    started_at: int | None = None
    ended_at: int | None = None
    #: `{code, message}` of a failed run.
    error: Mapping[str, Any] | None = None
    #: `{prompt_tokens, completion_tokens, total_tokens, estimated}`.
    usage: Mapping[str, Any] | None = None
    #: The caller's Idempotency-Key and the fingerprint of the body it came with.
    idempotency_key: str | None = None
    fingerprint: str | None = None
    priority: Priority = Priority.NORMAL
    #: Runs that must have ended before this one begins: what its chat was answering when it was accepted.
    waits_for: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """Grows with every legal move, so that the later of two copies is known without a clock.

        A higher attempt beats a lower one, and within one attempt queued < running < ended. So
        what a zombie of an earlier attempt writes late changes nothing.
        """
        return self.attempt * 4 + _RANK.get(self.state, 2)

    def started(self, attempt: int, at: int) -> Run:
        """A worker claimed it: running, under `attempt`.

        Raises ValueError when it has ended or `attempt` is not higher.
        """
        if self.state.terminal or attempt <= self.attempt:
            raise ValueError(f"run {self.id} is {self.state} at attempt {self.attempt}, cannot start attempt {attempt}")
        return replace(self, state=RunState.RUNNING, attempt=attempt, started_at=self.started_at or at)

    def ended(
        self,
        state: RunState,
        at: int,
        *,
        error: Mapping[str, Any] | None = None,
        usage: Mapping[str, Any] | None = None,
        stage: str | None = None,
        progress: float | None = None,
    ) -> Run:
        """It reached a terminal state. Raises ValueError when it had one already."""
        if self.state.terminal or not state.terminal:
            raise ValueError(f"run {self.id} is {self.state}, cannot become {state}")
        return replace(
            self,
            state=state,
            ended_at=at,
            error=error,
            usage=usage if usage is not None else self.usage,
            stage=stage if stage is not None else self.stage,
            progress=progress if progress is not None else self.progress,
        )

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON values. `from_json` reads it back."""
        # Not `asdict`, which copies the whole input, several times on the way of every message.
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"waits_for": list(self.waits_for)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """Read what `to_json` wrote; unknown members are ignored, so that versions can meet."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        priority = Priority(known.get("priority", Priority.NORMAL))
        waits_for = tuple(known.get("waits_for", ()))
        return cls(**{**known, "state": RunState(known["state"]), "priority": priority, "waits_for": waits_for})


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to write a run's log until it runs out, by Redis's clock."""

    run_id: str
    attempt: int
    #: Names the holder, e.g. `host:pid:task`.
    holder: str
    epoch: str
    #: Events already in the log when it was claimed; the next event has seq `length + 1`.
    length: int
    #: A cancel was asked for already.
    cancelled: bool = False
