"""RunBackend: `AsyncResult(run_id)` tells the truth, read from the run's own metadata.

Nothing is stored. A task that ended says little about its run: it may have found the run held by
somebody else, or handed it over. So Celery's states are made from the run's state:

    queued, unknown → PENDING    running → STARTED    done → SUCCESS    failed → FAILURE    cancelled → REVOKED
"""

from __future__ import annotations

from typing import Any, Final

from celery import states
from celery.backends.base import BaseBackend
from celery.exceptions import TaskRevokedError

from headwater.errors import RunFailed
from headwater.runs import RunState
from headwater.streams.sync import SyncMeta

_STATES: Final = {
    RunState.QUEUED: states.PENDING,
    RunState.RUNNING: states.STARTED,
    RunState.DONE: states.SUCCESS,
    RunState.FAILED: states.FAILURE,
    RunState.CANCELLED: states.REVOKED,
}
#: Fields of the metadata that a result repeats.
_FIELDS: Final = ("kind", "owner_id", "chat_id", "attempt", "chunk_count", "created_at", "started_at", "ended_at")


class RunBackend(BaseBackend):  # type: ignore[misc]
    """Celery's result backend over `stream:{<run>}:metadata`. Raises LogUnavailable when Redis does not answer."""

    def __init__(self, app: Any, url: str | None = None, **options: Any) -> None:
        super().__init__(app, url=url, **options)
        self._meta: SyncMeta | None = None

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        fields = self._metadata().read(task_id)
        if not fields.get("status"):
            return {"task_id": task_id, "status": states.PENDING, "result": None}
        run_state = RunState(fields["status"])
        told = {name: fields[name] for name in _FIELDS if name in fields}
        result: Any = {"run_id": task_id, "status": run_state.value, **told}
        if run_state is RunState.FAILED:
            # Celery raises what a failed result holds; the reason stands in the run's `error` event.
            result = RunFailed(f"Run {task_id} failed at attempt {fields.get('attempt', '?')}.")
        elif run_state is RunState.CANCELLED:
            result = TaskRevokedError(f"Run {task_id} was cancelled.")
        return {"task_id": task_id, "status": _STATES[run_state], "result": result, "traceback": None, "children": []}

    def _metadata(self) -> SyncMeta:
        if self._meta is None:
            self._meta = SyncMeta(str(self.url))
        return self._meta

    def mark_as_revoked(self, task_id: str, *_: Any, **__: Any) -> None:
        """A revoke, by Flower's button say, is a cancel: no worker takes a message of this id any more."""
        self._metadata().cancel(task_id)

    def _store_result(self, task_id: str, result: Any, state: str, **options: Any) -> Any:
        """Nothing: the runner has written what is true."""
        return result

    def store_result(self, task_id: str, result: Any, state: str, *_: Any, **__: Any) -> Any:
        return self._store_result(task_id, result, state)

    def _forget(self, task_id: str) -> None:
        """Nothing: the run's log expires by itself."""
