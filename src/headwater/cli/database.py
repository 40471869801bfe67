"""Commands for what is kept: PostgreSQL's schema and rows, and the journal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import typer

from headwater.cli.shared import DataDir, Yes
from headwater.errors import LogUnavailable, SettingsError
from headwater.note import settings_of_running
from headwater.settings import Settings

if TYPE_CHECKING:
    from headwater.journal import Journal

#: Records set aside that `status` lists.
SHOWN: Final = 10

db = typer.Typer(
    help="PostgreSQL: make, change, empty. DATABASE_URL says which; without it, that of the running `headwater up`.",
    no_args_is_help=True,
)
journal = typer.Typer(
    help="The journal: what is kept on this machine's disk until PostgreSQL has it.", no_args_is_help=True
)


@db.command("init")
def init(data_dir: DataDir = None) -> None:
    """Make the database unless it exists, and bring its schema to the newest version."""
    from headwater.store import migrate

    url = _settings(data_dir).need_database()
    migrate.init(url)
    typer.echo(f"The database is ready, its schema at {migrate.head()}.")


@db.command("upgrade")
def upgrade(data_dir: DataDir = None) -> None:
    """Bring the schema to the newest version. Data stays. Harmless when it is there already."""
    from headwater.store import migrate

    url = _settings(data_dir).need_database()
    before = migrate.current(url)
    migrate.upgrade(url)
    after = migrate.head()
    typer.echo(f"The schema is at {after} already." if before == after else f"The schema is at {after} now.")


@db.command("clear")
def clear(yes: Yes = False, data_dir: DataDir = None) -> None:
    """Delete every chat, message and run: in PostgreSQL, in this machine's journal and in Redis. Cannot be undone.

    The schema stays. Stop servers and workers first, or wait until nothing runs: an answer under way is written again.
    """
    from headwater.store import migrate

    settings = _settings(data_dir)
    url = settings.need_database()
    _ask(yes, "Delete every chat, message and run in PostgreSQL, the journal and Redis? This cannot be undone.")
    _delete_all(settings, lambda: migrate.clear(url), "PostgreSQL: every row is deleted.")


@db.command("reset")
def reset(yes: Yes = False, data_dir: DataDir = None) -> None:
    """Drop headwater's tables and make them again, empty, and empty journal and Redis. Cannot be undone.

    For a schema that cannot be upgraded. Stop servers and workers first.
    """
    from headwater.store import migrate

    settings = _settings(data_dir)
    url = settings.need_database()
    _ask(yes, "Drop headwater's tables, and delete what the journal and Redis hold? This cannot be undone.")
    _delete_all(settings, lambda: migrate.reset(url), f"PostgreSQL: the tables are made anew, at {migrate.head()}.")


def _delete_all(settings: Settings, empty_postgres: Callable[[], None], told: str) -> None:
    """Journal, PostgreSQL, Redis; a line about each. Raises when one of them was not emptied."""
    from headwater.queue import CHAT_QUEUE, JOBS_QUEUE, lists_of
    from headwater.store.probe import postgres_facts
    from headwater.streams.clear import clear as clear_redis

    # Nothing is deleted anywhere while PostgreSQL, the master, is away.
    postgres_facts(settings.need_database())

    async def empty_journal() -> int:
        async with _opened(settings) as opened:
            return await opened.clear()

    # The journal first: what waits in it would be brought to the empty PostgreSQL.
    count = asyncio.run(empty_journal()) if settings.journal_file.exists() else 0
    typer.echo(f"Journal: {count} records are deleted ({settings.journal_file}).")
    empty_postgres()
    typer.echo(told)
    if not settings.redis_url:
        typer.echo(
            "Redis: REDIS_URL is not set, so nothing is deleted there. What a Redis holds stays readable until it "
            f"expires, {settings.stream_ttl} s after the end of each run."
        )
        return
    try:
        runs = asyncio.run(clear_redis(settings.redis_url, lists_of(CHAT_QUEUE, JOBS_QUEUE)))
    except LogUnavailable as error:
        raise LogUnavailable(
            f"Redis: nothing is deleted there, and the logs of runs remain. {error} Then run this again."
        ) from None
    typer.echo(f"Redis: the logs of {runs} runs are deleted, with what was queued.")


@journal.command("status")
def status(data_dir: DataDir = None) -> None:
    """Say how much waits for PostgreSQL, since when, and what PostgreSQL does not take, with the reasons."""
    settings = _settings(data_dir)

    async def ask() -> None:
        async with _opened(settings) as opened:
            backlog = await opened.backlog()
            aside = await opened.aside(SHOWN)
        age = f", the oldest for {backlog.oldest_ms / 1000:.0f} s" if backlog.oldest_ms is not None else ""
        typer.echo(f"Journal    {settings.journal_file}")
        typer.echo(f"Waiting    {backlog.count} records{age}")
        typer.echo(f"Set aside  {backlog.poison} records that PostgreSQL does not take")
        for entry in aside:
            typer.echo(f"           {entry.record.kind} {entry.record.id}, tried {entry.tries}×: {entry.poison}")
        if backlog.poison:
            typer.echo(
                "           Nothing is lost. When the reason is gone, `headwater journal retry` brings them back."
            )

    asyncio.run(ask())


@journal.command("sync")
def sync(data_dir: DataDir = None) -> None:
    """Hand to PostgreSQL now what waits in the journal. Harmless while servers and workers run."""
    _sync(_settings(data_dir), retry=False)


@journal.command("retry")
def retry(data_dir: DataDir = None) -> None:
    """Hand to PostgreSQL now what waits and what was set aside. Harmless while servers and workers run."""
    _sync(_settings(data_dir), retry=True)


def _sync(settings: Settings, *, retry: bool) -> None:
    url = settings.need_database()

    async def work() -> None:
        from headwater.clock import SystemClock
        from headwater.store import Store
        from headwater.syncer import Syncer
        from headwater.telemetry import Telemetry

        telemetry = Telemetry()
        store = Store(url, pool_size=1, wait=10.0, clock=SystemClock())
        try:
            async with _opened(settings) as opened:
                syncer = Syncer(opened, store, telemetry=telemetry, clock=SystemClock())
                if retry:
                    await opened.put_back()
                count = await syncer.sync()
                left = await opened.backlog()
        finally:
            await store.close()
        typer.echo(f"{count} records were handed over; {left.count} wait, {left.poison} are set aside.")

    asyncio.run(work())


@journal.command("salvage")
def salvage(yes: Yes = False, data_dir: DataDir = None) -> None:
    """Copy what can be read of a damaged journal into a new file. The damaged one is kept beside it.

    Stop every server and worker on it first. A journal that is well is left alone.
    """
    settings = _settings(data_dir)

    async def well() -> bool:
        from headwater.errors import JournalDamaged

        try:
            async with _opened(settings):
                return True
        except JournalDamaged as error:
            typer.echo(str(error))
            return False

    if asyncio.run(well()):
        typer.echo(f"The journal {settings.journal_file} is well; there is nothing to salvage.")
        return
    _ask(yes, "Copy what can be read into a new journal, and keep the damaged file beside it?")
    from headwater.clock import SystemClock
    from headwater.journal.salvage import salvage as rescue

    done = rescue(settings.journal_file, str(SystemClock().now_ms()))
    typer.echo(
        f"{done.records} records are saved, {done.waiting} of them for PostgreSQL; {done.missing} positions hold none "
        f"that can be read. The damaged file is {done.aside}."
    )
    if done.broken:
        typer.echo(f"Left out, as they are not whole: the records at {', '.join(map(str, done.broken))}.")


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Journal]:
    """The journal, for the length of a block. Raises SettingsError when there is none."""
    from headwater.clock import SystemClock
    from headwater.journal import Journal
    from headwater.telemetry import Telemetry

    path = settings.journal_file
    if not path.exists():
        # Opening would make it, perhaps in the wrong place and owned by the wrong user.
        raise SettingsError(
            f"There is no journal {path}: nothing was accepted there yet, or it is elsewhere. "
            "Name its data folder: --data-dir or HEADWATER_DATA_DIR."
        )
    journal = Journal(path, clock=SystemClock(), telemetry=Telemetry())
    await journal.open()
    try:
        yield journal
    finally:
        await journal.close()


def _settings(data_dir: DataDir) -> Settings:
    return settings_of_running(data_dir=data_dir)


def _ask(yes: bool, question: str) -> None:
    if not yes:
        typer.confirm(question, abort=True)
