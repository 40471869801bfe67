"""Pages and their files: the chat page from `headwater/web`, sign-in, and the API's documentation.

Everything is read once at the start, so that a request costs a look-up and no path can lead out of
the folder. Nothing is loaded from elsewhere, which each page's Content-Security-Policy holds.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException

from headwater.access import Access
from headwater.errors import RequestError
from headwater.transports.base import Receive, Scope, Send

#: Where the files of `headwater/web` are found.
PREFIX: Final = "/static/"

_COMMON: Final = (
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "connect-src 'self'; font-src 'self'; img-src 'self' data:"
)
_PLAIN_CSP: Final = f"default-src 'none'; style-src 'self'; {_COMMON}"
#: Swagger UI sets styles on elements; it runs no inline script.
_DOCS_CSP: Final = f"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; {_COMMON}"
_INLINE = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
_TYPES: Final = {".js": "text/javascript", ".mjs": "text/javascript", ".json": "application/json"}
_HINT: Final = "It is the server's HEADWATER_ACCESS_TOKEN."


@dataclass(frozen=True)
class Page:
    """One file as it is sent."""

    body: bytes
    media_type: str
    csp: str = ""

    @cached_property
    def etag(self) -> str:
        # Weak: the packed and the plain form share it.
        return f'W/"{hashlib.sha256(self.body).hexdigest()[:20]}"'

    @cached_property
    def packed(self) -> bytes:
        """The body as gzip; made at the first request that takes it."""
        return gzip.compress(self.body, 6, mtime=0)


class Pages:
    """A plain ASGI app; `has` says which paths are its own."""

    def __init__(self, access: Access) -> None:
        self._access = access
        own = files("headwater.api") / "html"
        self._pages: dict[str, Page] = {
            "/docs": Page((own / "docs.html").read_bytes(), "text/html; charset=utf-8", _DOCS_CSP),
            "/docs/init.js": Page((own / "docs.js").read_bytes(), "text/javascript; charset=utf-8"),
        }
        web = files("headwater") / "web"
        for path, file in _walk(web, ""):
            self._pages[PREFIX + path] = Page(file.read_bytes(), _media_type(path))
        index = self._pages.pop(f"{PREFIX}index.html")
        self._pages["/"] = Page(index.body, index.media_type, page_csp(index.body))
        #: With places for `{message}`, `{role}` and `{invalid}`.
        self._form = self._pages.pop(f"{PREFIX}sign-in.html").body.decode()
        self._pages["/favicon.ico"] = self._pages[f"{PREFIX}favicon.svg"]

    def has(self, path: str) -> bool:
        return path in self._pages or path in {"/sign-in", "/sign-out"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/sign-out":
            _only(method, "POST")
            cookie = self._access.session_cookie("", scheme=scope.get("scheme", "http"))
            await _redirect(send, "/sign-in", cookie)
        elif path == "/sign-in":
            _only(method, "GET", "HEAD", "POST")
            await self._sign_in(scope, receive, send)
        else:
            _only(method, "GET", "HEAD")
            await _file(self._pages[path], scope, send)

    async def _sign_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._access.token_needed:
            await _redirect(send, "/")
            return
        if scope["method"] != "POST":
            await _file(self._sign_in_page(""), scope, send)
            return
        body = (await receive()).get("body", b"")
        token = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[-1]
        try:
            session = self._access.sign_in(token.strip())
        except RequestError as error:
            await _file(self._sign_in_page(str(error)), scope, send, error.status)
            return
        await _redirect(send, "/", self._access.session_cookie(session, scheme=scope.get("scheme", "http")))

    def _sign_in_page(self, error: str) -> Page:
        page = (
            self._form.replace("{message}", html.escape(error or _HINT))
            .replace("{role}", ' role="alert"' if error else "")
            .replace("{invalid}", ' aria-invalid="true"' if error else "")
        )
        return Page(page.encode(), "text/html; charset=utf-8", _PLAIN_CSP)


def page_csp(index: bytes) -> str:
    """The policy of the chat page: its own scripts, and of inline ones exactly what is in the file (an import map)."""
    hashes = "".join(
        f" 'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in _INLINE.findall(index)
    )
    return f"default-src 'none'; script-src 'self'{hashes}; style-src 'self'; {_COMMON}"


async def _file(page: Page, scope: Scope, send: Send, status: int = 200) -> None:
    sent = {name: value.decode("latin-1") for name, value in scope["headers"]}
    headers = {
        "content-type": page.media_type,
        # Asked for every time and answered with 304: a new version is never mixed with an old one.
        "cache-control": "no-cache" if status == 200 else "no-store",
        "etag": page.etag,
        "vary": "accept-encoding",
        **({"content-security-policy": page.csp} if page.csp else {}),
    }
    body = page.body
    if status == 200 and page.etag in sent.get(b"if-none-match", ""):
        status, body = 304, b""
        del headers["content-type"]
    elif "gzip" in sent.get(b"accept-encoding", "") and len(body) > 1000:
        body = page.packed
        headers["content-encoding"] = "gzip"
    if status != 304:
        headers["content-length"] = str(len(body))
    await _respond(send, status, headers, b"" if scope["method"] == "HEAD" else body)


async def _redirect(send: Send, where: str, cookie: str | None = None) -> None:
    headers = {"location": where, "content-length": "0", **({"set-cookie": cookie} if cookie else {})}
    await _respond(send, 303, headers, b"")


async def _respond(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _only(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise HTTPException(405, f"Use {' or '.join(allowed)}.", headers={"Allow": ", ".join(allowed)})


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found: list[tuple[str, Traversable]] = []
    for entry in folder.iterdir():
        if entry.name.startswith((".", "__")):
            continue
        path = prefix + entry.name
        found += _walk(entry, path + "/") if entry.is_dir() else [(path, entry)]
    return found


def _media_type(path: str) -> str:
    suffix = path[path.rfind(".") :]
    guessed = _TYPES.get(suffix) or mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"{guessed}; charset=utf-8" if guessed.startswith("text/") or guessed.endswith("json") else guessed
