"""A real Chromium for the session, and a visitor with a clean profile for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest_asyncio
from playwright.async_api import Browser, async_playwright

from browser.visitor import Visitor
from support.openai_server import OpenAIServer
from support.stack import Stack

#: Where distributions put it; otherwise Playwright's own download is used.
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
#: Nothing but the page under test may use the network.
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Visit = Callable[..., Awaitable[Visitor]]


@pytest_asyncio.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        await browser.close()


@pytest_asyncio.fixture
async def visit(browser: Browser, stack: Stack, openai_server: OpenAIServer) -> AsyncIterator[Visit]:
    """`await visit()` opens the page; `await visit(other_stack, width=360)` another one, on a phone."""
    visitors: list[Visitor] = []

    async def open_page(at: Stack | None = None, *, width: int = 1280, height: int = 800, **options: Any) -> Visitor:
        context = await browser.new_context(viewport={"width": width, "height": height}, **options)
        visitor = Visitor(context, (at or stack).base_url, openai_server)
        visitors.append(visitor)
        await visitor.arrive()
        return visitor

    yield open_page
    for visitor in visitors:
        await visitor.leave()
    for visitor in visitors:
        visitor.assert_undisturbed()


@pytest_asyncio.fixture
async def visitor(visit: Visit) -> Visitor:
    """Somebody who has just opened the page."""
    return await visit()
