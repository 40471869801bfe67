"""Somebody at the page, in a user's words; and the hand on the model's tap."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.async_api import BrowserContext, Dialog, Locator, Page, Request, expect

from support.openai_scenarios import Scenario, Step, chunk
from support.openai_server import OpenAIServer
from support.wait import eventually

#: Milliseconds; generous, as the machine may be busy.
PATIENCE = 30_000
expect.set_options(timeout=PATIENCE)

_numbers = itertools.count(1)


def script(name: str) -> str:
    """The function in `checks/<name>.js`."""
    return (Path(__file__).parent / "checks" / f"{name}.js").read_text().rstrip().removesuffix(";")


class Visitor:
    """One browser profile with one page."""

    def __init__(self, context: BrowserContext, url: str, model: OpenAIServer) -> None:
        self.context = context
        self.url = url
        self.model = model
        self.page: Page
        #: Requests to other hosts, dialogs and uncaught errors; none may happen.
        self.disturbances: list[str] = []
        #: Addresses of the streams that are open now, and the most that were open at once.
        self.streams: list[Request] = []
        self.most_streams = 0

    async def arrive(self) -> None:
        self.context.set_default_timeout(PATIENCE)
        self.page = await self.context.new_page()
        self.page.on("request", self._requested)
        self.page.on("requestfinished", self._ended)
        self.page.on("requestfailed", self._ended)
        self.page.on("pageerror", lambda error: self.disturbances.append(f"uncaught: {error}"))
        self.page.on("dialog", self._dialog)
        await self.page.goto(self.url)

    async def leave(self) -> None:
        # Requests that a test has in hand, such as the health that is asked for every ten seconds.
        await self.page.unroute_all(behavior="ignoreErrors")
        await self.context.close()

    def assert_undisturbed(self) -> None:
        assert not self.disturbances, self.disturbances

    def _requested(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc and not request.url.startswith("data:"):
            self.disturbances.append(f"request to {request.url}")
        if "/api/stream" in request.url:
            self.streams.append(request)
            self.most_streams = max(self.most_streams, len(self.streams))

    def _ended(self, request: Request) -> None:
        if request in self.streams:
            self.streams.remove(request)

    async def _dialog(self, dialog: Dialog) -> None:
        self.disturbances.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    # The model

    def script(self, *parts: str | Step) -> str:
        """The model will answer with these pieces of text and steps; put the result into the question."""
        name = f"page-{next(_numbers)}"
        self.rescript(name, *parts)
        return f"[[scenario:{name}]]"

    def rescript(self, mark: str, *parts: str | Step) -> None:
        """From now on it answers so."""
        steps: list[Step] = [{"chunk": chunk(part)} if isinstance(part, str) else part for part in parts]
        end: list[Step] = [
            {"chunk": chunk(finish="stop")},
            {"chunk": chunk(choices=False, usage=(7, 3))},
            {"done": True},
        ]
        self.model.scenarios[self.name(mark)] = Scenario([*steps, *end])

    def refuse(self, mark: str, scenario: Scenario) -> None:
        self.model.scenarios[self.name(mark)] = scenario

    @staticmethod
    def name(mark: str) -> str:
        found = re.search(r"\[\[scenario:([\w-]+)\]\]", mark)
        return found[1] if found else mark

    def let(self, *names: str) -> None:
        """Let the model go on that waits for these."""
        for name in names:
            self.model.release(name)

    # Acting

    async def ask(self, text: str) -> None:
        await self.page.get_by_label("Message", exact=True).fill(text)
        await self.page.keyboard.press("Enter")
        await expect(self.questions.filter(has_text=text).last).to_be_visible()

    async def new_chat(self) -> None:
        await self.page.get_by_role("button", name="New chat", exact=True).click()
        await expect(self.page.get_by_role("heading", name="What is on your mind?")).to_be_visible()

    async def open_chat(self, title: str) -> None:
        await self.chat(title).get_by_role("link").click()

    async def stop(self) -> None:
        await self.page.get_by_role("button", name="Stop answering").click()

    async def press(self, button: str, within: Locator | None = None) -> None:
        await (within or self.page).get_by_role("button", name=button).click()

    async def refresh(self) -> None:
        await self.page.reload()

    async def open_log(self) -> None:
        await self.page.get_by_role("button", name="System log", exact=True).click()

    # Seeing

    @property
    def questions(self) -> Locator:
        return self.page.get_by_role("article", name="You")

    @property
    def answers(self) -> Locator:
        return self.page.get_by_role("article", name="Assistant")

    @property
    def answer(self) -> Locator:
        """The newest answer's text."""
        return self.answers.last.locator(".markdown").last

    @property
    def field(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    def chat(self, title: str) -> Locator:
        """A chat in the side bar."""
        return self.page.get_by_role("navigation", name="Chats").get_by_role("listitem").filter(has_text=title)

    def mark(self, title: str, says: str) -> Locator:
        return self.chat(title).get_by_role("img", name=says)

    async def reads(self, text: str) -> None:
        """The newest answer is exactly this."""
        await expect(self.answer).to_have_text(text)

    async def finished(self) -> None:
        await expect(self.answers.last).to_have_attribute("aria-busy", "false")

    async def answering(self) -> None:
        await expect(self.answers.last).to_have_attribute("aria-busy", "true")

    async def check(self, name: str, within: Locator | None = None) -> Any:
        """What the script `checks/<name>.js` says of the page, or of a part of it."""
        return await (within or self.page).evaluate(script(name))

    async def copied(self, text: str) -> None:
        """The clipboard has exactly this, a moment after the button was pressed."""

        async def there() -> bool:
            assert await self.page.evaluate("navigator.clipboard.readText()") == text
            return True

        await eventually(there)

    async def heard(self, says: str) -> None:
        """A screen reader is told."""
        await expect(self.page.locator("#announcer")).to_have_text(says)

    async def titles(self) -> list[str]:
        return await self.page.locator(".chat .title").all_inner_texts()
