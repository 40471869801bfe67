"""In front of the application: whose word on where a request came from counts."""

from __future__ import annotations

from typing import Any

import pytest

from headwater.api.server import configure
from headwater.settings import Settings, load_settings

HEADERS = [(b"x-forwarded-for", b"203.0.113.7"), (b"x-forwarded-proto", b"https")]


class Application:
    """Keeps the scope it was asked with."""

    def answer(self, scope: Any, receive: Any, send: Any) -> Any:
        self.scope = scope
        return self._done()

    async def _done(self) -> None:
        pass


@pytest.fixture
def settings() -> Settings:
    return load_settings(_env_file=None)


@pytest.mark.parametrize(
    ("peer", "client", "scheme"),
    [("127.0.0.1", "203.0.113.7", "https"), ("192.0.2.9", "192.0.2.9", "http")],
)
async def test_a_proxy_on_this_host_is_believed_and_nobody_else(
    settings: Settings, peer: str, client: str, scheme: str
) -> None:
    app: Any = Application()
    config = configure(app, settings)
    config.load()
    front: Any = config.loaded_app
    await front({"type": "http", "scheme": "http", "client": (peer, 1), "headers": HEADERS}, None, None)
    assert (app.scope["client"][0], app.scope["scheme"]) == (client, scheme)


async def test_the_lifespan_reaches_the_application(settings: Settings) -> None:
    app: Any = Application()
    front: Any = configure(app, settings).app
    await front({"type": "lifespan"}, None, None)
    assert app.scope == {"type": "lifespan"}
