"""When a stream's frames may go past uvicorn's `send`: only where everything is as it is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from headwater.events import content
from headwater.formats.base import Format
from headwater.formats.native import Native
from headwater.hub import Batch
from headwater.transports.base import Send, Stream
from headwater.transports.direct import ROW, ROW_BYTES, SMALL, Outbox, direct, hangup


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


async def response() -> tuple[Any, Transport]:
    """uvicorn's own response, started."""
    transport: Any = Transport()
    cycle = RequestResponseCycle(
        scope={"type": "http", "method": "GET"},  # type: ignore[typeddict-item]  # all it reads of it
        transport=transport,
        flow=FlowControl(transport),
        logger=logging.getLogger(),
        access_logger=logging.getLogger(),
        access_log=False,
        default_headers=[],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=True,
        on_response=lambda: None,
    )
    await cycle.send({"type": "http.response.start", "status": 200, "headers": []})
    transport.written = b""
    return cycle, transport


def stream() -> Stream:
    return Stream(lambda: None, lambda: None)


def batch(*texts: str) -> Batch:
    return Batch("e", [content(text).stamped(seq, 1) for seq, text in enumerate(texts, 1)])


async def test_the_bytes_are_those_of_send() -> None:
    cycle, transport = await response()
    make = direct(cycle.send, Outbox())
    assert make is not None
    assert make(Native())(batch("one", "zwei ü", "\n"))
    await asyncio.sleep(0)
    straight, transport.written = transport.written, b""
    body = Native().render(batch("one", "zwei ü", "\n"))
    await cycle.send({"type": "http.response.body", "body": body, "more_body": True})
    assert straight == transport.written != b""


async def test_one_chunk_serves_every_reader_of_a_format() -> None:
    made = 0

    class Counting(Native):
        def frames(self, batch: Batch) -> bytes:
            nonlocal made
            made += 1
            return super().frames(batch)

    shared = batch("one")
    for _ in range(3):
        cycle, transport = await response()
        make = direct(cycle.send, Outbox())
        assert make is not None
        assert make(Counting())(shared)
        await asyncio.sleep(0)
        assert b"one" in transport.written
    assert made == 1


async def test_a_format_with_a_memory_is_asked_for_each_reader_and_only_for_what_is_written() -> None:
    class Counted(Format):
        name: ClassVar[str] = "counted"
        shared: ClassVar[bool] = False

        def __init__(self) -> None:
            self.count = 0

        def frames(self, batch: Batch) -> bytes:
            self.count += 1
            return b"" if self.count == 1 else b"%d" % self.count

    cycle, transport = await response()
    make = direct(cycle.send, Outbox())
    assert make is not None
    push = make(Counted())
    assert not push(batch("x" * SMALL))
    # Nothing to say is no chunk: an empty one ends the response.
    assert push(batch("a"))
    await asyncio.sleep(0)
    assert transport.written == b""
    assert push(batch("a"))
    await asyncio.sleep(0)
    assert transport.written == b"1\r\n2\r\n"


async def test_a_reader_that_does_not_keep_up_is_left_to_send() -> None:
    cycle, _ = await response()
    make = direct(cycle.send, Outbox())
    assert make is not None
    push = make(Native())
    cycle.flow.pause_writing()
    assert not push(batch("a"))
    cycle.flow.resume_writing()
    assert push(batch("a"))
    assert not push(batch("x" * SMALL))


async def test_what_is_pushed_in_one_turn_is_written_in_its_order_and_before_whoever_is_woken_by_it_writes() -> None:
    outbox, transports = Outbox(), [Transport(), Transport()]

    async def woken() -> None:
        transports[0].write(b"later")

    outbox.put(transports[0], b"a")
    writer = asyncio.create_task(woken())
    outbox.put(transports[1], b"b")
    outbox.put(transports[0], b"c")
    assert [one.written for one in transports] == [b"", b""]
    await writer
    assert [one.written for one in transports] == [b"aclater", b"b"]


async def test_a_full_row_is_written_at_once_and_the_next_one_in_its_turn() -> None:
    outbox, transport = Outbox(), Transport()
    for number in range(ROW + 1):
        outbox.put(transport, b"%d," % number)
    full = b"".join(b"%d," % number for number in range(ROW))
    assert transport.written == full
    await asyncio.sleep(0)
    assert transport.written == full + b"%d," % ROW


async def test_a_reader_that_leaves_before_its_turn_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Transport):
        def write(self, data: bytes) -> None:
            raise RuntimeError("the handle is closed")

    outbox, gone, transport = Outbox(), Gone(), Transport()
    outbox.put(gone, b"a")
    outbox.put(transport, b"b")
    gone.closed = True
    await asyncio.sleep(0)
    assert transport.written == b"b"
    assert not caplog.records


async def test_a_reader_that_takes_nothing_is_known_as_such_before_much_waits_for_it() -> None:
    cycle, transport = await response()
    outbox = Outbox()
    make = direct(cycle.send, outbox)
    assert make is not None
    push = make(Native())

    def write(data: bytes) -> None:
        transport.written += data
        cycle.flow.pause_writing()

    transport.write = write  # type: ignore[method-assign]
    large = batch("x" * (SMALL - 200))
    taken = [push(large) for _ in range(ROW)]
    await asyncio.sleep(0)
    assert not all(taken)
    assert ROW_BYTES <= len(transport.written) <= ROW_BYTES + 2 * SMALL


async def test_a_write_that_fails_cuts_its_reader_and_no_other() -> None:
    class Broken(Transport):
        def write(self, data: bytes) -> None:
            raise RuntimeError("the handle is closed")

    outbox, transports = Outbox(), [Transport(), Broken(), Transport()]
    for transport in transports:
        outbox.put(transport, b"a")
    await asyncio.sleep(0)
    assert [(one.written, one.closed) for one in transports] == [(b"a", False), (b"", True), (b"a", False)]


def _without(name: str, part: str | None = None) -> Callable[[Any], Any]:
    def spoil(cycle: Any) -> Any:
        delattr(cycle if part is None else getattr(cycle, part), name)
        return cycle.send

    return spoil


def _with(name: str, value: Any) -> Callable[[Any], Any]:
    def spoil(cycle: Any) -> Any:
        setattr(cycle, name, value)
        return cycle.send

    return spoil


def _wrapped(cycle: Any) -> Send:
    async def send(message: Any) -> None:
        await cycle.send(message)

    return send


def _other(cycle: Any) -> Any:
    class RequestResponseCycle:
        async def send(self, message: Any) -> None: ...

    return RequestResponseCycle().send


@pytest.mark.parametrize(
    "spoil",
    [
        _wrapped,
        _other,
        _without("flow"),
        _without("transport"),
        _without("chunked_encoding"),
        _without("write_paused", "flow"),
        _without("scope"),
        _with("scope", {}),
        _with("scope", {"method": "HEAD"}),
        _with("transport", object()),
        _with("chunked_encoding", None),
        _with("response_started", False),
        _with("response_complete", True),
    ],
)
async def test_a_server_that_is_not_as_it_is_known_is_written_to_by_send(spoil: Callable[[Any], Any]) -> None:
    cycle, _ = await response()
    assert direct(cycle.send, Outbox()) is not None
    assert direct(spoil(cycle), Outbox()) is None


async def test_a_reader_that_leaves_ends_its_stream_without_a_task_that_waits_for_it() -> None:
    cycle, _ = await response()
    reader = stream()
    before = asyncio.all_tasks()
    assert hangup(cycle.send, cycle.receive, reader) is not None
    assert asyncio.all_tasks() == before
    cycle.message_event.set()
    assert not reader.ending
    cycle.disconnected = True
    # As uvicorn's connection_lost does.
    cycle.message_event.set()
    assert str(reader.ending) == "gone"


async def test_a_reader_that_left_before_anybody_listened_is_heard() -> None:
    cycle, _ = await response()
    cycle.disconnected = True
    reader = stream()
    assert hangup(cycle.send, cycle.receive, reader) is not None
    assert reader.ending == "gone"


async def test_a_body_that_nobody_wants_neither_stays_nor_keeps_the_connection_from_being_read() -> None:
    cycle, transport = await response()
    assert hangup(cycle.send, cycle.receive, stream()) is not None
    cycle.body += b"x" * 100_000
    cycle.flow.pause_reading()
    paused = transport.reading
    cycle.message_event.set()
    assert (paused, transport.reading) == (False, True)
    assert cycle.body == b""


async def test_receive_works_again_once_the_hangup_is_removed() -> None:
    cycle, _ = await response()
    heard = hangup(cycle.send, cycle.receive, stream())
    assert heard is not None
    heard.remove()
    waiting = asyncio.create_task(cycle.receive())
    await asyncio.sleep(0)
    cycle.disconnected = True
    cycle.message_event.set()
    assert await waiting == {"type": "http.disconnect"}


async def test_the_request_is_let_go_by_uvicorn_and_kept_by_whoever_holds_it() -> None:
    config = Config(lambda: None, log_config=None)
    protocol = HttpToolsProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    cycle, _ = await response()
    held: Any = {"type": "http", "method": "GET", "headers": [(b"a", b"b")]}
    cycle.scope = protocol.scope = held
    protocol.headers = held["headers"]
    cycle.on_response = protocol.on_response_complete
    assert hangup(cycle.send, cycle.receive, stream()) is not None
    assert held["headers"] == [(b"a", b"b")]
    assert cycle.scope is not held
    assert protocol.scope is not held
    assert protocol.headers == []
    # And the response goes on to its end.
    await cycle.send({"type": "http.response.body", "body": b"end", "more_body": True})


def _listening(cycle: Any) -> Any:
    async def receive() -> Any:
        return await cycle.receive()

    return receive


@pytest.mark.parametrize(
    "spoil",
    [
        _without("disconnected"),
        _without("body"),
        _without("message_event"),
        _with("message_event", object()),
        _with("body", b""),
        _wrapped,
    ],
)
async def test_where_a_server_is_not_as_it_is_known_receive_is_waited_for(spoil: Callable[[Any], Any]) -> None:
    cycle, _ = await response()
    receive = cycle.receive
    send = spoil(cycle)
    event = getattr(cycle, "message_event", None)
    assert hangup(send, receive, stream()) is None
    assert getattr(cycle, "message_event", None) is event


async def test_a_receive_that_a_middleware_wrapped_is_used() -> None:
    cycle, _ = await response()
    assert hangup(cycle.send, _listening(cycle), stream()) is None
