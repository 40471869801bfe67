"""People, a server and a worker while Redis is away, in each of the ways in which it can be.

In every case an answer is under way. Meanwhile a second message is taken; afterwards both answers are whole, for the
reader that was there all the time and in PostgreSQL, and no process has shown a traceback.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
import redis.asyncio

from headwater.ids import new_id
from support.openai_scenarios import answer
from support.reader import TERMINAL, Reader, ask, row_of
from support.stack import Stack, StackMaker
from support.wait import eventually

#: Seconds a message may take to be accepted before its sender gives up. Not a measure of speed: one second is meant.
PATIENCE = 20.0
WORDS = 60
#: A line that announces a reason and gives none.
NO_REASON = re.compile(r"^.*(?:: \.|:) *$|^.*: \. .*$", re.MULTILINE)


@pytest_asyncio.fixture(scope="module")
async def stack(stack_maker: StackMaker) -> AsyncIterator[Stack]:
    maker = stack_maker.fresh()
    # What Redis forgot is enqueued again after the grace: a short one, as that wait is no part of what is asked here.
    yield await maker(settings={"HEADWATER_QUEUE_GRACE": "3"})
    await maker.stop()


@dataclass(frozen=True)
class Fault:
    """`strike` makes Redis go away, `heal` brings it back.

    It heals once server and worker have `noticed`, and when it `lasts` once the answer is in PostgreSQL besides.
    """

    strike: Callable[[Stack], Awaitable[None]]
    heal: Callable[[Stack], Awaitable[None]]
    noticed: tuple[str, ...] = ()
    lasts: bool = False


async def kill(stack: Stack) -> None:
    assert stack.redis_server is not None
    await asyncio.to_thread(stack.redis_server.kill)


async def start(stack: Stack) -> None:
    assert stack.redis_server is not None
    await asyncio.to_thread(stack.redis_server.start)


async def restart(stack: Stack) -> None:
    await kill(stack)
    await start(stack)


async def freeze(stack: Stack) -> None:
    assert stack.redis_server is not None
    os.kill(stack.redis_server.pid, signal.SIGSTOP)


async def thaw(stack: Stack) -> None:
    assert stack.redis_server is not None
    os.kill(stack.redis_server.pid, signal.SIGCONT)


async def command(stack: Stack, *words: Any) -> None:
    async with redis.asyncio.Redis.from_url(stack.redis_url) as raw:
        await raw.execute_command(*words)  # type: ignore[no-untyped-call]


async def flush(stack: Stack) -> None:
    await command(stack, "FLUSHALL")


async def fill(stack: Stack) -> None:
    await command(stack, "CONFIG", "SET", "maxmemory", 1)


async def empty(stack: Stack) -> None:
    await command(stack, "CONFIG", "SET", "maxmemory", 0)


async def cut(stack: Stack) -> None:
    await command(stack, "CLIENT", "KILL", "TYPE", "pubsub")


async def cut_all(stack: Stack) -> None:
    await command(stack, "CLIENT", "KILL", "TYPE", "pubsub")
    await command(stack, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def nothing(stack: Stack) -> None:
    """It is back by itself."""


FAULTS = {
    # What comes back is empty: it kept nothing on the disk.
    "killed": Fault(kill, start, ("goes on in memory", "waits for Redis", "cannot be handed to Celery"), lasts=True),
    "restarted empty": Fault(restart, nothing),
    # Until the server has given its connection up for dead, which is longer than every time-out.
    "frozen": Fault(freeze, thaw, ("has been silent", "goes on in memory", "waits for Redis"), lasts=True),
    "flushed": Fault(flush, nothing),
    "full": Fault(fill, empty, ("goes on in memory", "waits for Redis", "cannot be handed to Celery"), lasts=True),
    "push cut": Fault(cut, nothing),
    "every connection cut": Fault(cut_all, nothing),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_an_answer_goes_on_and_messages_are_taken(stack: Stack, name: str) -> None:
    fault = FAULTS[name]
    # A life of their own in the log: what earlier cases said must not be taken for what this one says.
    said = {process.name: len(process.log()) for process in stack.processes}

    def heard(text: str) -> bool:
        return any(text in process.log()[said[process.name] :] for process in stack.processes)

    first, second = (f"{which} {name} {new_id()} [[words:{WORDS}]] [[rate:15]]" for which in ("Before", "Meanwhile"))
    async with stack.client() as http:
        accepted = await ask(http, first)
        reader = Reader(stack.base_url, accepted["task_id"])
        reading = asyncio.create_task(reader.read())
        await eventually(lambda: len(reader.text) > 20, 30)
        loop = asyncio.get_running_loop()
        struck = loop.time()
        await fault.strike(stack)
        try:
            http.timeout = httpx.Timeout(PATIENCE)
            also = await ask(http, second)
            took = loop.time() - struck
            also_reading = asyncio.create_task(Reader(stack.base_url, also["task_id"]).read())
            await eventually(lambda: all(map(heard, fault.noticed)), 60)
            if fault.lasts:
                # A worker needs no Redis to answer: only its readers wait.
                await eventually(lambda: row_of(stack, accepted["message_id"]) == ("done", answer(first, WORDS)), 30)
                assert reader.end is None
        finally:
            await fault.heal(stack)
        healed = loop.time()
        http.timeout = httpx.Timeout(30)
        await reading
        on = loop.time() - healed
        print(f"\n{name}: accepted after {took:.2f} s, away {healed - struck:.1f} s, ended {on:.1f} s later")
        await whole(stack, http, accepted, reader, answer(first, WORDS))
        await whole(stack, http, also, await also_reading, answer(second, WORDS))
    for process in stack.processes:
        assert process.running
        log = process.log()[said[process.name] :]
        assert "Traceback" not in log, log
        assert NO_REASON.findall(log) == []


async def whole(stack: Stack, http: httpx.AsyncClient, accepted: dict[str, Any], reader: Reader, text: str) -> None:
    """The reader, the log and the row say the same and end once. The reader itself checks that nothing is missing."""
    assert (reader.text, reader.end) == (text, "done")
    page = (await http.get(f"/api/runs/{accepted['task_id']}/events", params={"limit": 1000})).json()
    assert [item["seq"] for item in page["items"]] == list(range(1, len(page["items"]) + 1))
    assert [item["type"] for item in page["items"] if item["type"] in TERMINAL] == ["done"]
    assert page["items"][-1]["type"] == "done"
    await eventually(lambda: row_of(stack, accepted["message_id"]) == ("done", text))
