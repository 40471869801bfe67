"""The worker: Celery's side of headwater. `celery -A headwater.worker worker` starts one.

`app` is made when it is first asked for, not when the package is imported: a process that only wants
the result backend must not read settings or connect signals by that.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "app":
        from headwater.errors import SettingsError

        try:
            from headwater.worker.celery_app import app
        except SettingsError as error:
            # `celery -A` shows any exception with its traceback, and these sentences need none.
            raise SystemExit(str(error)) from None
        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
