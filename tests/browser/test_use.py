"""Using the page: keyboard, screen reader, small screens, colours, and the list of chats."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from playwright.async_api import Route, expect

from browser.conftest import Visit
from browser.visitor import Visitor
from support.stack import StackMaker

EVERYTHING = """# Title

Text with `code`, a [link](https://example.com) and

> a quote

```python
# note
x = 'a' + 1
```

| a | b |
|---|---|
| 1 | 2 |
"""


async def _fill(visitor: Visitor) -> None:
    await visitor.ask("Everything " + visitor.script(EVERYTHING))
    await visitor.finished()
    mark = visitor.script()
    visitor.refuse(mark, visitor.model.scenarios["auth"])
    await visitor.ask("And a failure " + mark)
    await expect(visitor.answers.last.locator(".failure")).to_be_visible()


@pytest.mark.parametrize("colours", ["light", "dark"])
async def test_everything_has_a_name_and_enough_contrast(visit: Visit, colours: Any) -> None:
    visitor = await visit(color_scheme=colours)
    assert await visitor.check("flaws") == []
    await _fill(visitor)
    await visitor.open_log()
    await expect(visitor.answers.first.locator(".hljs-string")).to_be_visible()
    assert await visitor.check("flaws") == []
    assert await visitor.check("contrasts") == []


async def test_a_chosen_theme_holds_after_a_refresh(visit: Visit) -> None:
    visitor = await visit(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = await visitor.page.evaluate(background)
    toggle = visitor.page.get_by_role("button", name=re.compile("^Colours"))
    await toggle.click()
    await expect(visitor.page.get_by_role("button", name="Colours: light")).to_be_visible()
    # Looked at in the very turn the label changes: label and colours are one change.
    dark = await toggle.evaluate(
        f"""button => new Promise(resolve => {{
            new MutationObserver(() => resolve({background})).observe(button, {{ attributes: true }});
            button.click();
        }})"""
    )
    assert dark != light
    await visitor.refresh()
    await expect(visitor.page.get_by_role("button", name="Colours: dark")).to_be_visible()
    assert await visitor.page.evaluate(background) != light


async def test_a_whole_conversation_by_keyboard(visitor: Visitor) -> None:
    keyboard = visitor.page.keyboard
    await expect(visitor.field).to_be_focused()
    await keyboard.type("Two")
    await keyboard.press("Shift+Enter")
    await keyboard.type("lines " + visitor.script("Half", {"hang": True}))
    await keyboard.press("Enter")
    await visitor.reads("Half")
    assert await visitor.questions.first.locator(".bubble").inner_text() == "Two\n" + await _second_line(visitor)
    await keyboard.press("Escape")
    await expect(visitor.answers.last).to_contain_text("You stopped this answer.")
    await keyboard.press("Control+k")
    await expect(visitor.page.get_by_role("searchbox")).to_be_focused()
    await keyboard.type("no such chat anywhere")
    await expect(visitor.page.get_by_role("navigation", name="Chats")).to_contain_text("No chat is called")
    await keyboard.press("Control+a")
    await keyboard.press("Delete")
    await expect(visitor.page.locator(".chat.current")).to_have_count(1)
    # Delete this chat without a mouse: from the search to the list, to its verbs, to the question.
    await visitor.page.locator(".chat.current a").focus()
    await keyboard.press("Tab")
    await keyboard.press("Tab")
    await keyboard.press("Enter")
    await expect(visitor.page.get_by_role("dialog")).to_be_visible()
    await expect(visitor.page.get_by_role("button", name="Keep it")).to_be_focused()
    await keyboard.press("Escape")
    await expect(visitor.page.get_by_role("dialog")).to_have_count(0)
    await expect(visitor.page.get_by_role("button", name=re.compile("^Delete Two"))).to_be_focused()


async def _second_line(visitor: Visitor) -> str:
    return (await visitor.questions.first.locator(".bubble").inner_text()).partition("\n")[2]


async def test_the_focus_is_always_visible(visitor: Visitor) -> None:
    await visitor.ask("Focus")
    await visitor.finished()
    seen = set()
    for _ in range(25):
        await visitor.page.keyboard.press("Tab")
        outlined, what = await visitor.check("focus")
        assert outlined, what
        seen.add(what)
    assert len(seen) > 8


async def test_chats_are_renamed_found_and_deleted(visitor: Visitor) -> None:
    await visitor.ask("Quokka facts")
    await visitor.finished()
    await visitor.press("Rename Quokka facts")
    await visitor.page.get_by_label("Title of the chat").fill("Small marsupials")
    await visitor.page.keyboard.press("Enter")
    await expect(visitor.chat("Small marsupials")).to_have_count(1)
    await expect(visitor.page.get_by_role("heading", level=1)).to_have_text("Small marsupials")
    await visitor.page.get_by_role("searchbox").fill("MARSUP")
    await expect(visitor.page.locator(".chat")).to_have_count(1)
    await visitor.press("Delete Small marsupials")
    await visitor.page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    await expect(visitor.chat("Small marsupials")).to_have_count(1)
    await visitor.press("Delete Small marsupials")
    await visitor.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    await expect(visitor.chat("Small marsupials")).to_have_count(0)
    await expect(visitor.page.get_by_role("heading", name="What is on your mind?")).to_be_visible()


async def test_deleting_a_chat_that_answers_ends_it(visitor: Visitor) -> None:
    await visitor.ask("Doomed " + visitor.script("Never ", {"hang": True}))
    await visitor.reads("Never")
    await visitor.press("Delete Doomed")
    await visitor.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    await expect(visitor.chat("Doomed")).to_have_count(0)
    async with visitor.page.expect_response("**/api/chats?*") as answer:
        await visitor.refresh()
    assert "Doomed" not in await (await answer.value).text()
    await expect(visitor.chat("Doomed")).to_have_count(0)


async def test_many_chats_come_page_by_page(visit: Visit, make_stack: StackMaker) -> None:
    stack = await make_stack()
    async with stack.client() as client:
        for n in range(45):
            (await client.post("/api/chats", json={"title": f"Chat number {n}"})).raise_for_status()
    visitor = await visit(stack)
    await expect(visitor.page.locator(".chat")).to_have_count(30)
    # Not a click of the mouse, for which the list would be scrolled to its end: that shows them as well.
    await visitor.page.get_by_role("button", name="Show earlier chats").dispatch_event("click")
    await expect(visitor.page.locator(".chat")).to_have_count(45)
    await expect(visitor.page.get_by_role("button", name="Show earlier chats")).to_have_count(0)
    assert len(set(await visitor.titles())) == 45


async def test_a_phone_shows_everything_without_scrolling_sideways(visit: Visit) -> None:
    visitor = await visit(width=360, height=700, has_touch=True, is_mobile=True)
    wide = "```\n" + "long code " * 40 + "\n```\n\n" + "| column " * 12 + "|\n" + "|---" * 12 + "|\n\n" + "word" * 100
    await visitor.ask("x" * 120 + " " + visitor.script(wide))
    await visitor.finished()
    await _fits(visitor)
    menu = visitor.page.get_by_role("button", name="Open chats")
    chats = visitor.page.get_by_role("navigation", name="Chats")
    await expect(chats).to_be_hidden()
    await menu.click()
    await expect(chats).to_be_visible()
    await expect(visitor.page.get_by_role("button", name="Close chats")).to_be_focused()
    await _fits(visitor)
    await visitor.page.keyboard.press("Escape")
    await expect(chats).to_be_hidden()
    await expect(menu).to_be_focused()
    await visitor.open_log()
    await _fits(visitor)


async def _fits(visitor: Visitor) -> None:
    await expect(visitor.page.locator("main")).to_be_visible()
    sideways = """() => [document.documentElement, document.querySelector(".scroll")]
      .map((element) => element.scrollWidth - element.clientWidth)"""
    assert await visitor.page.evaluate(sideways) == [0, 0]


async def test_the_end_is_followed_only_while_the_reader_is_there(visitor: Visitor) -> None:
    lines = "\n\n".join(f"Line {n}" for n in range(60))
    await visitor.ask(
        "Long " + visitor.script(lines, {"wait": "scrolled"}, "\n\nMore", {"wait": "jumped"}, "\n\nThe end")
    )
    await expect(visitor.answer.get_by_text("Line 59", exact=True)).to_be_in_viewport()
    await visitor.answer.get_by_text("Line 30", exact=True).hover()
    await visitor.page.mouse.wheel(0, -1500)
    jump = visitor.page.get_by_role("button", name="Jump to latest")
    await expect(jump).to_be_visible()
    visitor.let("scrolled")
    more = visitor.answer.get_by_text("More", exact=True)
    await expect(more).to_have_count(1)
    await expect(more).not_to_be_in_viewport()
    await jump.click()
    await expect(more).to_be_in_viewport()
    visitor.let("jumped")
    await expect(visitor.answer.get_by_text("The end", exact=True)).to_be_in_viewport()
    await expect(jump).to_have_count(0)


async def test_what_is_written_while_a_chat_cannot_be_begun_is_kept_beside_what_was_sent(visit: Visit) -> None:
    visitor = await visit()
    refuse = asyncio.Event()

    async def begin(route: Route) -> None:
        await refuse.wait()
        await route.fulfill(status=507, json={"code": "storage_full", "detail": "There is no room."})

    await visitor.page.route("**/api/chats", begin)
    field = visitor.page.get_by_label("Message", exact=True)
    await field.fill("First")
    await visitor.page.keyboard.press("Enter")
    await expect(field).to_have_value("")
    await field.fill("Second")
    refuse.set()
    await expect(visitor.page.get_by_text("There is no room.")).to_be_visible()
    await expect(field).to_have_value("First\n\nSecond")


async def test_the_demo_model_says_that_it_is_one(visit: Visit, make_stack: StackMaker) -> None:
    stack = await make_stack(openai_url=None)
    visitor = await visit(stack)
    banner = visitor.page.locator(".banner.demo")
    await expect(banner).to_contain_text("Demo model")
    await expect(banner).to_contain_text("OPENAI_API_KEY")
    await visitor.ask("A long hello")
    await expect(visitor.answer).not_to_be_empty()
    await visitor.stop()
    await visitor.finished()


async def test_a_database_that_is_away_is_said_and_so_is_a_journal(visit: Visit, make_stack: StackMaker) -> None:
    stack = await make_stack(own_postgres=True)
    visitor = await visit(stack)
    assert stack.postgres_server is not None
    stack.postgres_server.stop()
    await expect(visitor.page.get_by_text("History is catching up")).to_be_visible(timeout=60_000)
    journal = stack.folder / "data" / "journal.db"
    aside = journal.rename(journal.with_name("aside.db"))
    await visitor.page.get_by_label("Message", exact=True).fill("Hello")
    await visitor.page.keyboard.press("Enter")
    await expect(visitor.page.get_by_text("Nothing new can be sent now")).to_be_visible(timeout=60_000)
    await expect(visitor.page.get_by_text("History is catching up")).to_have_count(0)
    aside.rename(journal)
    await expect(visitor.page.get_by_text("Nothing new can be sent now")).to_have_count(0, timeout=60_000)


async def test_less_motion_is_respected(visit: Visit) -> None:
    visitor = await visit(reduced_motion="reduce")
    await visitor.ask("Calm " + visitor.script("calm ", {"wait": "calm"}))
    await visitor.answering()
    moving = "[...document.getAnimations()].length"
    assert await visitor.page.evaluate(moving) == 0
    visitor.let("calm")
