"""The worker: Celery's side of headwater. `celery -A headwater.worker worker` starts one.

`app` is made when it is first asked for, not when the package is imported: a process that only wants
the result backend must not read settings or connect signals by that.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # `celery -A` looks for `app`, and for `celery` once the module of the same name has taken its place.
    if name in {"app", "celery"}:
        from headwater.worker.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
