"""The gate: what every request passes before anything else sees it. Plain ASGI, no framework.

In this order: a request id, who asks (access.py), the size and kind of the body, then the stream
endpoint, the pages, or FastAPI. Every error that reaches it becomes a problem document, every
response gets the security headers, and every request is counted under its route.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.exceptions import HTTPException

from headwater.access import Access, Caller
from headwater.api import problems
from headwater.clock import Clock
from headwater.errors import BadRequest, SignInRequired, TooLarge
from headwater.telemetry import Telemetry
from headwater.transports.base import Message, Receive, Scope, Send

ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
#: The stream endpoint: `(scope, receive, send, caller, run_id, request_id)`; refuses, or returns what answers.
StreamApp = Callable[[Scope, Receive, Send, Caller, str | None, str], Awaitable[Awaitable[None]]]

#: Seconds a client may take to send its body.
BODY_TIMEOUT: Final = 30.0

_STREAM = re.compile(r"^(?:/api)?/stream(?:/([^/]*))?$")
_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._-]{8,64}$")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    # Not no-referrer: with it a form posts `Origin: null`, and the sign-in page's own form would look foreign.
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
    # Data, not a page: pages bring a policy of their own.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class Gate:
    """Wraps the whole application."""

    def __init__(
        self,
        *,
        access: Access,
        stream: StreamApp,
        pages: ASGIApp,
        api: ASGIApp,
        is_page: Callable[[str], bool],
        telemetry: Telemetry,
        clock: Clock,
        max_body: int,
    ) -> None:
        self._access = access
        self._stream = stream
        self._pages = pages
        self._api = api
        self._is_page = is_page
        self._telemetry = telemetry
        self._clock = clock
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        stream = await self._answer(scope, receive, send)
        if stream is not None:
            # It may stay open for hours, and what is named here would with it: the request is a tenth of its memory.
            del scope, receive, send
            await stream

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None] | None:
        """Answer, but for a stream: that is returned, to be awaited."""
        begun = self._clock.monotonic()
        request_id = _request_id(scope)
        answer = _Answer(send, request_id)
        route = "stream"
        try:
            caller = self._enter(scope, request_id)
            stream = _STREAM.match(scope["path"])
            if stream is not None:
                # The bare `send`: between a run's batch and the socket stands nothing.
                return await self._stream(scope, receive, send, caller, stream[1], request_id)
            route = "page" if self._is_page(scope["path"]) else "unmatched"
            app = self._pages if route == "page" else self._api
            await app(scope, await self._body(scope, receive), answer)
            route = getattr(scope.get("route"), "path", route)
        except Exception as error:
            if answer.status:
                # Answered by the framework's own handler already, or broken in the middle.
                if not answer.complete:
                    raise
                return None
            await self._refuse(error, scope, receive, answer, request_id)
        finally:
            self._count(scope, route, answer.status, begun)
        return None

    def _enter(self, scope: Scope, request_id: str) -> Caller:
        caller = self._access.authenticate(
            scope["headers"],
            method=scope["method"],
            scheme=scope.get("scheme", "http"),
            path=scope["path"],
            client=tuple(scope["client"]) if scope.get("client") else None,
        )
        scope["state"] = {**(scope.get("state") or {}), "caller": caller, "request_id": request_id}
        return caller

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        # There is none, so every one is refused, whoever asks.
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": "There is no WebSocket here."})

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, answer: _Answer, request_id: str) -> None:
        path = scope["path"]
        visit = scope["method"] == "GET" or path == "/sign-out"
        if isinstance(error, SignInRequired) and visit and _wants_page(scope):
            await answer({"type": "http.response.start", "status": 303, "headers": [(b"location", b"/sign-in")]})
            await answer({"type": "http.response.body", "body": b""})
            return
        await problems.respond(error, path=path, request_id=request_id)(scope, receive, answer)

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body up to the limit and give it out as one message. It is small by definition."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        # HTTP/1.1 announces a body, HTTP/2 need not.
        if not length and b"transfer-encoding" not in headers and scope["http_version"].startswith("1."):
            return receive
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        # What came may be valid all the same, and would spend an Idempotency-Key on another request.
                        raise BadRequest("The connection ended before the body did. Send the request again.")
                    body += message.get("body", b"")
                    if len(body) > self._max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise HTTPException(408, f"The body did not arrive within {BODY_TIMEOUT:.0f} seconds.") from None
        if body and not _is_expected_kind(scope, headers):
            raise HTTPException(415, "Send the body as application/json.")
        return _replay(bytes(body), receive)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The body is larger than {self._max_body} bytes.", limit=self._max_body)

    def _count(self, scope: Scope, route: str, status: int, begun: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        if route == "stream" and not status:
            # A stream lives for minutes and is counted when it opens.
            return
        self._telemetry.count("headwater_http_requests_total", method=method, route=route, status=str(status))
        self._telemetry.observe("headwater_http_seconds", self._clock.monotonic() - begun, method=method, route=route)


class _Answer:
    """`send` with the security headers; remembers what was said."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        #: 0 until the response started.
        self.status = 0
        self.complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            present = {name for name, _ in headers}
            headers += [pair for pair in _HEADERS if pair[0] not in present]
            headers.append((b"x-request-id", self._request_id.encode()))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _request_id(scope: Scope) -> str:
    """The caller's own id, so that its logs and ours meet, or a fresh one."""
    sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return sent.decode() if _REQUEST_ID.match(sent) else secrets.token_hex(8)


def _is_expected_kind(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if scope["path"] in {"/sign-in", "/sign-out"}:
        return kind == "application/x-www-form-urlencoded"
    return kind == "application/json"


def _wants_page(scope: Scope) -> bool:
    accept: bytes = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return b"text/html" in accept and not scope["path"].startswith("/api/")
