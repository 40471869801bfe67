"""The gate ahead of the application: what it lets through of a request's body, and whom it sends to sign in."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from headwater.access import Access
from headwater.api.gate import Gate
from headwater.clock import FrozenClock
from headwater.settings import load_settings
from headwater.telemetry import Telemetry

JSON = (b"content-type", b"application/json")
END = {"type": "http.disconnect"}


def piece(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


class Asked:
    """A gate, what came through it, and the problem it answered with when nothing did."""

    def __init__(self, **settings: Any) -> None:
        self.bodies: list[bytes] = []
        self.problem: dict[str, Any] = {}
        #: Where it leads to instead.
        self.elsewhere = b""
        self._gate: Any = Gate(
            access=Access(load_settings(_env_file=None, **settings)),
            stream=None,  # type: ignore[arg-type]  # nobody asks for one
            pages=self._app,
            api=self._app,
            is_page=lambda path: False,
            telemetry=Telemetry(),
            clock=FrozenClock(),
            max_body=100,
        )

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])

    async def post(
        self,
        *messages: dict[str, Any],
        headers: list[tuple[bytes, bytes]],
        http_version: str = "1.1",
        path: str = "/api/chats",
    ) -> None:
        waiting = list(messages)

        async def receive() -> Any:
            return waiting.pop(0)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.elsewhere = dict(message["headers"]).get(b"location", b"")
            elif message["body"]:
                self.problem = orjson.loads(message["body"])

        scope = {
            "type": "http",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "http_version": http_version,
            "client": ("127.0.0.1", 1),
            "headers": [(b"host", b"localhost"), *headers],
        }
        await self._gate(scope, receive, send)


@pytest.mark.parametrize("kind", [(b"content-length", b"20"), (b"transfer-encoding", b"chunked")])
@pytest.mark.parametrize("arrived", [b"", b'{"title": "Fir', b"{}"])
async def test_a_request_that_breaks_off_in_its_body_does_nothing(arrived: bytes, kind: tuple[bytes, bytes]) -> None:
    asked = Asked()
    await asked.post(piece(arrived, more=True), END, headers=[JSON, kind])
    assert asked.bodies == []
    assert asked.problem["code"] == "bad_request"


async def test_a_body_comes_through_in_one_piece() -> None:
    asked = Asked()
    await asked.post(piece(b"{", more=True), piece(b"}", more=False), headers=[JSON, (b"content-length", b"2")])
    assert asked.bodies == [b"{}"]


async def test_a_body_by_http_2_is_limited_although_nothing_announces_it() -> None:
    asked = Asked()
    await asked.post(piece(b"x" * 101, more=False), headers=[JSON], http_version="2")
    assert asked.bodies == []
    assert asked.problem["code"] == "too_large"


@pytest.mark.parametrize(("path", "elsewhere"), [("/sign-out", b"/sign-in"), ("/api/chats", b"")])
async def test_signing_out_of_a_session_that_is_over_leads_to_the_sign_in_page(path: str, elsewhere: bytes) -> None:
    asked = Asked(access_token="a-token-of-some-length")
    await asked.post(path=path, headers=[(b"accept", b"text/html"), (b"sec-fetch-site", b"same-origin")])
    assert (asked.elsewhere, asked.problem.get("code")) == (elsewhere, None if elsewhere else "sign_in_required")
