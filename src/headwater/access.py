"""Access: who may do what. One policy for HTTP, server-sent events, WebSocket and polling.

Three questions, asked in this order:

    1. Is the request meant for this server?   the Host is one we answer to (DNS rebinding)
    2. Did our own page, or no page, send it?  Sec-Fetch-Site, else Origin (cross-site requests)
    3. Who is it?                              bearer token or session cookie, when a token is set

Everything here is a pure function of headers and settings; what is done with the answer is the
transports' business. No message and no `repr` contains the token or a cookie.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from headwater.clock import Clock, SystemClock
from headwater.errors import Forbidden, InvalidInput, NotFound, SignInRequired, TooMany
from headwater.settings import Settings

#: The one owner of today.
LOCAL_OWNER: Final = "local"
#: The cookie's name; `__Host-` goes before it when the connection is encrypted.
COOKIE: Final = "headwater_session"
#: Seconds a sign-in lasts.
SESSION_SECONDS: Final = 30 * 86_400
#: Wrong tokens at the sign-in page that are answered at once, and the seconds until one more is.
SIGN_IN_BURST: Final = 5
SIGN_IN_PAUSE: Final = 2.0

#: Names a public path, or with a slash at its end, all below it. None of them tells about a person.
PUBLIC: Final = ("/healthz", "/readyz", "/sign-in", "/sign-in/", "/favicon.ico", "/static/")
#: Probes come by any address, e.g. a pod's, and learn nothing but up or down.
_PROBES: Final = frozenset({"/healthz", "/readyz"})
#: What a person reaches by following a link from elsewhere: pages, never data.
_DATA: Final = ("/api/", "/v1/", "/conversations/", "/stream/", "/ws/", "/chat/", "/metrics")
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_SESSION_VERSION: Final = "1"
_HOST = re.compile(r"^(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?$")

#: As ASGI has them.
Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. An empty `owner_id` is nobody: public paths only."""

    owner_id: str


NOBODY: Final = Caller("")


def may(caller: Caller, owner_id: str) -> None:
    """Whether the caller may touch what `owner_id` owns. Raises NotFound: a stranger learns nothing."""
    if not caller.owner_id or caller.owner_id != owner_id:
        raise NotFound("There is nothing of that id.")


@dataclass(frozen=True, slots=True)
class _Request:
    headers: Mapping[str, str]
    method: str
    scheme: str
    path: str

    @property
    def websocket(self) -> bool:
        return self.scheme in {"ws", "wss"} or self.headers.get("upgrade", "").lower() == "websocket"

    @property
    def secure(self) -> bool:
        return self.scheme in {"https", "wss"}

    @property
    def origin(self) -> str:
        """The origin of a page of ours that sent this request."""
        return f"{'https' if self.secure else 'http'}://{self.headers.get('host', '')}"


class Access:
    """The policy of one process, from its settings."""

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._hosts = {_name(host) for host in (settings.host, *settings.allowed_hosts)} | {"localhost"}
        token = settings.access_token
        # Only digests are kept: they compare in constant time whatever the length of a guess.
        self._digest = _digest(token.get_secret_value()) if token is not None else None
        self._session_key = _digest("session " + token.get_secret_value()) if token is not None else b""
        self._tries = float(SIGN_IN_BURST)
        self._tried_at = self._clock.monotonic()

    @property
    def token_needed(self) -> bool:
        """Whether callers must sign in."""
        return self._digest is not None

    def authenticate(
        self, headers: Headers, *, method: str, scheme: str, path: str, client: tuple[str, int] | None = None
    ) -> Caller:
        """Who sends this request: an owner, or NOBODY on a public path.

        `scheme` is `http`, `https`, `ws` or `wss`; `client` the peer's address and port, if known.
        Raises Forbidden, with code `host_not_allowed`, `origin_not_allowed` or `client_not_allowed`, and
        SignInRequired.
        """
        request = _Request(_flat(headers), method, scheme, path)
        if path not in _PROBES:
            self._check_host(request)
        proven = _check_site(request)
        caller = self._identify(request, client, proven)
        if caller is not None:
            return caller
        if _public(path):
            return NOBODY
        raise SignInRequired("Send `Authorization: Bearer <HEADWATER_ACCESS_TOKEN>`, or sign in at /sign-in.")

    # --- signing in ------------------------------------------------------------------------------

    def sign_in(self, token: str) -> str:
        """The session's value for a right token, always. Raises SignInRequired, TooMany after several wrong ones."""
        if self._digest is None:
            raise InvalidInput("This server needs no sign-in.")
        # Compared ahead of the limit: whoever sends wrong tokens must not be able to lock out the right one.
        # What keeps guesses away is the token's length; the limit only makes them stand out.
        if not hmac.compare_digest(_digest(token), self._digest):
            raise self._wrong_token()
        issued = str(self._clock.now_ms() // 1000)
        return f"{_SESSION_VERSION}.{issued}.{self._signature(issued)}"

    def _wrong_token(self) -> SignInRequired | TooMany:
        now = self._clock.monotonic()
        self._tries = min(float(SIGN_IN_BURST), self._tries + (now - self._tried_at) / SIGN_IN_PAUSE)
        self._tried_at = now
        if self._tries < 1:
            return TooMany(
                f"Too many wrong tokens. Wait {SIGN_IN_PAUSE:.0f} seconds before a guess; the right one works at once.",
                retry_after=SIGN_IN_PAUSE,
            )
        self._tries -= 1
        return SignInRequired("The token is not right. It is the server's HEADWATER_ACCESS_TOKEN.")

    def session_cookie(self, value: str, *, scheme: str) -> str:
        """The `Set-Cookie` header that carries a session; an empty value signs out."""
        secure = scheme in {"https", "wss"}
        age = SESSION_SECONDS if value else 0
        cookie = f"{_cookie_name(secure)}={value}; Path=/; Max-Age={age}; HttpOnly; SameSite=Strict"
        return cookie + "; Secure" if secure else cookie

    def valid_session(self, value: str) -> bool:
        """Whether `sign_in` made this value, under today's token and not too long ago."""
        if self._digest is None:
            return False
        version, _, rest = value.partition(".")
        issued, _, signature = rest.partition(".")
        if version != _SESSION_VERSION or not re.fullmatch(r"[0-9]{1,12}", issued):
            return False
        genuine = hmac.compare_digest(signature.encode(), self._signature(issued).encode())
        age = self._clock.now_ms() // 1000 - int(issued)
        return genuine and age < SESSION_SECONDS

    def _signature(self, issued: str) -> str:
        message = f"{_SESSION_VERSION}.{issued}".encode()
        return hmac.new(self._session_key, message, hashlib.sha256).hexdigest()

    # --- the three questions ---------------------------------------------------------------------

    def _check_host(self, request: _Request) -> None:
        host = request.headers.get("host", "").lower()
        match = _HOST.match(host)
        name = _name(match[1]) if match else ""
        # An address in the 127 block is no name that somebody could point elsewhere.
        if match is None or not (name in self._hosts or _is_loopback(name)):
            raise _refusal(
                "host_not_allowed",
                f"This server does not answer to the host name {host[:100]!r}. "
                "If it is yours, add it to HEADWATER_ALLOWED_HOSTS.",
            )

    def _identify(self, request: _Request, client: tuple[str, int] | None, proven: bool) -> Caller | None:
        if self._digest is None:
            if client is not None and not _is_local(client[0]):
                raise _refusal(
                    "client_not_allowed",
                    "This server has no HEADWATER_ACCESS_TOKEN, so it answers to its own machine only. "
                    "Set one to use it from elsewhere.",
                )
            return Caller(LOCAL_OWNER)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            right = hmac.compare_digest(_digest(token.strip()), self._digest)
            return Caller(LOCAL_OWNER) if right else None
        # A browser always says where a request with effects comes from. One that does not say so is
        # a program, and a program has the bearer token.
        effects = request.websocket or request.method not in _SAFE
        if effects and not proven:
            return None
        session = _cookies(request.headers.get("cookie", "")).get(_cookie_name(request.secure))
        return Caller(LOCAL_OWNER) if session and self.valid_session(session) else None


def _check_site(request: _Request) -> bool:
    """Refuse what another site's page sent. True when a browser vouches that our own page sent it."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if request.websocket or request.method not in _SAFE:
        allowed = site in {"same-origin", "none"} if site is not None else origin in {None, request.origin}
        if not allowed:
            raise _refusal(
                "origin_not_allowed",
                f"A page of {(origin or 'another site')[:100]} may not do this. Open the server's own page, "
                "or send the request from a program.",
            )
        return site is not None or origin is not None
    # Reading has no effect, but a foreign page could measure it. Following a link to a page is fine.
    link = request.headers.get("sec-fetch-mode") == "navigate" and not request.path.startswith(_DATA)
    if site == "cross-site" and not link and not _public(request.path):
        raise _refusal("origin_not_allowed", "A page of another site may not read this.")
    return True


def _public(path: str) -> bool:
    return any(path.startswith(one) if one.endswith("/") else path == one for one in PUBLIC)


def _refusal(code: str, message: str) -> Forbidden:
    error = Forbidden(message)
    error.code = code
    return error


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _name(host: str) -> str:
    """A host name for comparing: lower case, without port, brackets and a dot at the end."""
    host = host.strip().lower()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    return host.removesuffix(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_local(peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        # A unix socket's peer has no address, so it did not come over a network.
        return True
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _cookie_name(secure: bool) -> str:
    return f"__Host-{COOKIE}" if secure else COOKIE


def _cookies(header: str) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in header.split(";"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def _flat(headers: Headers) -> dict[str, str]:
    """Headers with lower-case text names. One that is given twice is joined, which no check then takes for valid."""
    flat: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        # HTTP/2 allows several cookie headers; they belong together with a semicolon (RFC 9113, 8.2.3).
        glue = "; " if name == "cookie" else ", "
        flat[name] = f"{flat[name]}{glue}{value}" if name in flat else value
    return flat
