"""Commands that run something: everything, or one part."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import warnings
from typing import Annotated, Any

import typer

from headwater.cli.shared import DataDir, Parent, adopt, coloured, settings_with, start_logging
from headwater.errors import SettingsError
from headwater.settings import Settings, child_environment

Host = Annotated[str | None, typer.Option("--host", help="Address to bind. [HOST, 127.0.0.1]")]
Port = Annotated[int | None, typer.Option("--port", help="Port to bind; 0 takes a free one. [PORT, 5000]")]


def register(app: typer.Typer) -> None:
    for command in (up, server, worker, beat):
        app.command()(command)


def up(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    beat: Annotated[bool, typer.Option(help="Run the periodic catch-up and clean-up job.")] = True,
) -> None:
    """Start everything on this machine and stay until Ctrl-C.

    PostgreSQL, Redis, the worker, the periodic jobs and the web server, in one log. A part that dies is started
    again. With DATABASE_URL or REDIS_URL set, that server is used and none is started in its place. Ctrl-C ends
    everything within ten seconds; a second one at once. The data stays in the data folder.
    """
    from headwater.clock import SystemClock
    from headwater.dev.console import Console
    from headwater.dev.stack import Stack

    settings = settings_with(host=host, port=port, data_dir=data_dir)
    console = Console(SystemClock(), colour=coloured(settings, sys.stdout))
    asyncio.run(Stack(settings, console, beat=beat).run())


def server(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", help="Processes on the one port. [HEADWATER_SERVER_WORKERS, 1]")
    ] = None,
    fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    process: Annotated[str, typer.Option(hidden=True)] = "",
    parent: Parent = None,
) -> None:
    """Run the web server alone: the page, the API and the streams.

    Needs REDIS_URL and DATABASE_URL. An address other than loopback needs HEADWATER_ACCESS_TOKEN. SIGTERM drains it:
    open streams are told to reconnect, and it ends within five seconds. DEBUG=1 logs every request. With
    several processes the kernel spreads connections over them, one that dies is started again, and each counts its
    own metrics. Start more of them behind a proxy to scale further.
    """
    from headwater.dev.ports import listen

    adopt(parent)
    settings = settings_with(host=host, port=port, data_dir=data_dir, server_workers=workers)
    settings.check_exposed()
    settings.need_redis()
    settings.need_database()
    start_logging(settings, parent)
    if fd is None and settings.server_workers > 1:
        _servers(settings)
        return
    listener = listen(settings.host, settings.port) if fd is None else socket.socket(fileno=fd)

    from headwater.api.app import create_app
    from headwater.api.server import Server, configure
    from headwater.threads import take_turns

    take_turns()
    application = create_app(settings, process)
    address, bound = listener.getsockname()[:2]
    logging.getLogger("headwater.server").info("listening on %s port %d", address, bound)
    Server(configure(application, settings), application).run(sockets=[listener])


def _servers(settings: Settings) -> None:
    """Several server processes, and this one to watch over them."""
    from headwater.clock import SystemClock
    from headwater.dev.console import Console
    from headwater.dev.group import Group
    from headwater.dev.part import server_programs
    from headwater.dev.ports import listen_each

    listeners = listen_each(settings.host, settings.port, settings.server_workers)
    console = Console(SystemClock(), colour=coloured(settings, sys.stderr), stream=sys.stderr)
    environment = child_environment(HOST=settings.host, HEADWATER_DATA_DIR=str(settings.data_dir))
    address, bound = listeners[0].getsockname()[:2]
    console.say("server", f"listening on {address} port {bound} with {len(listeners)} processes")
    asyncio.run(Group(server_programs(listeners, environment, console), console).run())


def worker(
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", help="Runs at once. [HEADWATER_WORKER_CONCURRENCY]")
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", "-P", help="asyncio, prefork, threads or solo. [HEADWATER_WORKER_POOL]")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Worker processes. [HEADWATER_WORKER_PROCESSES, 1]")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Its name among several, e.g. blue@%h.")] = None,
    queues: Annotated[
        str | None, typer.Option("--queues", "-Q", help="Take from these only: chat, jobs, maintenance.")
    ] = None,
    parent: Parent = None,
) -> None:
    """Run a worker alone: it takes runs from Redis and answers them.

    Needs REDIS_URL and DATABASE_URL. Start as many as you like, on as many machines; each run goes to one of them.
    SIGTERM hands what it is answering to another worker. With --processes, several under a supervisor that starts a
    dead one again, each with a number in its name. Celery's own command, celery -A headwater.worker worker,
    starts a worker for the same tasks, with the pool that Celery is told.
    """
    adopt(parent)
    settings = settings_with(worker_concurrency=concurrency, worker_pool=pool, worker_processes=processes)
    settings.need_redis()
    settings.need_database()
    _check_queues(queues)
    if settings.worker_processes > 1:
        _workers(settings, name, queues)
        return
    start_logging(settings, parent)
    from headwater.worker.celery_app import create_app

    app = create_app(settings)
    # Celery's option takes the names of its own pools only, its configuration any class.
    app.conf.worker_pool = (
        "headwater.worker.pool:AsyncPool" if settings.worker_pool == "asyncio" else settings.worker_pool
    )
    arguments = ["worker", f"--concurrency={settings.concurrency}"]
    # The workers need not know each other, and asking around delays each start by a second.
    arguments += ["--without-mingle", "--without-gossip"]
    # JSON is all it accepts, and a container or a root shell is the user's own choice.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    if name:
        arguments.append(f"--hostname={name}")
    if queues:
        arguments.append(f"--queues={queues}")
    _celery(app, settings, arguments)


def _check_queues(queues: str | None) -> None:
    """A worker of a queue that nobody sends to would wait for ever. Raises SettingsError."""
    from headwater.queue import QUEUES

    unknown = [name for name in queues.split(",") if name not in QUEUES] if queues else []
    if unknown:
        raise SettingsError(
            f"No queue is named {' or '.join(map(repr, unknown))}. --queues takes {', '.join(QUEUES)}, "
            "several with a comma and no space between."
        )


def _workers(settings: Settings, name: str | None, queues: str | None) -> None:
    """Several worker processes, and this one to watch over them."""
    from headwater.clock import SystemClock
    from headwater.dev.console import Console
    from headwater.dev.group import Group
    from headwater.dev.part import worker_programs

    console = Console(SystemClock(), colour=coloured(settings, sys.stderr), stream=sys.stderr)
    environment = child_environment(
        HEADWATER_WORKER_POOL=settings.worker_pool, HEADWATER_WORKER_CONCURRENCY=str(settings.concurrency)
    )
    # A worker hands its runs over at once; the rest is closing.
    options = ["--queues", queues] if queues else []
    programs = worker_programs(settings, environment, console, name or "worker@%h", options)
    asyncio.run(Group(programs, console, grace=8.0).run())


def beat(parent: Parent = None) -> None:
    """Run the clock alone: it starts the periodic job that catches up with PostgreSQL and clears the journal.

    Needs REDIS_URL. One per installation is enough; a second one does no harm.
    """
    adopt(parent)
    settings = settings_with()
    settings.need_redis()
    start_logging(settings, parent)
    from headwater.queue import make_celery

    _celery(make_celery(settings), settings, ["beat", "--pidfile="])


def _celery(app: Any, settings: Settings, arguments: list[str]) -> None:
    from headwater.queue import run_command

    # --quiet leaves out Celery's banner, not its log.
    sys.exit(run_command(app, ["--quiet", *arguments, f"--loglevel={'DEBUG' if settings.debug else 'INFO'}"]))
