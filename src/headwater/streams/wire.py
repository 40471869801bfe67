"""A raw connection to Redis: bytes to replies and back, with hiredis and nothing else in between.

For what passes by the thousand a second, published messages and appends; redis-py's own connections
cost twenty times as much a command. RESP2: the same answers from Redis 6.2 to Valkey 9.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, cast

import hiredis

logger = logging.getLogger(__name__)

Receive = Callable[[Any], None]


class Refused(Exception):
    """Redis refuses the connection: wrong password or missing rights. Mend REDIS_URL."""


async def connect(where: Mapping[str, Any], name: bytes, receive: Receive, *, database: int = 0) -> Connection:
    """A connection that is signed in. `where` is what redis-py's `parse_url` gives. Raises Refused, OSError.

    `receive` gets each reply: values, lists and `hiredis.ReplyError`.
    """

    def factory() -> Connection:
        return Connection(receive)

    loop = asyncio.get_running_loop()
    if where.get("path") is not None:
        _, connection = await loop.create_unix_connection(factory, where["path"])
    else:
        host, port = where.get("host", "localhost"), where.get("port", 6379)
        tls = _tls(where) if "connection_class" in where else None
        transport, connection = await loop.create_connection(factory, host, port, ssl=tls)
        # It may be gone again already, which uvloop says with a RuntimeError; the sign-in tells.
        with contextlib.suppress(OSError, RuntimeError):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        await connection.sign_in(where.get("username"), where.get("password"), database, name)
    except BaseException:
        connection.abort()
        raise
    return connection


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


def _ignore(_reply: Any) -> None:
    pass


class Connection(asyncio.Protocol):
    """Bytes to replies and back."""

    def __init__(self, receive: Receive) -> None:
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

    async def sign_in(self, username: str | None, password: str | None, database: int, name: bytes) -> None:
        """AUTH and SELECT if need be. Raises Refused, OSError."""
        commands: list[list[bytes]] = []
        if password is not None:
            commands.append([b"AUTH", *([username.encode()] if username else []), password.encode()])
        if database:
            commands.append([b"SELECT", b"%d" % database])
        commands.append([b"CLIENT", b"SETNAME", name])
        self._awaited = len(commands)
        self._sign_in = self._loop.create_future()
        for command in commands:
            self.send(*command)
        await self._sign_in

    def send(self, *parts: bytes) -> None:
        # hiredis' stub knows tuples of one item only.
        self.write(hiredis.pack_command(cast("Any", parts)))

    def write(self, packed: bytes) -> None:
        """Send commands that are encoded already. Nothing happens on a connection that is gone: see `broken`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(packed)

    def abort(self) -> None:
        # What is in the reader's buffer already counts no more.
        self._receive = _ignore
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
            logger.warning("The server does not speak the Redis protocol: %s", error)
            self.abort()

    def _signed_in(self, reply: Any) -> None:
        self._awaited -= 1
        assert self._sign_in is not None
        if self._sign_in.done():
            return
        # The name, asked for last, is a courtesy to whoever reads CLIENT LIST; some servers forbid it.
        if isinstance(reply, hiredis.ReplyError) and (self._awaited or str(reply).startswith("NOAUTH")):
            self._sign_in.set_exception(Refused(str(reply)))
        elif not self._awaited:
            self._sign_in.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sign_in is not None and not self._sign_in.done():
            self._sign_in.set_exception(exc or ConnectionResetError("the server closed the connection"))
        if not self.broken.done():
            self.broken.set_result(None)
