"""What the commands share: settings, logging, and how a failure is said."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from headwater.errors import HeadwaterError
from headwater.settings import Settings, load_settings

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder for the journal and the embedded servers' data. [HEADWATER_DATA_DIR]"),
]
Parent = Annotated[int | None, typer.Option("--parent", hidden=True)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def settings_with(**changes: Any) -> Settings:
    """The settings, with the options that were given in place of the environment's. Raises SettingsError."""
    return load_settings(**{name: value for name, value in changes.items() if value is not None})


def coloured(settings: Settings, stream: TextIO) -> bool:
    """Colour on a terminal only, and never against NO_COLOR."""
    return stream.isatty() and not settings.no_color


def start_logging(settings: Settings, parent: int | None) -> None:
    """One line per record on stderr. Under a supervisor, which stamps the lines itself, without the time."""
    stamp = "" if parent else "%(asctime)s "
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{stamp}%(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if settings.debug else logging.INFO, handlers=[handler], force=True)
    # Theirs hide ours.
    for name in ("asyncio", "amqp", "kombu", "celery.utils.functional", "celery.bootsteps"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("alembic.runtime").setLevel(logging.WARNING)
    if not settings.debug:
        handler.addFilter(_tells_something)


def _tells_something(record: logging.LogRecord) -> bool:
    """False for the periodic jobs that went well: three lines every few seconds, day and night."""
    if record.levelno > logging.INFO or not record.name.startswith("celery."):
        return True
    return "headwater.sync" not in record.getMessage()


def adopt(parent: int | None) -> None:
    """End with the supervisor, also when it is killed."""
    if parent is not None:
        from headwater.dev.child import follow_parent

        follow_parent(parent)


def debugging() -> bool:
    try:
        return load_settings().debug
    except HeadwaterError:
        return False


def fail(message: str, code: int) -> NoReturn:
    """Say it in red on stderr and exit."""
    try:
        red = coloured(load_settings(), sys.stderr)
    except HeadwaterError:
        red = False
    typer.secho(message, err=True, fg="red" if red else None)
    sys.exit(code)
