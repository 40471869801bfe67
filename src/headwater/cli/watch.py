"""Commands that look: monitors, doctor, version."""

from __future__ import annotations

import asyncio
import shlex
import sys
from typing import Annotated

import typer

from headwater.cli.shared import DataDir, coloured
from headwater.errors import SettingsError
from headwater.note import read_note, settings_of_running

monitor = typer.Typer(help="Watch streams and tasks as they happen.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(env)
    app.command()(version)


@monitor.command("redis")
def monitor_redis(
    pattern: Annotated[str, typer.Argument(help="Channels to follow, with * for any characters.")] = "stream:*",
    data_dir: DataDir = None,
) -> None:
    """Show what is published in Redis, one line per message, until Ctrl-C.

    Each line has the time, the channel, the number and types of the events, and the beginning of their text.
    """
    from headwater.clock import SystemClock
    from headwater.monitor import watch_redis

    settings = settings_of_running(data_dir=data_dir)
    asyncio.run(watch_redis(settings.need_redis(), pattern, clock=SystemClock(), say=typer.echo))


@monitor.command("celery")
def monitor_celery(
    task: Annotated[str, typer.Argument(help="`list`, or the id of a task.")] = "list", data_dir: DataDir = None
) -> None:
    """Show Celery's workers and tasks, or follow one task until it ends.

    `list` shows the workers, what they run and hold, and the latest runs. With a task's id it writes a line at each
    change and ends with the task: exit code 0 when it is done, 1 when it failed, was cancelled or is unknown.
    """
    from headwater.clock import SystemClock
    from headwater.monitor import list_celery, watch_task

    settings = settings_of_running(data_dir=data_dir)
    settings.need_redis()
    if task == "list":
        asyncio.run(list_celery(settings, clock=SystemClock(), say=typer.echo))
    elif not asyncio.run(watch_task(settings, task, clock=SystemClock(), say=typer.echo)):
        sys.exit(1)


def doctor(data_dir: DataDir = None) -> None:
    """Check everything headwater needs and say what to do where something is wrong.

    Redis, PostgreSQL, the model's API, the journal's folder, the clocks, versions and settings. ✔ is well, ! deserves
    a look, ✘ is broken. Exit code 1 when something is broken.
    """
    from headwater.clock import SystemClock
    from headwater.doctor import Verdict, examine

    settings = settings_of_running(data_dir=data_dir)
    colours = {Verdict.GOOD: "green", Verdict.WARN: "yellow", Verdict.BAD: "red"}
    colour = coloured(settings, sys.stdout)
    note = read_note(settings.data_dir)
    findings = asyncio.run(examine(settings, clock=SystemClock(), running=note.url if note else None))
    for finding in findings:
        mark = typer.style(finding.verdict.value, fg=colours[finding.verdict]) if colour else finding.verdict.value
        typer.echo(f"{mark} {finding.name:<11} {finding.text}")
        if finding.advice:
            typer.echo(f"  {'':<11} → {finding.advice}")
    if any(finding.verdict is Verdict.BAD for finding in findings):
        sys.exit(1)


def env(data_dir: DataDir = None) -> None:
    """Print the addresses of the running `headwater up` for a shell: eval "$(headwater env)".

    REDIS_URL, DATABASE_URL and HEADWATER_DATA_DIR, for redis-cli, psql, celery and the parts run by hand. They have the
    embedded Redis's password in them. For another terminal than that of `headwater up`: where REDIS_URL is set, `up`
    starts no Redis of its own.
    """
    settings = settings_of_running(data_dir=data_dir)
    note = read_note(settings.data_dir)
    if note is None:
        raise SettingsError(
            f"No `headwater up` runs on the data folder {settings.data_dir}. Start it, or name its folder: --data-dir."
        )
    found = {
        "REDIS_URL": note.redis_url,
        "DATABASE_URL": note.database_url,
        "HEADWATER_DATA_DIR": str(settings.data_dir),
    }
    for name, value in found.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def version() -> None:
    """Say the version of headwater and of what matters most under it."""
    from importlib.metadata import version as installed

    names = ("headwater", "celery", "fastapi", "redis", "sqlalchemy", "psycopg", "apsw")
    for name in names:
        typer.echo(f"{name:<11} {installed(name)}")
    typer.echo(f"{'python':<11} {sys.version.split()[0]}")
