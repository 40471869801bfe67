"""OpenAIProvider: any API that speaks OpenAI's chat completions, streamed.

The official client costs about 500 µs of CPU per token; reading the stream here costs a
twentieth of that, and a worker holds a thousand streams at once. What servers do differently is
met in three places: `chunks` reads what they send, `faults` says what went wrong, and parameters
that a server does not take are left out from then on.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import aiohttp
import orjson
from yarl import URL

from headwater.errors import ProviderError, SettingsError
from headwater.providers import faults
from headwater.providers.base import ChatRequest, Delta, Provider
from headwater.providers.chunks import ApiError, Malformed, read_whole
from headwater.providers.reading import STUCK, VAGUE, Reading
from headwater.providers.sse import MAX_FRAME
from headwater.settings import Settings
from headwater.telemetry import Telemetry

OPENAI: Final = "https://api.openai.com/v1"

#: Seconds for name, connection and TLS together.
CONNECT: Final = 10.0
#: Seconds before the first further try; doubles up to MAX_BACKOFF.
FIRST_BACKOFF: Final = 0.5
MAX_BACKOFF: Final = 20.0
#: The longest wait an API may ask for; a longer one fails the call and is named in its error.
MAX_RETRY_AFTER: Final = 30.0
#: Bytes of an error's body that are read.
MAX_ERROR: Final = 65_536
#: Models whose refused parameters are remembered.
MAX_MODELS: Final = 100

#: Parameters that some servers refuse, in the order in which they are given up.
_OPTIONAL: Final = ("stream_options", "max_completion_tokens", "max_tokens", "temperature")


class OpenAIProvider(Provider):
    """One API. Belongs to the event loop of its first call."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        key: str | None = None,
        idle: float = 60.0,
        retries: int = 3,
        connect: float = CONNECT,
        telemetry: Telemetry | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`base_url` up to and with `/v1`; `idle` and `connect` in seconds; `retries` counts tries after the first.

        Raises SettingsError for an address or a key that cannot be used.
        """
        self.model = model
        self._base = _base_of(base_url)
        self._key = _key_of(key)
        self._idle = idle
        self._retries = retries
        self._connect = connect
        self._telemetry = telemetry
        self._sleep = sleep
        self._jitter = jitter
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: Parameters a model was found not to take.
        self._refused: dict[str, frozenset[str]] = {}

    @classmethod
    def of(cls, settings: Settings, telemetry: Telemetry | None = None) -> OpenAIProvider:
        """The API of the settings. Raises SettingsError."""
        return cls(
            settings.openai_base_url or OPENAI,
            model=settings.openai_model,
            key=settings.openai_api_key.get_secret_value() if settings.openai_api_key else None,
            idle=settings.provider_idle,
            retries=settings.provider_retries,
            telemetry=telemetry,
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        tries = tokens = 0
        try:
            while True:
                try:
                    async with aclosing(self._answer(request)) as answer:
                        async for delta in answer:
                            tokens += 1
                            yield delta
                    return
                except ProviderError as error:
                    # After the first token a further try would say things twice.
                    delay = None if tokens else self._delay(error, tries)
                    if delay is None:
                        raise
                    code = error.code
                tries += 1
                if self._telemetry is not None:
                    self._telemetry.count("headwater_provider_retries_total", code=code)
                what = "The model is busy" if code == "provider_rate_limited" else "The model's API cannot be reached"
                yield Delta(notice=f"{what}; trying again in {max(1, math.ceil(delay))} s ({tries} of {self._retries})")
                await self._sleep(delay)
        finally:
            if tokens and self._telemetry is not None:
                self._telemetry.count("headwater_provider_tokens_total", tokens)

    async def check(self) -> str:
        where = self._where(self.model)
        response = await self._send(
            "GET", "/models", None, self.model, aiohttp.ClientTimeout(connect=self._connect, sock_read=self._connect)
        )
        try:
            if response.status in (404, 405):
                return f"{where.host} answers. It has no list of models, so “{self.model}” was not looked up."
            if response.status != 200:
                complaint = faults.Complaint.read(await self._body(response, MAX_ERROR))
                raise faults.refused(response.status, response.headers, complaint, where)
            body = await self._body(response, MAX_FRAME)
        finally:
            response.close()
        try:
            models = {str(item["id"]) for item in orjson.loads(body)["data"]}
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise faults.malformed(where, "its list of models cannot be read") from None
        if self.model in models:
            return f"{where.host} answers and offers “{self.model}”."
        return f"{where.host} answers, but “{self.model}” is not among its {len(models)} models. Check OPENAI_MODEL."

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _delay(self, error: ProviderError, tries: int) -> float | None:
        """Seconds until the next try; None when there is none."""
        passing = error.retryable and error.code in faults.PASSING
        if tries >= self._retries or not (passing or isinstance(error.__cause__, aiohttp.ConnectionTimeoutError)):
            return None
        if error.retry_after is not None:
            # Many runs are told the same second; a tenth more spreads them.
            return error.retry_after * (1 + 0.1 * self._jitter()) if error.retry_after <= MAX_RETRY_AFTER else None
        return float(min(MAX_BACKOFF, FIRST_BACKOFF * 2**tries)) * self._jitter()

    async def _answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        where = self._where(request.model)
        response = await self._open(request, where)
        try:
            kind = response.content_type
            if kind == "application/json" or kind.endswith("+json"):
                for delta in self._whole(await self._body(response, MAX_FRAME), where):
                    yield delta
                return
            if kind != "text/event-stream" and kind not in VAGUE:
                raise faults.malformed(where, f"its type is {kind}")
            reading = Reading(response, where, self._idle)
            while (deltas := await reading.next()) is not None:
                for delta in deltas:
                    yield delta
        finally:
            # Closes the connection, unless the body was read to its end: then it is back in the pool already.
            response.close()

    async def _open(self, request: ChatRequest, where: faults.Where) -> aiohttp.ClientResponse:
        """The response whose body is the answer. Leaves out, once each, what the server does not take."""
        refused = self._refused.get(request.model, frozenset())
        timeout = aiohttp.ClientTimeout(total=None, connect=self._connect, sock_read=self._idle)
        while True:
            body = _body_of(request, refused)
            response = await self._send("POST", "/chat/completions", body, request.model, timeout)
            if 200 <= response.status < 300:
                if refused:
                    self._remember(request.model, refused)
                return response
            try:
                complaint = faults.Complaint.read(await self._body(response, MAX_ERROR))
            finally:
                response.close()
            unwanted = (
                next((name for name in _OPTIONAL if name in body and complaint.refuses(name)), None)
                if response.status in (400, 422)
                else None
            )
            if unwanted is None:
                raise faults.refused(response.status, response.headers, complaint, where)
            refused |= {unwanted}

    def _remember(self, model: str, refused: frozenset[str]) -> None:
        if model not in self._refused and len(self._refused) >= MAX_MODELS:
            self._refused.clear()
        self._refused[model] = refused

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, model: str, timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        where = self._where(model)
        url = self._base.with_path(self._base.raw_path.rstrip("/") + path, encoded=True, keep_query=True)
        try:
            return await self._connected().request(
                method,
                url,
                data=None if body is None else orjson.dumps(body),
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unsent(error, where, self._connect, timeout.sock_read or self._connect) from error

    async def _body(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """The body, at most `limit` bytes of it."""
        parts = bytearray()
        try:
            async with asyncio.timeout(STUCK * self._idle):
                while len(parts) < limit and (part := await response.content.readany()):
                    parts += part
        except TimeoutError as error:
            raise faults.silent(self._idle) from error
        except aiohttp.ClientError as error:
            if response.status == 200:
                raise faults.cut() from error
            # An error's status says enough; its body is a bonus.
        return bytes(parts[:limit])

    def _whole(self, body: bytes, where: faults.Where) -> list[Delta]:
        try:
            delta = read_whole(body)
        except Malformed as error:
            raise faults.malformed(where, str(error)) from error
        except ApiError as error:
            raise faults.mid_stream(faults.Complaint.of(error.body), where) from error
        return [] if delta is None else [delta]

    def _where(self, model: str) -> faults.Where:
        return faults.Where(self._base.host or "", model, self._key)

    def _connected(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None:
            headers = {
                "Accept": "text/event-stream, application/json",
                # A compressing proxy would hold tokens back until its window is full.
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
                "User-Agent": "headwater",
            }
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            self._loop = loop
            self._session = aiohttp.ClientSession(
                # As many connections as runs: the worker's concurrency is the limit.
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
            )
        elif self._loop is not loop:
            raise RuntimeError("This provider belongs to another event loop; make one per loop.")
        return self._session


def _body_of(request: ChatRequest, refused: frozenset[str]) -> dict[str, Any]:
    body: dict[str, Any] = {"model": request.model, "messages": list(request.messages), "stream": True}
    if "stream_options" not in refused:
        body["stream_options"] = {"include_usage": True}
    if request.max_tokens is not None:
        for name in ("max_tokens", "max_completion_tokens"):
            if name not in refused:
                body[name] = request.max_tokens
                break
    if request.temperature is not None and "temperature" not in refused:
        body["temperature"] = request.temperature
    return body


def _unsent(error: Exception, where: faults.Where, connect: float, idle: float) -> ProviderError:
    """The error of a request that got no response."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return faults.connect_timeout(where, connect)
        case TimeoutError():
            return faults.silent(idle)
        case aiohttp.ClientConnectorCertificateError():
            return faults.untrusted(where)
        case aiohttp.ClientConnectorDNSError():
            return faults.unreachable(where, "the name is not known")
        case aiohttp.ClientConnectorError():
            return faults.unreachable(where, (error.os_error.strerror or "no connection").lower())
        case aiohttp.ClientResponseError() | aiohttp.ClientPayloadError():
            return faults.malformed(where, "it does not speak HTTP")
        case _:
            return faults.unreachable(where, "it closed the connection without an answer")


def _base_of(base_url: str) -> URL:
    try:
        url = URL(base_url.strip())
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise SettingsError("OPENAI_BASE_URL must be an address such as https://api.openai.com/v1.")
    if url.user or url.password:
        raise SettingsError("OPENAI_BASE_URL must not carry a password. Put the key into OPENAI_API_KEY.")
    return url


def _key_of(key: str | None) -> str | None:
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise SettingsError("OPENAI_API_KEY has characters that no key has. Copy it again.")
    return key or None
