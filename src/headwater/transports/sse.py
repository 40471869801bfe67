"""Server-sent events as a plain ASGI endpoint: one waiter and one write per batch, nothing between.

    GET /api/stream/{task_id}           one run; `Last-Event-ID`, else `?after=<cursor>`
    GET /api/stream?runs=<id>[:<cursor>],…   up to 64 runs on one connection

`Last-Event-ID` wins over `after`: an EventSource that reconnects repeats its first address, so the
header is the newer of the two. On a stream of several runs a cursor belongs to one run and
`Last-Event-ID` cannot say which; there the address alone counts.

Errors before the first byte are raised, and become problem documents above. After it a stream
ends; the client comes back with its cursor and loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException

from headwater.access import Caller
from headwater.errors import HeadwaterError, InvalidInput, Unavailable
from headwater.events import Cursor, EventType
from headwater.formats.base import Format
from headwater.formats.native import HEARTBEAT, Native, NativeOf, said
from headwater.hub import Hub, Subscription
from headwater.ids import is_id
from headwater.transports.base import May, MayEach, Read, Receive, Scope, Send, Stream, Streams, cursor_of
from headwater.transports.direct import Outbox, direct, hangup

logger = logging.getLogger(__name__)

#: Runs on one connection; their ids and cursors keep the address under 8 KiB.
MAX_RUNS: Final = 64
#: Seconds to learn whether a reader has seen a run's end; beyond that it is followed, which tells as well.
LOOK: Final = 1.0
#: Bytes of a frame after which a reader's next one is not made before it took this one.
LARGE: Final = 4096
#: Bytes a connection may buffer beside the frame under way.
BUFFER: Final = 16_384
#: Runs of one connection that may read their log at once.
TURNS: Final = 4
#: Seconds of silence on a stream of several runs after which a heartbeat is worth its bytes.
QUIET: Final = 5.0

HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    # nginx and what descends from it hold a response back unless told not to.
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


Headers = list[tuple[bytes, bytes]]
Turn = contextlib.AbstractAsyncContextManager[Any]

#: What one run's frames need not wait for.
_ALONE: Final = contextlib.nullcontext()


class StreamEndpoint:
    """`endpoint(scope, receive, send, caller, run_id)`; `run_id` None for several runs by `?runs=`."""

    def __init__(
        self, hub: Hub, streams: Streams, *, may: May, may_each: MayEach, read: Read, form: Format | None = None
    ) -> None:
        self._hub = hub
        self._streams = streams
        self._may = may
        self._may_each = may_each
        self._read = read
        self._format = form or Native()
        self._outbox = Outbox()

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, caller: Caller, run_id: str | None, request_id: str = ""
    ) -> None:
        """Answer one request. Raises RequestError or Unavailable before anything was sent."""
        await (await self.open(scope, receive, send, caller, run_id, request_id))

    async def open(
        self, scope: Scope, receive: Receive, send: Send, caller: Caller, run_id: str | None, request_id: str = ""
    ) -> Coroutine[Any, Any, None]:
        """All that a request may be refused for. What it returns answers: await it at once, and hold nothing of the
        request meanwhile, because it may take hours and thousands of readers wait in it.

        Raises RequestError or Unavailable; nothing was sent then.
        """
        if scope["method"] != "GET":
            raise HTTPException(405, "A stream is read with GET.", headers={"Allow": "GET"})
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        headers = [*HEADERS, (b"x-request-id", request_id.encode())] if request_id else [*HEADERS]
        if run_id is None:
            return await self._many(_runs(query), caller, headers, receive, send)
        return await self._one(run_id, _after(scope, query), caller, headers, receive, send)

    async def _one(
        self, run_id: str, after: Cursor | None, caller: Caller, headers: Headers, receive: Receive, send: Send
    ) -> Coroutine[Any, Any, None]:
        if not is_id(run_id):
            raise InvalidInput("The task id is not a UUID in its canonical form.", field="task_id")
        await self._may(caller, run_id)
        if after is not None and await self._past_end(run_id, after):
            return _no_content(send, headers)
        subscription = self._hub.subscribe(run_id, after)
        try:
            stream = self._streams.open("sse", caller.owner_id, subscription.close, _cutter(send))
        except BaseException:
            subscription.close()
            raise
        frames = _Frames(stream, send, self._hub, self._outbox, several=False)
        return _respond(frames, stream, headers, receive, [(subscription, self._format)])

    async def _many(
        self, runs: dict[str, Cursor | None], caller: Caller, headers: Headers, receive: Receive, send: Send
    ) -> Coroutine[Any, Any, None]:
        subscriptions: dict[str, Subscription] = {}

        def close() -> None:
            for subscription in subscriptions.values():
                subscription.close()

        # Counted ahead of the checks: they may wait for what is away, and so many as wait are a load as well.
        stream = self._streams.open("sse", caller.owner_id, close, _cutter(send))
        try:
            return await self._respond_to_many(stream, subscriptions, runs, caller, headers, receive, send)
        except BaseException:
            stream.leave()
            raise

    async def _respond_to_many(
        self,
        stream: Stream,
        subscriptions: dict[str, Subscription],
        runs: dict[str, Cursor | None],
        caller: Caller,
        headers: Headers,
        receive: Receive,
        send: Send,
    ) -> Coroutine[Any, Any, None]:
        refused = await self._may_each(caller, list(runs))
        follow = await self._unread({one: after for one, after in runs.items() if one not in refused})
        if stream.ending:
            # There was nothing to close yet when the server began to stop.
            raise Unavailable("The server is about to stop. Connect again in a moment.")
        if not follow and not refused:
            stream.leave()
            return _no_content(send, headers)
        for run_id, after in follow.items():
            subscriptions[run_id] = self._hub.subscribe(run_id, after, among=len(follow))
        followed: list[tuple[Subscription, Format]] = [(one, NativeOf(run_id)) for run_id, one in subscriptions.items()]
        first = [_refusal(run_id, error) for run_id, error in refused.items()]
        frames = _Frames(stream, send, self._hub, self._outbox, several=len(followed) > 1)
        return _respond(frames, stream, headers, receive, followed, first)

    async def _unread(self, runs: Mapping[str, Cursor | None]) -> dict[str, Cursor | None]:
        """The runs of which the reader has not seen the end."""
        ended = await asyncio.gather(*(self._past_end(run_id, after) for run_id, after in runs.items() if after))
        over = {
            run_id for run_id, past in zip((one for one, after in runs.items() if after), ended, strict=True) if past
        }
        return {run_id: after for run_id, after in runs.items() if run_id not in over}

    async def _past_end(self, run_id: str, after: Cursor) -> bool:
        try:
            async with asyncio.timeout(LOOK):
                page = await self._read(run_id, after.seq, 1)
        except (Unavailable, TimeoutError):
            # Nobody can tell now; the stream waits for what is away and ends at once if it was over.
            return False
        return page is not None and page.closed and page.epoch == after.epoch and after.seq >= page.count


async def _respond(
    frames: _Frames,
    stream: Stream,
    headers: Headers,
    receive: Receive,
    followed: list[tuple[Subscription, Format]],
    first: Sequence[bytes] = (),
) -> None:
    """Headers, `first`, then frames until the runs end or the stream must. Never raises for a reader that is gone.

    `headers` and `followed` are emptied: what is held here, is held for as long as the stream is open.
    """
    send = frames.send
    watcher: _Watcher | None = None
    try:
        _limit_buffer(send)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        headers.clear()
        watcher = _Watcher(receive, send, stream)
        # Something must follow the headers at once: servers and proxies hold them back until the first byte.
        await send(_body(b"".join((_retry(), *first))))
        first = ()
        if len(followed) == 1:
            await frames.follow(*followed.pop())
        else:
            async with asyncio.TaskGroup() as tasks:
                for subscription, form in followed:
                    tasks.create_task(frames.follow(subscription, form))
        if stream.ending not in ("gone", "slow"):
            await frames.end(b": the server stops, come back in a moment\n" + _retry() if stream.ending else b"")
        if stream.ending == "slow":
            # The server must have seen the cut before we return, or it reports a response left unfinished.
            await watcher.gone(1.0)
    except Exception:
        # The status line is out, so no problem document can follow. The client comes back with its cursor.
        logger.exception("a stream broke and is cut")
        stream.abort()
    finally:
        if watcher is not None:
            watcher.stop()
        stream.leave()


class _Frames:
    """The frames on one reader's socket: of one run, or of several as they come.

    What is pushed while nothing else is under way goes straight to the transport where that can be, see direct.py.
    """

    __slots__ = ("_hub", "_loop", "_outbox", "_several", "_stream", "_turns", "_writing", "send")

    def __init__(self, stream: Stream, send: Send, hub: Hub, outbox: Outbox, *, several: bool) -> None:
        self.send = send
        self._stream = stream
        self._hub = hub
        self._outbox = outbox
        self._several = several
        self._loop = asyncio.get_running_loop()
        # A reader that takes nothing makes all its runs wait, and each that waits with a page of its log in hand costs
        # that page. So few may read their logs at once.
        self._turns: Turn = asyncio.Semaphore(TURNS) if several else _ALONE
        self._writing: Turn = asyncio.Lock() if several else _ALONE

    async def follow(self, subscription: Subscription, form: Format) -> None:
        """Write a run's frames until its subscription is over."""
        make = direct(self.send, self._outbox, self._stream if self._several else None)
        if make is not None:
            subscription.push = make(form)
            del make
        while not subscription.over:
            while (waiting := subscription.ready()) is not None:
                await waiting
            async with self._turns:
                batch = await subscription.take()
                if batch is not None:
                    # In a list, to be taken out of it: while the reader takes nothing, nothing is held for it here.
                    frame, born = [form.render(batch)], batch.take_born()
                    batch = None
                    await self._write(frame)
                    if born and not subscription.over:
                        self._hub.delivered(born)

    async def end(self, goodbye: bytes) -> None:
        self._stream.sending_since = self._loop.time()
        await self.send(_body(goodbye, more=False))

    async def _write(self, frame: list[bytes]) -> None:
        stream = self._stream
        if not frame[0]:
            if self._several and self._loop.time() - stream.wrote_at < QUIET:
                return
            frame[0] = HEARTBEAT
        large = len(frame[0]) > LARGE
        async with self._writing:
            if stream.ending in ("gone", "slow"):
                return
            stream.sending_since = stream.wrote_at = self._loop.time()
            await self.send(_body(frame.pop()))
            if large:
                # A write returns though nothing was taken yet. What is read next for this reader would only lie
                # here, so wait until it took this; an empty body does that and sends nothing.
                await self.send(_body(b""))
            stream.sending_since = None


class _Watcher:
    """Ends a stream whose reader leaves: told by uvicorn where that can be, see direct.py, else by a task."""

    __slots__ = ("_hangup", "_receive", "_stream", "_task")

    def __init__(self, receive: Receive, send: Send, stream: Stream) -> None:
        self._receive = receive
        self._stream = stream
        self._hangup = hangup(send, receive, stream)
        self._task = asyncio.create_task(self._watch()) if self._hangup is None else None

    async def gone(self, timeout: float) -> None:
        """Wait until the reader has left."""
        if self._task is None:
            self.stop()
            self._task = asyncio.create_task(self._watch())
        await asyncio.wait([self._task], timeout=timeout)

    def stop(self) -> None:
        if self._hangup is not None:
            self._hangup.remove()
            self._hangup = None
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._stream.end("gone")


def _limit_buffer(send: Send) -> None:
    limit = getattr(_transport(send), "set_write_buffer_limits", None)
    if callable(limit):
        # uvloop refuses it for a connection that was closed meanwhile; `receive` tells of that.
        with contextlib.suppress(RuntimeError):
            limit(high=BUFFER)


def _refusal(run_id: str, error: HeadwaterError) -> bytes:
    data = {"code": error.code, "message": str(error), "retryable": error.retryable}
    return said(run_id, EventType.ERROR, data)


async def _no_content(send: Send, headers: Headers) -> None:
    """Past the end: an EventSource that gets 204 does not come back."""
    kept = [(name, value) for name, value in headers if name != b"content-type"]
    await send({"type": "http.response.start", "status": 204, "headers": kept})
    await send(_body(b"", more=False))


def _body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _retry() -> bytes:
    # Spread out, so that a thousand readers of a restarted server do not knock at the same moment.
    return b"retry: %d\n\n" % random.randint(500, 1500)


def _transport(send: Send) -> object:
    """What `send` writes to: uvicorn keeps it on the object whose method `send` is. None with another server."""
    return getattr(getattr(send, "__self__", None), "transport", None)


def _cutter(send: Send) -> Callable[[], None]:
    """What cuts the connection under `send`.

    ASGI has no word for it. With another server than uvicorn the task is cancelled instead, which ends the write as
    well.
    """
    cut: Callable[[], None] | None = getattr(_transport(send), "abort", None)
    if callable(cut):
        return cut
    task = asyncio.current_task()

    def abort() -> None:
        if task is not None:
            task.cancel()

    return abort


def _after(scope: Scope, query: dict[str, list[str]]) -> Cursor | None:
    last_event_id = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"last-event-id"), "")
    return cursor_of(last_event_id.strip() or query.get("after", [""])[-1])


def _runs(query: dict[str, list[str]]) -> dict[str, Cursor | None]:
    """`<id>[:<cursor>],…` as a mapping; a run named twice counts with its last cursor."""
    parts = [part.strip() for text in query.get("runs", []) for part in text.split(",") if part.strip()]
    if not parts:
        raise InvalidInput("Name the runs to follow: ?runs=<id>[:<cursor>],…", field="runs")
    if len(parts) > MAX_RUNS:
        raise InvalidInput(f"At most {MAX_RUNS} runs fit on one stream, these are {len(parts)}.", field="runs")
    runs: dict[str, Cursor | None] = {}
    for part in parts:
        run_id, _, cursor = part.partition(":")
        if not is_id(run_id):
            raise InvalidInput(f"{run_id[:60]!r} is not a run's id.", field="runs")
        runs[run_id] = cursor_of(cursor)
    return runs
