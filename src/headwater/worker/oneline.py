"""A line where Celery logs a traceback: for what is expected and not a fault."""

from __future__ import annotations

import logging


class OneLine(logging.Filter):
    """What is one of these errors is a warning of one line, not an alarm with a traceback."""

    def __init__(self, errors: tuple[type[Exception], ...]) -> None:
        super().__init__()
        self._errors = errors

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], self._errors):
            record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
        return True
