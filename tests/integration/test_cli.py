"""The command line against real servers: words in, words and exit codes out."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from headwater.cli import main
from headwater.clock import SystemClock
from headwater.dev.place import Place
from headwater.dev.services import Postgres, free_port
from headwater.ids import new_id
from headwater.journal import Journal
from headwater.messages import Chat
from headwater.note import Note
from headwater.records import Record
from headwater.settings import child_environment
from headwater.telemetry import Telemetry
from support.own_redis import own_redis
from support.stack import Stack, StackMaker
from support.wait import eventually


class Command:
    """The command, with an environment in which nothing is set. Called, it runs in this process, in a thread:
    a new interpreter for every word would be most of the tests' time.
    """

    def __init__(self, folder: Path, **environment: str | None) -> None:
        self.folder = folder
        names = ("REDIS_URL", "DATABASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "HOST", "PORT", "DEBUG")
        clean: dict[str, str | None] = dict.fromkeys(names)
        self.environment = child_environment(**{**clean, "HEADWATER_DATA_DIR": str(folder / "data"), **environment})

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "headwater", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    async def __call__(self, *arguments: str, answer: str = "") -> tuple[int, str]:
        """Exit code and all output."""
        return await asyncio.to_thread(self._run, arguments, answer)

    def _run(self, arguments: tuple[str, ...], answer: str) -> tuple[int, str]:
        runner = CliRunner()
        environment = {**dict.fromkeys(child_environment()), **self.environment}
        with runner.isolation(input=answer, env=environment) as streams:
            try:
                main(arguments)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            return code, streams[2].getvalue().decode()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Without any server."""
    return Command(tmp_path)


@pytest.fixture
def with_servers(tmp_path: Path, redis_url: str, database_url: str) -> Command:
    return Command(tmp_path, REDIS_URL=redis_url, DATABASE_URL=database_url)


def of_stack(stack: Stack, folder: Path) -> Command:
    return Command(folder, REDIS_URL=stack.redis_url, DATABASE_URL=stack.database_url)


async def ask(stack: Stack, question: str) -> str:
    """Send a message. Returns the run's id."""
    async with stack.client() as http:
        chat = (await http.post("/api/chats", json={})).raise_for_status().json()["id"]
        reply = await http.post(f"/api/chats/{chat}/messages", json={"content": question})
        return str(reply.raise_for_status().json()["task_id"])


def insert_chat(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO chats (id, owner_id, title, created_at, updated_at, version) "
            "VALUES (%s, 'local', 't', now(), now(), 1)",
            ["01890000-0000-7000-8000-000000000001"],
        )


def count_chats(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM chats").fetchone()
    assert row is not None
    return int(row[0])


async def test_version_names_headwater_and_python(command: Command) -> None:
    code, output = await command("version")
    assert code == 0
    assert re.search(r"^headwater +\d+\.\d+", output, re.MULTILINE)
    assert f"python      {sys.version.split()[0]}" in output


@pytest.mark.parametrize("part", ["server", "worker", "beat"])
async def test_a_part_without_its_servers_says_which_setting_is_missing(command: Command, part: str) -> None:
    code, output = await command(part)
    assert code == 2
    assert output.startswith("REDIS_URL is not set.")
    assert "Traceback" not in output


async def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    code, output = await Command(tmp_path, DEBUG="1")("worker")
    assert code == 2
    assert "Traceback" in output
    assert output.rstrip().splitlines()[-1].startswith("REDIS_URL is not set.")


async def test_a_setting_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    code, output = await Command(tmp_path, PORT="http")("doctor")
    assert code == 2
    assert "PORT" in output
    assert "Traceback" not in output


async def test_an_exposed_server_without_a_token_is_refused(tmp_path: Path) -> None:
    command = Command(tmp_path, REDIS_URL="redis://127.0.0.1:1", DATABASE_URL="postgresql://127.0.0.1:1/x")
    code, output = await command("server", "--host", "0.0.0.0")
    assert code == 2
    assert "HEADWATER_ACCESS_TOKEN" in output


async def test_a_worker_of_a_queue_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    command = Command(tmp_path, REDIS_URL="redis://127.0.0.1:1", DATABASE_URL="postgresql://127.0.0.1:1/x")
    code, output = await command("worker", "--queues", "chat,job")
    assert code == 2
    assert output.startswith("No queue is named 'job'. --queues takes chat, jobs, maintenance")


async def test_a_server_that_cannot_start_exits_with_1(tmp_path: Path) -> None:
    command = Command(tmp_path, REDIS_URL="redis://127.0.0.1:1", DATABASE_URL="postgresql://127.0.0.1:1/x")
    (tmp_path / "data").write_text("in the place of the folder")

    def run() -> tuple[int, str]:
        with command.popen("server", "--port", "0") as process:
            output, _ = process.communicate(timeout=60)
            return process.returncode, output

    code, output = await asyncio.to_thread(run)
    assert (code, "headwater cannot start: " in output) == (1, True), output


async def test_a_redis_that_wants_a_password_is_said_to_refuse(tmp_path: Path) -> None:
    with own_redis(tmp_path, password="hush") as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        code, output = await Command(tmp_path, REDIS_URL=url)("monitor", "celery", "list")
    assert code == 1
    assert re.match(r"Redis at 127\.0\.0\.1:\d+/0 refuses: ", output), output
    assert output.endswith("Check REDIS_URL.\n")


async def test_db_init_makes_the_database_and_upgrade_finds_nothing_left_to_do(
    tmp_path: Path, postgres_server: Postgres
) -> None:
    command = Command(tmp_path, DATABASE_URL=postgres_server.url("made_by_init"))
    code, output = await command("db", "upgrade")
    assert code == 1
    assert "made_by_init" in output
    code, output = await command("db", "init")
    assert (code, "ready" in output) == (0, True), output
    assert count_chats(postgres_server.url("made_by_init")) == 0
    code, output = await command("db", "upgrade")
    assert (code, "already" in output) == (0, True), output


@pytest.mark.parametrize("verb", ["clear", "reset"])
async def test_what_destroys_asks_first_and_takes_yes(with_servers: Command, database_url: str, verb: str) -> None:
    insert_chat(database_url)
    code, output = await with_servers("db", verb, answer="n\n")
    assert code == 1
    assert "cannot be undone" in output
    assert count_chats(database_url) == 1
    # No terminal, no answer: nothing is destroyed.
    code, _ = await with_servers("db", verb)
    assert code == 1
    assert count_chats(database_url) == 1
    code, _ = await with_servers("db", verb, answer="y\n")
    assert code == 0
    assert count_chats(database_url) == 0
    insert_chat(database_url)
    code, _ = await with_servers("db", verb, "--yes")
    assert code == 0
    assert count_chats(database_url) == 0


async def test_looking_for_a_journal_makes_none(with_servers: Command) -> None:
    for verb in ("status", "sync", "retry", "salvage"):
        code, output = await with_servers("journal", verb)
        assert (code, "There is no journal" in output) == (2, True), output
    assert not (with_servers.folder / "data").exists()


async def test_journal_status_and_sync_on_an_empty_journal(with_servers: Command) -> None:
    await fill(with_servers.folder / "data" / "journal.db", 0)
    code, output = await with_servers("journal", "status")
    assert code == 0
    assert "Waiting    0 records" in output
    code, output = await with_servers("journal", "sync")
    assert code == 0
    assert output.startswith("0 records were handed over")


async def test_a_damaged_journal_is_explained_and_salvaged_when_told_so(with_servers: Command) -> None:
    file = with_servers.folder / "data" / "journal.db"
    await fill(file, 0)
    assert await with_servers("journal", "salvage") == (
        0,
        f"The journal {file} is well; there is nothing to salvage.\n",
    )
    await fill(file)
    content = file.read_bytes()
    # One of the pages that hold rows.
    page = content.index(b"x" * 200) // 4096 * 4096
    damaged = content[:page] + b"\xff" * 4096 + content[page + 4096 :]
    file.write_bytes(damaged)
    code, output = await with_servers("journal", "status")
    assert (code, "headwater journal salvage" in output) == (1, True), output
    code, _ = await with_servers("journal", "salvage", answer="n\n")
    assert code == 1
    assert file.read_bytes() == damaged
    code, output = await with_servers("journal", "salvage", "--yes")
    assert code == 0, output
    assert "for PostgreSQL" in output
    code, output = await with_servers("journal", "status")
    assert code == 0, output
    assert [path.read_bytes() for path in file.parent.glob("journal.db.damaged-*[0-9]")] == [damaged]


async def fill(file: Path, records: int = 50) -> None:
    journal = Journal(file, clock=SystemClock(), telemetry=Telemetry())
    await journal.open()
    for number in range(records):
        await journal.add([Record.of(Chat(new_id(), "local", number, number, title="x" * 200))])
    await journal.close()


async def test_doctor_finds_a_whole_system_well(with_servers: Command) -> None:
    async def quick() -> str:
        # On a busy machine a round trip may be slow enough to be told of.
        code, output = await with_servers("doctor")
        assert code == 0, output
        assert re.search(r"^✔ PostgreSQL +version 18", output, re.MULTILINE), output
        return output

    output = await eventually(quick)
    assert "✘" not in output
    # The tests' Redis keeps no file, which deserves a look and no more.
    assert re.search(r"^! Redis .*append-only", output, re.MULTILINE)
    assert re.search(r"^! Model ", output, re.MULTILINE)


async def test_doctor_exits_with_1_and_says_what_to_do_when_something_is_broken(
    tmp_path: Path, redis_url: str, postgres_server: Postgres
) -> None:
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE without_schema")
    command = Command(tmp_path, REDIS_URL=redis_url, DATABASE_URL=postgres_server.url("without_schema"))
    code, output = await command("doctor")
    assert code == 1
    assert re.search(r"^✘ PostgreSQL +schema is missing.*\n.*headwater db upgrade", output, re.MULTILINE)


async def test_commands_find_the_servers_of_a_running_up_in_the_data_folder(
    tmp_path: Path, redis_url: str, database_url: str
) -> None:
    command = Command(tmp_path)
    code, output = await command("db", "upgrade")
    assert (code, "DATABASE_URL is not set" in output) == (2, True)
    place = Place.hold(tmp_path / "data")
    try:
        place.write_note(Note(pid=1, url="http://127.0.0.1:1", redis_url=redis_url, database_url=database_url))
        code, output = await command("db", "upgrade")
        assert (code, "already" in output) == (0, True), output
    finally:
        place.release()
    code, _ = await command("db", "upgrade")
    assert code == 2


async def test_monitor_redis_shows_the_events_of_a_run(stack: Stack, tmp_path: Path) -> None:
    with of_stack(stack, tmp_path).popen("monitor", "redis") as process:
        assert process.stdout is not None
        try:
            first = await asyncio.to_thread(process.stdout.readline)
            assert "following stream:*" in first
            run_id = await ask(stack, "[[scenario:hello]] monitored")
            lines = ""
            # Other runs of this stack may end meanwhile.
            while not re.search(rf"{run_id}.* done", lines):
                lines += await asyncio.to_thread(process.stdout.readline)
        finally:
            process.kill()
    assert f"stream:{{{run_id}}}" in lines
    assert "Hello" in lines


async def test_monitor_celery_lists_workers_and_runs_and_follows_one_to_its_end(stack: Stack, tmp_path: Path) -> None:
    command = of_stack(stack, tmp_path)
    run_id = await ask(stack, "[[scenario:hello]] listed")
    code, output = await command("monitor", "celery", run_id)
    assert code == 0, output
    assert re.search(r"done, chat, \d+ events.*Celery: ", output.splitlines()[-1])

    async def celery_knows() -> bool:
        # It hears of a run's end after the log.
        _, output = await command("monitor", "celery", run_id)
        return "Celery: SUCCESS" in output

    await eventually(celery_knows)

    async def listed() -> str:
        code, output = await command("monitor", "celery", "list")
        assert code == 0
        # A worker on a busy machine may answer too late.
        assert re.search(r"^Workers\n +worker1@", output, re.MULTILINE), output
        return output

    output = await eventually(listed)
    assert re.search(rf"^ +{run_id} +done, chat", output, re.MULTILINE)


async def test_monitor_celery_says_that_a_task_is_unknown(stack: Stack, tmp_path: Path) -> None:
    code, output = await of_stack(stack, tmp_path)("monitor", "celery", "01890000-0000-7000-8000-00000000dead")
    assert code == 1
    assert "unknown" in output


async def test_journal_sync_brings_what_was_kept_while_postgres_was_away(stack: Stack, tmp_path: Path) -> None:
    """The stack's own journal: everything that was said is in PostgreSQL, and status says so."""
    run_id = await ask(stack, "[[scenario:hello]] kept")
    # Until its end, after which nothing more is written.
    assert (await of_stack(stack, tmp_path)("monitor", "celery", run_id))[0] == 0
    command = Command(tmp_path, DATABASE_URL=stack.database_url, HEADWATER_DATA_DIR=str(stack.folder / "data"))

    async def nothing_waits() -> bool:
        code, output = await command("journal", "status")
        return code == 0 and "Waiting    0 records" in output

    await eventually(nothing_waits)
    assert json.dumps(await command("journal", "sync")).startswith('[0, "0 records')


async def test_what_was_set_aside_is_shown_with_the_reason_and_brought_back(
    with_servers: Command, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    journal = Journal(tmp_path / "data" / "journal.db", clock=SystemClock(), telemetry=Telemetry())
    await journal.open()
    chat = Record.of(Chat(new_id(), "local", 1, 1))
    await journal.add([chat])
    await journal.set_aside(1, "the disk of the index was away")
    await journal.close()
    code, output = await with_servers("journal", "status")
    assert code == 0
    assert "Set aside  1 records" in output
    assert f"chat {chat.id}, tried 1×: the disk of the index was away" in output
    assert "headwater journal retry" in output
    code, output = await with_servers("journal", "sync")
    assert (code, output.strip()) == (0, "0 records were handed over; 0 wait, 1 are set aside.")
    code, output = await with_servers("journal", "retry")
    assert (code, output.strip()) == (0, "1 records were handed over; 0 wait, 0 are set aside.")
    assert count_chats(database_url) == 1


@pytest.mark.parametrize("verb", ["clear", "reset"])
async def test_what_was_deleted_is_gone_from_postgres_the_journal_and_redis(
    make_stack: StackMaker, tmp_path: Path, verb: str
) -> None:
    stack = await make_stack()
    run_id = await ask(stack, "[[scenario:hello]] forget me")
    data = stack.folder / "data"
    command = Command(
        tmp_path, REDIS_URL=stack.redis_url, DATABASE_URL=stack.database_url, HEADWATER_DATA_DIR=str(data)
    )
    code, _ = await command("monitor", "celery", run_id)
    assert code == 0
    async with stack.client() as http:
        assert (await http.get(f"/api/stream/{run_id}")).status_code == 200
        assert await kept(data) > 0
        code, output = await command("db", verb, "--yes")
        assert code == 0, output
        assert [line.partition(":")[0] for line in output.splitlines()] == ["Journal", "PostgreSQL", "Redis"]
        assert "the logs of 1 runs" in output
        assert (await http.get("/api/chats")).json()["items"] == []
        # Nobody knows it any more; that it was here and not elsewhere is forgotten as well.
        assert (await http.get(f"/api/task/{run_id}")).json()["code"] == "not_known_yet"
    assert await kept(data) == 0
    assert count_chats(stack.database_url) == 0


async def kept(data: Path) -> int:
    """Chats in a journal, in PostgreSQL already or not."""
    journal = Journal(data / "journal.db", clock=SystemClock(), telemetry=Telemetry())
    await journal.open()
    try:
        return len(await journal.kept_chats("local"))
    finally:
        await journal.close()


async def test_what_remains_in_redis_is_said_when_everything_else_is_deleted(tmp_path: Path, database_url: str) -> None:
    insert_chat(database_url)
    code, output = await Command(tmp_path, DATABASE_URL=database_url)("db", "clear", "--yes")
    assert (code, "REDIS_URL is not set" in output) == (0, True), output
    away = Command(tmp_path, DATABASE_URL=database_url, REDIS_URL=f"redis://:hush@127.0.0.1:{free_port()}/0")
    code, output = await away("db", "clear", "--yes")
    assert (code, "the logs of runs remain" in output, "hush" in output) == (1, True, False), output
    assert count_chats(database_url) == 0


async def test_nothing_is_deleted_while_postgres_is_away(tmp_path: Path, redis_url: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    await fill(data / "journal.db")
    url = f"postgresql://postgres@127.0.0.1:{free_port()}/x"
    code, _ = await Command(tmp_path, DATABASE_URL=url, REDIS_URL=redis_url)("db", "clear", "--yes")
    assert code == 1
    assert await kept(data) == 50


async def test_env_prints_the_addresses_of_the_running_up_for_a_shell(tmp_path: Path) -> None:
    command = Command(tmp_path)
    code, output = await command("env")
    assert (code, "No `headwater up` runs" in output) == (2, True), output
    place = Place.hold(tmp_path / "data")
    addresses = ("redis://:pa$$word@127.0.0.1:1/0", "postgresql://postgres@/headwater?host=/a folder&x=1")
    try:
        place.write_note(Note(1, "http://127.0.0.1:1", *addresses))
        code, output = await command("env")
    finally:
        place.release()
    assert code == 0
    shown = await asyncio.to_thread(
        subprocess.check_output,
        ["sh", "-c", f'{output}\nprintf "%s\\n" "$REDIS_URL" "$DATABASE_URL" "$HEADWATER_DATA_DIR"'],
        text=True,
    )
    assert shown.splitlines() == [*addresses, str(tmp_path / "data")]


async def test_celerys_own_command_finds_the_running_up_and_else_says_a_sentence(stack: Stack, tmp_path: Path) -> None:
    command = Command(tmp_path)
    # By name: its answer ends the wait.
    asked = ["--timeout", "60", "--destination", f"worker1@{socket.gethostname()}"]
    celery = [sys.executable, "-m", "celery", "-A", "headwater.worker", "inspect", *asked, "ping"]

    def run() -> tuple[int, str]:
        ended = subprocess.run(
            celery,
            env=command.environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )
        return ended.returncode, ended.stdout

    code, output = await asyncio.to_thread(run)
    assert code == 1
    assert output.startswith("REDIS_URL is not set.")
    assert "Traceback" not in output
    place = Place.hold(tmp_path / "data")
    try:
        place.write_note(Note(1, stack.base_url, stack.redis_url, stack.database_url))
        code, output = await asyncio.to_thread(run)
    finally:
        place.release()
    assert (code, "pong" in output) == (0, True), output


@pytest.mark.parametrize("words", [("server",), ("worker",), ("doctor",), ("monitor", "celery", "list")])
async def test_a_redis_url_that_is_none_is_said_without_its_password(tmp_path: Path, words: tuple[str, ...]) -> None:
    command = Command(tmp_path, REDIS_URL="foo:hush", DATABASE_URL="postgresql://127.0.0.1:1/x")
    code, output = await command(*words)
    assert code == 2
    assert "REDIS_URL" in output
    assert "redis://" in output
    assert "hush" not in output
    assert "Traceback" not in output


async def test_monitor_celery_without_redis_says_so_in_a_sentence(tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    code, output = await Command(tmp_path, REDIS_URL=url, DATABASE_URL="postgresql://127.0.0.1:1/x")(
        "monitor", "celery", "list"
    )
    assert code == 1
    assert output.startswith("Redis at 127.0.0.1:")


async def test_doctor_names_the_address_of_the_running_up(tmp_path: Path, redis_url: str, database_url: str) -> None:
    command = Command(tmp_path, REDIS_URL=redis_url, DATABASE_URL=database_url)
    place = Place.hold(tmp_path / "data")
    try:
        place.write_note(Note(1, "http://127.0.0.1:5097", redis_url, database_url))
        _, output = await command("doctor")
    finally:
        place.release()
    assert re.search(r"^✔ Settings +`headwater up` answers at http://127.0.0.1:5097", output, re.MULTILINE)
    assert ":5000" not in output
