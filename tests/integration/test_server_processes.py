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
from support.reader import Reader, ask
from support.stack import Stack, StackMaker
from support.wait import eventually

#: What a supervisor waits before it kills: no measure of speed.
PATIENCE = 5.0


def ready(stack: Stack) -> dict[str, int]:
    """The processes that have been ready, by their number; the newest of each."""
    return {
        number: int(pid) for number, pid in re.findall(r"server-(\d) +│ ready \(process (\d+)\)", stack.server.log())
    }


async def answering(stack: Stack) -> set[str]:
    """The processes that named themselves in their metrics, over some connections of one's own each."""
    found: set[str] = set()
    for _ in range(20):
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                text = (await http.get(f"{stack.base_url}/metrics", timeout=10)).text
            except httpx.TransportError:
                continue
        # Every series of an answer is of the one process that gave it.
        (name,) = {*re.findall(r'process="(\d)"', text)}
        assert len(re.findall(r"^headwater_\S+ ", text, re.MULTILINE)) == text.count('process="')
        found.add(name)
    return found


async def test_several_server_processes_share_an_address_and_end_as_one(make_stack: StackMaker) -> None:
    stack = await make_stack(settings={"HEADWATER_SERVER_WORKERS": "3"})
    await eventually(lambda: len(ready(stack)) == 3, 60)
    first = ready(stack)

    async def all_answer() -> bool:
        return await answering(stack) == {"1", "2", "3"}

    await eventually(all_answer, 30)
    async with stack.client() as http:
        accepted = await ask(http, f"Go on {new_id()} [[words:60]] [[rate:30]]")
    readers = [Reader(stack.base_url, accepted["task_id"]) for _ in range(6)]
    # One that dies takes its connections along, and nothing else; another takes its place.
    os.kill(first["2"], signal.SIGKILL)
    for reader in readers:
        assert (await reader.read()).end == "done"
    await eventually(lambda: ready(stack)["2"] != first["2"], 30)
    assert {name: pid for name, pid in ready(stack).items() if name != "2"} == {"1": first["1"], "3": first["3"]}
    await eventually(all_answer, 30)
    pids = [*ready(stack).values()]
    await stack.server.terminate(PATIENCE)
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
