"""`headwater up` as a person uses it: one command, real servers, one log, one end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import pytest_asyncio

from headwater.dev.services import Postgres, Redis
from headwater.dev.stack import GRACE
from headwater.settings import child_environment
from support.wait import eventually

#: Each test starts the whole system, some twice.
pytestmark = pytest.mark.timeout(600)

READY = re.compile(r"headwater is ready in .* s$", re.MULTILINE)
PAGE = re.compile(r"Page +(http://\S+)/")
#: A minute is for a machine that does other things; alone it takes a few seconds.
PATIENCE = 60.0


class Up:
    """A `headwater up` in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, **environment: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.data_dir = folder / "data"
        self.log_file = folder / "up.log"
        names = ("REDIS_URL", "DATABASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "HOST", "PORT")
        clean: dict[str, str | None] = dict.fromkeys(names)
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "headwater", "up", "--data-dir", str(self.data_dir), *arguments],
                env=child_environment(**{**clean, **environment}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=folder,
                # As from a terminal, also when the tests themselves run under nohup, which is inherited.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509  # one system call
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def url(self) -> str:
        found = PAGE.search(self.log)
        assert found, self.log
        return found[1]

    @property
    def note(self) -> dict[str, Any]:
        note: dict[str, Any] = json.loads((self.data_dir / "up.json").read_text())
        return note

    async def ready(self) -> None:
        def shown() -> bool:
            if self.process.poll() is not None:
                raise ChildProcessError(self.log)
            return READY.search(self.log) is not None

        await eventually(shown, PATIENCE, every=0.05)

    async def ended(self, timeout: float = PATIENCE) -> int:
        return await asyncio.to_thread(self.process.wait, timeout)

    def family(self) -> dict[int, str]:
        """Everything that works for its data folder, whatever became of its parents, by pid."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes()
                # Redis writes its title over its command and its environment, but it works in its folder.
                folder = str((entry / "cwd").readlink())
                named = f"HEADWATER_DATA_DIR={self.data_dir}".encode() in environment
                if named or str(self.data_dir) in command or folder.startswith(str(self.data_dir)):
                    found[int(entry.name)] = command
        found.pop(os.getpid(), None)
        return found

    def pid_of(self, part: str) -> int:
        """The process id of a headwater process, e.g. the worker."""
        pids = [pid for pid, command in self.family().items() if f"-m headwater {part} " in command]
        assert len(pids) == 1, self.family()
        return pids[0]

    def kill(self) -> None:
        for pid in (self.process.pid, *self.family()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def folder(servers_dir: Path) -> Path:
    """A folder that PostgreSQL can reach."""
    return servers_dir / "up" / uuid.uuid4().hex


@pytest_asyncio.fixture(scope="module")
async def up(servers_dir: Path) -> AsyncIterator[Up]:
    """One for the tests that leave it running."""
    running = Up(servers_dir / "up" / "shared", "--port", "0")
    try:
        await running.ready()
        yield running
    finally:
        running.kill()


async def ask(url: str, question: str) -> tuple[str, str]:
    """A question through the whole system. Returns the chat's id and the text that was streamed."""
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        chat = (await http.post("/api/chats", json={})).raise_for_status().json()["id"]
        reply = (await http.post(f"/api/chats/{chat}/messages", json={"content": question})).raise_for_status()
        assert reply.status_code == 202
        text, kinds = "", []
        async with http.stream("GET", f"/api/stream/{reply.json()['task_id']}") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    kinds.append(event["type"])
                    text += event["text"] if event["type"] == "content" else ""
        assert kinds[-1] == "done"
        return chat, text


async def messages(url: str, chat: str) -> list[tuple[str, str]]:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        document = (await http.get(f"/api/chats/{chat}")).raise_for_status().json()
    return [(message["role"], message["content"]) for message in document["messages"]]


async def test_it_answers_ends_within_ten_seconds_leaving_nothing_and_keeps_what_was_said(folder: Path) -> None:
    first = Up(folder, "--port", "0")
    try:
        await first.ready()
        assert "DEMO" in first.log
        assert "OPENAI_API_KEY" in first.log
        chat, text = await ask(first.url, "What is a headwater?")
        assert text
        family = first.family()
        first.process.send_signal(signal.SIGTERM)
        assert await first.ended() == 0
        # The promise is kept by what each part is given before it is killed, however slow the machine is.
        assert GRACE["server"] + max(GRACE["worker"], GRACE["beat"]) + GRACE["redis"] + GRACE["postgres"] < 10
        assert len(family) >= 5
        assert first.family() == {}
        assert not list(first.data_dir.glob("up.*"))
        assert "Traceback" not in first.log
    finally:
        first.kill()
    second = Up(folder, "--port", "0")
    try:
        await second.ready()
        assert await messages(second.url, chat) == [("user", "What is a headwater?"), ("assistant", text)]
    finally:
        second.kill()


async def test_parts_that_are_killed_are_said_and_started_again(up: Up) -> None:
    worker = up.pid_of("worker")
    assert re.search(rf"worker +│ ready \(process {worker}\)$", up.log, re.MULTILINE)
    assert re.search(rf"server +│ ready \(process {up.pid_of('server')}\)$", up.log, re.MULTILINE)
    assert "No worker runs" not in up.log
    os.kill(worker, signal.SIGKILL)
    await eventually(lambda: re.search(r"worker +│ was ended by SIGKILL; starting it again in 0.5 s", up.log), PATIENCE)
    await eventually(lambda: up.log.count(" ready.\n") == 2, PATIENCE)
    assert up.pid_of("worker") != worker
    os.kill(up.pid_of("server"), signal.SIGKILL)
    # The port stays open meanwhile: the question waits for the new server instead of being refused.
    _, text = await ask(up.url, "Are you back?")
    assert text
    redis = up.note["redis_url"]
    [redis_pid] = [pid for pid, command in up.family().items() if "valkey" in command or "redis-server" in command]
    os.kill(redis_pid, signal.SIGKILL)
    await eventually(lambda: re.search(r"redis +│ is back", up.log), PATIENCE)
    assert up.note["redis_url"] == redis
    await eventually(lambda: _answers(up.url), PATIENCE)


async def _answers(url: str) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
        return (await http.get("/readyz")).status_code == 200


async def test_nothing_outlives_a_killed_supervisor_and_a_second_signal_ends_the_next_at_once(folder: Path) -> None:
    first = Up(folder, "--port", "0")
    try:
        await first.ready()
        orphans = set(first.family())
        first.process.kill()
        first.process.wait()
        second = Up(folder, "--port", "0")
        await second.ready()
        assert orphans & set(second.family()) == set()
        assert len([command for command in second.family().values() if "-m headwater worker" in command]) == 1
        # Nothing listens any more, PostgreSQL's sessions neither: a polite end would take its full time.
        for pid in set(second.family()) - {second.process.pid}:
            os.kill(pid, signal.SIGSTOP)
        second.process.send_signal(signal.SIGINT)
        await eventually(lambda: "once more ends it at once" in second.log)
        second.process.send_signal(signal.SIGINT)
        assert await second.ended() == 0
        assert second.family() == {}
    finally:
        first.kill()


async def test_a_second_up_on_the_same_folder_names_the_first(up: Up) -> None:
    second = Up(up.data_dir.parent / "second", "--port", "0", "--data-dir", str(up.data_dir))
    try:
        assert await second.ended() == 1
        assert f"process {up.process.pid}" in second.log
        assert str(up.data_dir) in second.log
        assert "Traceback" not in second.log
    finally:
        if second.process.poll() is None:
            second.process.kill()
    assert await _answers(up.url)


async def test_a_port_that_is_taken_is_said_before_anything_starts(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        up = Up(folder, "--port", str(port))
        try:
            assert await up.ended() == 1
        finally:
            up.kill()
    assert f"Port {port} on 127.0.0.1 is taken" in up.log
    assert f"process {os.getpid()}" in up.log
    assert f"--port {port + 1}" in up.log
    assert "Traceback" not in up.log
    assert not up.data_dir.exists()


async def test_an_exposed_address_without_a_token_is_refused_with_the_reason(folder: Path) -> None:
    up = Up(folder, "--port", "0", "--host", "0.0.0.0")
    try:
        assert await up.ended() == 2
    finally:
        up.kill()
    assert "HEADWATER_ACCESS_TOKEN" in up.log
    assert not up.data_dir.exists()


async def test_a_part_that_cannot_start_ends_everything_with_its_last_words(folder: Path) -> None:
    # The journal's place is taken by a folder: the server refuses to start without it.
    (folder / "data" / "journal.db").mkdir(parents=True)
    up = Up(folder, "--port", "0")
    try:
        assert await up.ended() == 1
        assert "could not start" in up.log
        assert "journal" in up.log
        assert "Traceback" not in up.log.rpartition("could not start")[0].splitlines()[0]
        assert up.family() == {}
    finally:
        up.kill()


async def test_given_servers_are_used_and_none_is_started(
    folder: Path, postgres_server: Postgres, database_url: str
) -> None:
    redis = Redis(folder / "redis", options={"appendonly": "no"})
    redis.start()
    up = Up(folder, "--port", "0", "--no-beat", REDIS_URL=redis.url(), DATABASE_URL=database_url)
    try:
        await up.ready()
        commands = list(up.family().values())
        assert not any("postgres -D" in command or "valkey-server" in command for command in commands)
        assert not any("-m headwater beat" in command for command in commands)
        chat, _ = await ask(up.url, "Hello")
        with psycopg.connect(database_url) as connection:
            assert connection.execute("SELECT count(*) FROM chats WHERE id = %s", [chat]).fetchone() == (1,)
        up.process.send_signal(signal.SIGHUP)
        assert await up.ended() == 0
        assert redis.running
    finally:
        up.kill()
        redis.stop()


async def test_a_redis_that_does_not_answer_is_said_without_its_password(folder: Path) -> None:
    up = Up(folder, "--port", "0", REDIS_URL="redis://:geheim@127.0.0.1:1/0")
    try:
        assert await up.ended() == 1
        assert "127.0.0.1:1" in up.log
        assert "REDIS_URL" in up.log
        assert "geheim" not in up.log
        assert up.family() == {}
    finally:
        up.kill()
