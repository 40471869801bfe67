"""The gate ahead of the application: what it lets through of a request's body."""

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

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.problem: dict[str, Any] = {}
        self._gate: Any = Gate(
            access=Access(load_settings(_env_file=None)),
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
        self, *messages: dict[str, Any], headers: list[tuple[bytes, bytes]], http_version: str = "1.1"
    ) -> None:
        waiting = list(messages)

        async def receive() -> Any:
            return waiting.pop(0)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                self.problem = orjson.loads(message["body"])

        scope = {
            "type": "http",
            "method": "POST",
            "scheme": "http",
            "path": "/api/chats",
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
