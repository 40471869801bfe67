"""Celery's request, discreet: what people wrote is not for whoever may look at the queue.

`inspect active` and Flower ask a worker for its requests, which by default show the task's arguments in
full, and those hold the conversation. The sender gives every message a description in their place.
"""

from __future__ import annotations

from typing import Any

from celery.worker.request import Request


class DiscreetRequest(Request):  # type: ignore[misc]  # Celery has no types
    """Shows the description of its arguments, never the arguments."""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect` and Flower show, whichever way they ask."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown
