"""The policy, as a table of requests and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from headwater.access import LOCAL_OWNER, NOBODY, SESSION_SECONDS, SIGN_IN_BURST, SIGN_IN_PAUSE, Access, Caller, may
from headwater.clock import FrozenClock
from headwater.errors import Forbidden, InvalidInput, NotFound, SignInRequired, TooMany
from headwater.settings import Settings

TOKEN = "correct-horse-battery-staple"
LOCAL = {"host": "127.0.0.1:5000"}
SAME = {"sec-fetch-site": "same-origin"}
CROSS = {"sec-fetch-site": "cross-site"}
BEARER = {"authorization": f"Bearer {TOKEN}"}

LOCAL_CALLER = Caller(LOCAL_OWNER)


def settings(**changes: Any) -> Settings:
    return Settings(_env_file=None, **changes)


def guarded(**changes: Any) -> Access:
    return Access(settings(access_token=SecretStr(TOKEN), **changes), clock=FrozenClock())


def ask(access: Access, line: str, headers: dict[str, str], client: tuple[str, int] | None = None) -> Caller | str:
    """What becomes of `METHOD scheme path`: the caller, or the error's code."""
    method, scheme, path = line.split()
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    try:
        return access.authenticate(raw, method=method, scheme=scheme, path=path, client=client)
    except (Forbidden, SignInRequired) as error:
        return error.code


OPEN_TABLE: list[tuple[str, dict[str, str], Caller | str]] = [
    # The Host.
    ("GET http /api/chats", LOCAL, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "localhost"}, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "LOCALHOST:80"}, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "localhost.:5000"}, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "[::1]:5000"}, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "127.0.0.9:1"}, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "chat.example"}, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "chat.example:8443"}, LOCAL_CALLER),
    ("GET http /api/chats", {"host": "evil.example"}, "host_not_allowed"),
    ("GET http /api/chats", {"host": "localhost.evil.example"}, "host_not_allowed"),
    ("GET http /api/chats", {"host": "127.0.0.1.evil.example"}, "host_not_allowed"),
    ("GET http /api/chats", {"host": "evil.example:127.0.0.1"}, "host_not_allowed"),
    ("GET http /api/chats", {"host": "localhost@evil.example"}, "host_not_allowed"),
    ("GET http /api/chats", {"host": "localhost, evil.example"}, "host_not_allowed"),
    ("GET http /api/chats", {"host": "[::ffff:10.0.0.1]"}, "host_not_allowed"),
    ("GET http /api/chats", {"host": ""}, "host_not_allowed"),
    ("GET http /api/chats", {}, "host_not_allowed"),
    ("GET http /", {"host": "evil.example"}, "host_not_allowed"),
    ("GET http /sign-in", {"host": "evil.example"}, "host_not_allowed"),
    ("GET http /healthz", {"host": "10.1.2.3:5000"}, LOCAL_CALLER),
    ("GET ws /ws/1", {"host": "evil.example"}, "host_not_allowed"),
    # What has effects.
    ("POST http /api/chats", LOCAL, LOCAL_CALLER),
    ("POST http /api/chats", LOCAL | SAME, LOCAL_CALLER),
    ("POST http /api/chats", LOCAL | {"sec-fetch-site": "none"}, LOCAL_CALLER),
    ("POST http /api/chats", LOCAL | {"sec-fetch-site": "same-site"}, "origin_not_allowed"),
    ("POST http /api/chats", LOCAL | CROSS, "origin_not_allowed"),
    ("POST http /api/chats", LOCAL | CROSS | {"origin": "http://127.0.0.1:5000"}, "origin_not_allowed"),
    ("POST http /api/chats", LOCAL | {"origin": "http://127.0.0.1:5000"}, LOCAL_CALLER),
    ("POST http /api/chats", LOCAL | {"origin": "https://127.0.0.1:5000"}, "origin_not_allowed"),
    ("POST http /api/chats", LOCAL | {"origin": "http://127.0.0.1:3000"}, "origin_not_allowed"),
    ("POST http /api/chats", LOCAL | {"origin": "http://evil.example"}, "origin_not_allowed"),
    ("POST http /api/chats", LOCAL | {"origin": "null"}, "origin_not_allowed"),
    ("PATCH http /api/chats/1", LOCAL | CROSS, "origin_not_allowed"),
    ("DELETE http /api/chats/1", LOCAL | CROSS, "origin_not_allowed"),
    ("PURGE http /", LOCAL | CROSS, "origin_not_allowed"),
    ("POST http /sign-in", LOCAL | CROSS, "origin_not_allowed"),
    ("POST https /api/chats", LOCAL | {"origin": "https://127.0.0.1:5000"}, LOCAL_CALLER),
    # WebSocket: its handshake is a GET, and browsers let any page open one.
    ("GET ws /ws/1", LOCAL, LOCAL_CALLER),
    ("GET ws /ws/1", LOCAL | {"origin": "http://127.0.0.1:5000"}, LOCAL_CALLER),
    ("GET ws /ws/1", LOCAL | {"origin": "http://evil.example"}, "origin_not_allowed"),
    ("GET ws /chat/stream", LOCAL | CROSS, "origin_not_allowed"),
    ("GET http /ws/1", LOCAL | {"upgrade": "WebSocket", "origin": "http://evil.example"}, "origin_not_allowed"),
    # Reading.
    ("GET http /api/chats", LOCAL | SAME, LOCAL_CALLER),
    ("GET http /api/chats", LOCAL | CROSS, "origin_not_allowed"),
    ("GET http /api/stream/1", LOCAL | CROSS, "origin_not_allowed"),
    ("GET http /api/export", LOCAL | CROSS | {"sec-fetch-mode": "navigate"}, "origin_not_allowed"),
    ("GET http /", LOCAL | CROSS | {"sec-fetch-mode": "navigate"}, LOCAL_CALLER),
    ("GET http /docs", LOCAL | CROSS | {"sec-fetch-mode": "navigate"}, LOCAL_CALLER),
    ("GET http /", LOCAL | CROSS | {"sec-fetch-mode": "no-cors"}, "origin_not_allowed"),
    ("GET http /healthz", LOCAL | CROSS, LOCAL_CALLER),
]


@pytest.mark.parametrize(("line", "headers", "outcome"), OPEN_TABLE)
def test_without_a_token(line: str, headers: dict[str, str], outcome: Caller | str) -> None:
    access = Access(settings(allowed_hosts=("chat.example:443",)))
    assert ask(access, line, headers) == outcome


@pytest.mark.parametrize(
    ("client", "outcome"),
    [
        (("127.0.0.1", 1), LOCAL_CALLER),
        (("::1", 1), LOCAL_CALLER),
        (("::ffff:127.0.0.1", 1), LOCAL_CALLER),
        (("", 0), LOCAL_CALLER),
        (None, LOCAL_CALLER),
        (("192.168.1.7", 1), "client_not_allowed"),
        (("::ffff:192.168.1.7", 1), "client_not_allowed"),
    ],
)
def test_without_a_token_only_this_machine_is_answered(client: tuple[str, int] | None, outcome: Caller | str) -> None:
    assert ask(Access(settings()), "GET http /api/chats", LOCAL, client) == outcome


GUARDED_TABLE: list[tuple[str, dict[str, str], Caller | str]] = [
    # Public paths: nobody in particular.
    ("GET http /healthz", LOCAL, NOBODY),
    ("GET http /readyz", {"host": "10.1.2.3"}, NOBODY),
    ("GET http /sign-in", LOCAL, NOBODY),
    ("POST http /sign-in", LOCAL | SAME, NOBODY),
    ("GET http /static/page.css", LOCAL, NOBODY),
    # Everything else needs somebody.
    ("GET http /", LOCAL, "sign_in_required"),
    ("GET http /sign-in-not", LOCAL, "sign_in_required"),
    ("GET http /healthz/x", LOCAL, "sign_in_required"),
    ("GET http /metrics", LOCAL, "sign_in_required"),
    ("GET http /docs", LOCAL, "sign_in_required"),
    ("GET http /api/chats", LOCAL, "sign_in_required"),
    ("GET http /api/stream/1", LOCAL, "sign_in_required"),
    ("GET ws /ws/1", LOCAL, "sign_in_required"),
    ("POST http /api/chats", LOCAL, "sign_in_required"),
    ("POST http /v1/chat/completions", LOCAL, "sign_in_required"),
    # The bearer token.
    ("GET http /api/chats", LOCAL | BEARER, LOCAL_CALLER),
    ("GET http /api/chats", LOCAL | {"authorization": f"bearer {TOKEN}"}, LOCAL_CALLER),
    ("POST http /api/chats", LOCAL | BEARER, LOCAL_CALLER),
    ("GET ws /ws/1", LOCAL | BEARER, LOCAL_CALLER),
    ("GET http /api/chats", LOCAL | {"authorization": f"Bearer {TOKEN}x"}, "sign_in_required"),
    ("GET http /api/chats", LOCAL | {"authorization": "Bearer "}, "sign_in_required"),
    ("GET http /api/chats", LOCAL | {"authorization": f"Basic {TOKEN}"}, "sign_in_required"),
    ("GET http /api/chats", LOCAL | {"authorization": TOKEN}, "sign_in_required"),
    # A token does not open the door to foreign pages and names.
    ("POST http /api/chats", LOCAL | BEARER | CROSS, "origin_not_allowed"),
    ("GET http /api/chats", BEARER | {"host": "evil.example"}, "host_not_allowed"),
    # The cookie is not the token.
    ("GET http /api/chats", LOCAL | {"cookie": f"headwater_session={TOKEN}"}, "sign_in_required"),
    ("GET http /api/chats", LOCAL | {"cookie": "headwater_session="}, "sign_in_required"),
    ("GET http /api/chats", LOCAL | {"cookie": "headwater_session=1.1.1"}, "sign_in_required"),
]


@pytest.mark.parametrize(("line", "headers", "outcome"), GUARDED_TABLE)
@pytest.mark.parametrize("client", [("127.0.0.1", 1), ("192.168.1.7", 1)])
def test_with_a_token(line: str, headers: dict[str, str], outcome: Caller | str, client: tuple[str, int]) -> None:
    assert ask(guarded(), line, headers, client) == outcome


SESSION_TABLE: list[tuple[str, dict[str, str], Caller | str]] = [
    ("GET http /", LOCAL, LOCAL_CALLER),
    ("GET http /api/stream/1", LOCAL | SAME, LOCAL_CALLER),
    ("POST http /api/chats", LOCAL | SAME, LOCAL_CALLER),
    ("POST http /api/chats", LOCAL | {"origin": "http://127.0.0.1:5000"}, LOCAL_CALLER),
    ("GET ws /ws/1", LOCAL | {"origin": "http://127.0.0.1:5000"}, LOCAL_CALLER),
    # No browser omits both headers, so this is a program with somebody's cookie.
    ("POST http /api/chats", LOCAL, "sign_in_required"),
    ("GET ws /ws/1", LOCAL, "sign_in_required"),
    # A wrong bearer token is not made good by a cookie.
    ("GET http /api/chats", LOCAL | {"authorization": "Bearer wrong"}, "sign_in_required"),
    # Over https the cookie has its own name, which a plain-http page cannot set.
    ("GET https /api/chats", LOCAL, "sign_in_required"),
]


@pytest.mark.parametrize(("line", "headers", "outcome"), SESSION_TABLE)
def test_with_a_session(line: str, headers: dict[str, str], outcome: Caller | str) -> None:
    access = guarded()
    cookie = {"cookie": f"theme=dark; headwater_session={access.sign_in(TOKEN)}; x=y"}
    assert ask(access, line, headers | cookie) == outcome


def test_a_session_over_https_is_bound_to_the_host() -> None:
    access = guarded()
    value = access.sign_in(TOKEN)
    cookie = access.session_cookie(value, scheme="https")
    assert cookie.startswith(f"__Host-headwater_session={value}; Path=/; ")
    assert cookie.endswith("; HttpOnly; SameSite=Strict; Secure")
    headers = LOCAL | {"cookie": f"__Host-headwater_session={value}"}
    assert ask(access, "GET https /api/chats", headers) == LOCAL_CALLER


def test_a_session_over_http_cannot_be_read_by_scripts() -> None:
    cookie = guarded().session_cookie("1.2.3", scheme="http")
    assert cookie == (f"headwater_session=1.2.3; Path=/; Max-Age={SESSION_SECONDS}; HttpOnly; SameSite=Strict")


def test_signing_out_takes_the_cookie_away() -> None:
    assert "headwater_session=; Path=/; Max-Age=0" in guarded().session_cookie("", scheme="http")


def test_a_session_ends_after_its_time() -> None:
    clock = FrozenClock()
    access = Access(settings(access_token=SecretStr(TOKEN)), clock=clock)
    value = access.sign_in(TOKEN)
    clock.advance(SESSION_SECONDS - 1)
    assert access.valid_session(value)
    clock.advance(1)
    assert not access.valid_session(value)


def test_a_session_does_not_survive_a_new_token() -> None:
    value = guarded().sign_in(TOKEN)
    assert guarded().valid_session(value), "another process with the same token takes it"
    other = Access(settings(access_token=SecretStr("another-token-altogether")), clock=FrozenClock())
    assert not other.valid_session(value)
    assert not Access(settings()).valid_session(value)


@pytest.mark.parametrize("position", range(3))
def test_a_session_with_any_part_changed_is_refused(position: int) -> None:
    access = guarded()
    parts = access.sign_in(TOKEN).split(".")
    parts[position] = parts[position][:-1] + ("0" if parts[position][-1] != "0" else "1")
    assert not access.valid_session(".".join(parts))


@pytest.mark.parametrize(
    "value", ["", ".", "..", "1", "1..", "1.x.y", "1.-1.y", "1.1.é", "2.1.1", "1." + "9" * 40 + ".x"]
)
def test_a_malformed_session_is_refused(value: str) -> None:
    assert not guarded().valid_session(value)


def test_wrong_tokens_are_slowed_down_and_then_forgiven() -> None:
    clock = FrozenClock()
    access = Access(settings(access_token=SecretStr(TOKEN)), clock=clock)
    for _ in range(SIGN_IN_BURST):
        with pytest.raises(SignInRequired):
            access.sign_in("wrong")
    with pytest.raises(TooMany):
        access.sign_in("wrong")
    clock.advance(SIGN_IN_PAUSE)
    with pytest.raises(SignInRequired):
        access.sign_in("wrong")


def test_right_tokens_are_never_slowed_down_whatever_others_send() -> None:
    access = guarded()
    for _ in range(SIGN_IN_BURST * 3):
        access.sign_in(TOKEN)
        with pytest.raises((SignInRequired, TooMany)):
            access.sign_in("wrong")
    with pytest.raises(TooMany):
        access.sign_in("wrong")
    assert access.valid_session(access.sign_in(TOKEN))


def test_a_server_without_a_token_has_no_sign_in() -> None:
    with pytest.raises(InvalidInput):
        Access(settings()).sign_in("")


def test_strangers_are_told_that_there_is_nothing() -> None:
    may(LOCAL_CALLER, LOCAL_OWNER)
    for caller, owner in [(LOCAL_CALLER, "somebody"), (NOBODY, LOCAL_OWNER), (NOBODY, "")]:
        with pytest.raises(NotFound) as caught:
            may(caller, owner)
        assert "somebody" not in str(caught.value)


def test_the_token_shows_nowhere() -> None:
    access = guarded()
    session = access.sign_in(TOKEN)
    shown = f"{access!r} {access} {vars(access)!r} {session}"
    assert TOKEN not in shown
    for guess in ("wrong", TOKEN[:-1], "\ud800"):
        with pytest.raises(SignInRequired) as caught:
            access.sign_in(guess)
        assert TOKEN not in repr(caught.value)
        assert guess not in str(caught.value)


def test_a_header_given_twice_is_not_taken_for_valid() -> None:
    twice = [(b"host", b"localhost"), (b"host", b"localhost")]
    with pytest.raises(Forbidden):
        Access(settings()).authenticate(twice, method="GET", scheme="http", path="/")
    access = guarded()
    bearer = f"Bearer {TOKEN}".encode()
    pairs = [(b"host", b"localhost"), (b"authorization", bearer), (b"authorization", bearer)]
    with pytest.raises(SignInRequired):
        access.authenticate(pairs, method="GET", scheme="http", path="/")
