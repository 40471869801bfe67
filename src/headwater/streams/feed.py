"""RedisFeed: one raw connection that follows many runs.

redis-py's pub/sub reconnects in silence, and what was published meanwhile is gone without a trace.
Here a break is said, every confirmation is passed on, and a server that is frozen rather than gone
is noticed by its silence. Without redis-py between socket and hub a message costs a fraction.

The connection speaks RESP2: its subscribed mode is the same from Redis 6.2 to Valkey 9. It selects
no database, because channels belong to all of them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import hiredis
from redis.asyncio.connection import parse_url

from headwater.events import Event
from headwater.streams import keys
from headwater.streams.base import Feed, FeedSink

logger = logging.getLogger(__name__)

#: Seconds to connect and sign in.
CONNECT_TIMEOUT: Final = 2.0
#: Seconds of silence before a PING, and before the connection counts as dead.
PING_AFTER: Final = 3.0
DEAD_AFTER: Final = 10.0
#: Seconds before a new try; doubles, with jitter.
FIRST_BACKOFF: Final = 0.05
MAX_BACKOFF: Final = 2.0
#: Channels in one SUBSCRIBE.
CHUNK: Final = 500


class FeedRefused(Exception):
    """Redis refuses the subscriptions: wrong password or missing rights. Mend REDIS_URL."""


class RedisFeed(Feed):
    """Follows runs over one connection to the Redis at `url`."""

    def __init__(self, url: str, *, ping_after: float = PING_AFTER, dead_after: float = DEAD_AFTER) -> None:
        self._where = parse_url(url)
        self._ping_after = ping_after
        self._dead_after = dead_after
        self._sink: FeedSink | None = None
        self._task: asyncio.Task[None] | None = None
        self._connection: _Connection | None = None
        #: Channel → run, of all that is followed.
        self._runs: dict[bytes, str] = {}
        #: Runs whose subscription is to be sent or taken back in this turn of the loop, in order.
        self._changed: dict[str, None] = {}

    async def start(self, sink: FeedSink) -> None:
        if self._task is None:
            self._sink = sink
            self._task = asyncio.create_task(self._keep_connected(), name="feed")

    async def stop(self) -> None:
        # First of all: closing the connection ourselves is no loss to report.
        self._sink = None
        self._runs.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def follow(self, run_id: str) -> None:
        self._runs[keys.channel(run_id).encode()] = run_id
        self._change(run_id)

    def unfollow(self, run_id: str) -> None:
        self._runs.pop(keys.channel(run_id).encode(), None)
        self._change(run_id)

    # --- commands -------------------------------------------------------------------------------

    def _change(self, run_id: str) -> None:
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._flush)
        self._changed[run_id] = None

    def _flush(self) -> None:
        """Send what changed in this turn. A run that is followed again is subscribed again, so that it is confirmed."""
        changed = [keys.channel(run_id).encode() for run_id in self._changed]
        self._changed.clear()
        if self._connection is not None:
            self._connection.send_chunked(b"SUBSCRIBE", [name for name in changed if name in self._runs])
            self._connection.send_chunked(b"UNSUBSCRIBE", [name for name in changed if name not in self._runs])

    # --- the connection -------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            try:
                connection = await self._connect()
            except (OSError, TimeoutError, FeedRefused) as error:
                logger.warning("The feed cannot connect: %s: %s", type(error).__name__, error)
            except Exception:
                # A certificate that cannot be read, say. Whoever mends it should not have to restart us.
                logger.exception("The feed cannot connect")
            else:
                backoff = FIRST_BACKOFF
                await self._serve(connection)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
            backoff = min(backoff * 2, MAX_BACKOFF)

    async def _connect(self) -> _Connection:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, connection = await self._open(lambda: _Connection(self._receive))
            try:
                await connection.sign_in(self._where.get("username"), self._where.get("password"))
            except BaseException:
                connection.abort()
                raise
        return connection

    async def _open(self, factory: Callable[[], _Connection]) -> tuple[asyncio.BaseTransport, _Connection]:
        loop = asyncio.get_running_loop()
        where = self._where
        if where.get("path") is not None:
            return await loop.create_unix_connection(factory, where["path"])
        host, port = where.get("host", "localhost"), where.get("port", 6379)
        tls = _tls(where) if "connection_class" in where else None
        return await loop.create_connection(factory, host, port, ssl=tls)

    async def _serve(self, connection: _Connection) -> None:
        """Follow all over this connection until it breaks or falls silent."""
        self._connection = connection
        try:
            connection.send_chunked(b"SUBSCRIBE", list(self._runs))
            while not connection.broken.done():
                await asyncio.wait([connection.broken], timeout=self._ping_after)
                silence = asyncio.get_running_loop().time() - connection.heard_at
                if silence >= self._dead_after:
                    logger.warning("The feed's server has been silent for %.1f s; connecting again", silence)
                    break
                if silence >= self._ping_after:
                    connection.send(b"PING")
        finally:
            self._connection = None
            connection.abort()
            if self._sink is not None:
                self._sink.lost()

    # --- what arrives ---------------------------------------------------------------------------

    def _receive(self, reply: Any) -> None:
        if not isinstance(reply, list) or self._sink is None:
            if isinstance(reply, hiredis.ReplyError):
                logger.error("Redis refuses a command of the feed: %s. Does the user have the right &stream:*?", reply)
            return
        run_id = self._runs.get(reply[1])
        if run_id is None:
            return
        try:
            if reply[0] == b"message":
                self._sink.published(run_id, *parse(reply[2]))
            elif reply[0] == b"subscribe":
                self._sink.subscribed(run_id)
        except Exception:
            # One message that its receiver chokes on must not take the connection of all others along.
            logger.exception("A message of run %s could not be passed on", run_id)


def parse(payload: bytes) -> tuple[str, Sequence[Event]]:
    """Epoch and events of `<epoch> <first seq>\\n<event>\\n<event>…`; no events when it is anything else."""
    head, _, rest = payload.partition(b"\n")
    epoch, _, _ = head.partition(b" ")
    try:
        return epoch.decode(), [Event.decode(line) for line in rest.split(b"\n")] if rest else ()
    except ValueError:
        logger.exception("A published message cannot be read; its readers go to the log instead")
        return "", ()


def _tls(where: Mapping[str, Any]) -> ssl.SSLContext:
    """The URL's `ssl_*` parameters, as redis-py reads them."""
    context = ssl.create_default_context(cafile=where.get("ssl_ca_certs"), capath=where.get("ssl_ca_path"))
    need = str(where.get("ssl_cert_reqs", "required")).lower().removeprefix("cert_")
    if need == "none" or str(where.get("ssl_check_hostname", "true")).lower() in {"false", "0", "no"}:
        context.check_hostname = False
    if need in {"none", "optional"}:
        context.verify_mode = ssl.CERT_NONE if need == "none" else ssl.CERT_OPTIONAL
    if where.get("ssl_certfile"):
        context.load_cert_chain(where["ssl_certfile"], where.get("ssl_keyfile"), where.get("ssl_password"))
    return context


class _Connection(asyncio.Protocol):
    """Bytes to replies and back."""

    def __init__(self, receive: Callable[[Any], None]) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._receive = receive
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._sign_in: asyncio.Future[None] | None = None
        self._awaited = 0
        #: Done once the connection is gone.
        self.broken: asyncio.Future[None] = loop.create_future()
        #: Loop time of the last byte.
        self.heard_at = loop.time()

    async def sign_in(self, username: str | None, password: str | None) -> None:
        """AUTH if need be. Raises FeedRefused, OSError."""
        commands = [[b"CLIENT", b"SETNAME", b"headwater-feed"]]
        if password is not None:
            commands.insert(0, [b"AUTH", *([username.encode()] if username else []), password.encode()])
        self._awaited = len(commands)
        self._sign_in = self._loop.create_future()
        for command in commands:
            self.send(*command)
        await self._sign_in

    def send_chunked(self, verb: bytes, names: Sequence[bytes]) -> None:
        for at in range(0, len(names), CHUNK):
            self.send(verb, *names[at : at + CHUNK])

    def send(self, *parts: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            # hiredis' stub knows tuples of one item only.
            self._transport.write(hiredis.pack_command(cast("Any", parts)))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's by duty, not by descent.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                if self._awaited:
                    self._signed_in(reply)
                else:
                    self._receive(reply)
        except hiredis.ProtocolError as error:
            logger.warning("The feed's server does not speak the Redis protocol: %s", error)
            self.abort()

    def _signed_in(self, reply: Any) -> None:
        self._awaited -= 1
        assert self._sign_in is not None
        if self._sign_in.done():
            return
        # The name, asked for last, is a courtesy to whoever reads CLIENT LIST; some servers forbid it.
        if isinstance(reply, hiredis.ReplyError) and (self._awaited or str(reply).startswith("NOAUTH")):
            self._sign_in.set_exception(FeedRefused(str(reply)))
        elif not self._awaited:
            self._sign_in.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sign_in is not None and not self._sign_in.done():
            self._sign_in.set_exception(exc or ConnectionResetError("the server closed the connection"))
        if not self.broken.done():
            self.broken.set_result(None)
