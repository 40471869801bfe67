"""`headwater server --workers 3`: one address, three processes, watched over by a fourth."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator

import httpx
import pytest

from headwater.clock import SystemClock
from headwater.dev.child import alive
from headwater.dev.console import Console
from headwater.dev.part import PartFailed, Program
from headwater.dev.ports import PortTaken, leave_out, listen, listen_each
from headwater.ids import new_id
from support.openai_scenarios import Scenario, Step, chunk
from support.openai_server import OpenAIServer
from support.reader import Reader, ask, row_of
from support.stack import Stack, StackMaker
from support.wait import eventually


def ready(stack: Stack) -> dict[str, int]:
    """The processes that have been ready, by their number; the newest of each."""
    return {
        number: int(pid) for number, pid in re.findall(r"server-(\d) +│ ready \(process (\d+)\)", stack.server.log())
    }


async def readers_of(stack: Stack) -> dict[str, int]:
    """Open streams of the processes that named themselves in their metrics, over some connections of one's own each."""
    found: dict[str, int] = {}
    for _ in range(20):
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                text = (await http.get(f"{stack.base_url}/metrics", timeout=30)).text
            except httpx.TransportError:
                continue
        # Every series of an answer is of the one process that gave it.
        (name,) = {*re.findall(r'process="(\d)"', text)}
        assert len(re.findall(r"^headwater_\S+ ", text, re.MULTILINE)) == text.count('process="')
        counts = re.findall(r"^headwater_readers\{.*\} (\S+)$", text, re.MULTILINE)
        found[name] = sum(int(float(count)) for count in counts)
    return found


async def test_several_server_processes_share_an_address_and_end_as_one(
    make_stack: StackMaker, openai_server: OpenAIServer
) -> None:
    stack = await make_stack(settings={"HEADWATER_SERVER_WORKERS": "3"})
    await eventually(lambda: len(ready(stack)) == 3, 60)
    first = ready(stack)
    name = f"half-{new_id()}"
    halves: list[Step] = [{"chunk": chunk("One half, ")}, {"wait": name}, {"chunk": chunk("the other.")}]
    openai_server.scenarios[name] = Scenario([*halves, {"chunk": chunk(finish="stop")}])
    async with stack.client() as http:
        accepted = await ask(http, f"Go on. [[scenario:{name}]]")
    readers = [Reader(stack.base_url, accepted["task_id"]) for _ in range(12)]
    reading = [asyncio.create_task(reader.read()) for reader in readers]
    streams: dict[str, int] = {}

    async def all_read() -> bool:
        streams.update(await readers_of(stack))
        return set(streams) == {"1", "2", "3"} and sum(streams.values()) == len(readers)

    await eventually(all_read, 90)
    await eventually(lambda: [reader.text for reader in readers] == ["One half, "] * len(readers))
    # One that dies takes its connections along, and nothing else; another takes its place.
    dead = max(streams, key=lambda number: streams[number])
    os.kill(first[dead], signal.SIGKILL)

    def all_are_back() -> bool:
        return sum(reader.connections > 1 for reader in readers) == streams[dead]

    await eventually(all_are_back)
    openai_server.release(name)
    await asyncio.gather(*reading)
    assert all_are_back()
    assert {reader.text for reader in readers} == {"One half, the other."}
    assert not any(event["type"] == "reset" for reader in readers for event in reader.events)
    await eventually(lambda: row_of(stack, accepted["message_id"]) == ("done", "One half, the other."))
    await eventually(lambda: ready(stack)[dead] != first[dead], 60)
    assert {n: pid for n, pid in ready(stack).items() if n != dead} == {n: first[n] for n in first if n != dead}

    async def all_answer() -> bool:
        return set(await readers_of(stack)) == {"1", "2", "3"}

    await eventually(all_answer, 90)
    pids = [*ready(stack).values()]
    await stack.server.terminate()
    assert stack.server.exit_code == 0
    assert not any(map(alive, pids))
    assert "Traceback" not in stack.server.log()
    # And when nobody told them to end.
    await stack.server.start()
    await eventually(lambda: len(ready(stack)) == 3, 60)
    stack.server.signal(signal.SIGKILL)
    await eventually(lambda: not any(map(alive, ready(stack).values())), 30)


def given(sockets: list[socket.socket]) -> list[int]:
    """How many of a hundred new connections fall to each."""
    port = sockets[0].getsockname()[1]
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    counts = []
    for one in sockets:
        one.setblocking(False)
        count = 0
        with contextlib.suppress(OSError):
            while True:
                one.accept()[0].close()
                count += 1
        counts.append(count)
    for client in clients:
        client.close()
    return counts


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the processes accept from one socket")
def test_a_socket_whose_process_died_gets_no_connection_until_it_listens_again() -> None:
    sockets = listen_each("127.0.0.1", 0, 2)
    assert all(given(sockets))
    leave_out(sockets[0])
    leave_out(sockets[0])
    assert given(sockets) == [0, 100]
    sockets[0].listen()
    assert all(given(sockets))
    for one in sockets:
        one.close()


async def test_a_process_that_cannot_be_started_again_is_tried_later(capsys: pytest.CaptureFixture[str]) -> None:
    program = Program("part", [], {}, Console(SystemClock(), colour=False))
    program._command = ["/nowhere/to/be/found"]
    with pytest.raises(PartFailed, match="could not start"):
        await program.supervise()
    program.ready.set()
    life = asyncio.create_task(program.supervise())
    said = ""

    async def told() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return said.count("could not be started") >= 2

    await eventually(told)
    await program.stop(1)
    await life


@pytest.fixture
def taken() -> Iterator[int]:
    sockets = listen_each("127.0.0.1", 0, 2)
    yield sockets[0].getsockname()[1]
    for one in sockets:
        one.close()


def test_a_port_that_several_share_is_taken_for_everybody_else(taken: int) -> None:
    with pytest.raises(PortTaken):
        listen("127.0.0.1", taken)
    with pytest.raises(PortTaken):
        listen_each("127.0.0.1", taken, 2)
