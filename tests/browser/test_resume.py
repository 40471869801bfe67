"""Leaving and coming back, and everything between the page and the server breaking."""

from __future__ import annotations

import asyncio
import re

from playwright.async_api import Route, expect

from browser.conftest import Visit
from browser.visitor import Visitor
from support.stack import StackMaker


async def test_a_refresh_in_the_middle_shows_the_same_answer_once(visitor: Visitor) -> None:
    await visitor.ask("Refresh me " + visitor.script("One ", "two ", {"wait": "refreshed"}, "three."))
    await visitor.reads("One two")
    await visitor.refresh()
    await visitor.reads("One two")
    await visitor.answering()
    visitor.let("refreshed")
    await visitor.reads("One two three.")
    await visitor.finished()
    await visitor.refresh()
    await visitor.reads("One two three.")
    await expect(visitor.questions).to_have_count(1)
    await expect(visitor.answers).to_have_count(1)


async def test_an_answer_that_ended_while_nobody_looked_is_there(visitor: Visitor) -> None:
    await visitor.ask("Leave " + visitor.script("Before ", {"wait": "left"}, "after."))
    await visitor.reads("Before")
    address = visitor.page.url
    await visitor.page.goto("about:blank")
    visitor.let("left")
    await visitor.page.goto(address)
    await visitor.reads("Before after.")
    await visitor.finished()


async def test_a_chat_whose_server_is_slow_is_shown_as_loading_and_not_as_a_new_one(visitor: Visitor) -> None:
    await visitor.ask("Slow server " + visitor.script("Here at last."))
    await visitor.reads("Here at last.")
    await visitor.finished()
    go_on = asyncio.Event()

    async def slow(route: Route) -> None:
        await go_on.wait()
        await route.continue_()

    # The highlighter as well: its coming draws the page once more.
    await visitor.page.route(re.compile("/api/|/highlighter"), slow)
    await visitor.refresh()
    await expect(visitor.page.locator(".loading")).to_be_visible()
    await expect(visitor.page.get_by_role("heading", name="What is on your mind?")).to_have_count(0)
    go_on.set()
    await visitor.reads("Here at last.")


async def test_a_refresh_keeps_what_was_being_written_in_each_chat(visitor: Visitor) -> None:
    await visitor.ask("Drafts")
    await visitor.finished()
    await visitor.field.fill("half a thought")
    await visitor.new_chat()
    await expect(visitor.field).to_have_value("")
    await visitor.field.fill("another one")
    await visitor.refresh()
    await expect(visitor.field).to_have_value("another one")
    await visitor.open_chat("Drafts")
    await expect(visitor.field).to_have_value("half a thought")


async def test_without_network_the_answer_goes_on_afterwards(visitor: Visitor) -> None:
    await visitor.ask("Offline " + visitor.script("Before ", {"wait": "tunnel"}, "after."))
    await visitor.reads("Before")
    await visitor.context.set_offline(True)
    visitor.let("tunnel")
    await visitor.context.set_offline(False)
    await visitor.reads("Before after.")
    await visitor.finished()


async def test_a_stream_cut_in_the_middle_of_a_frame_loses_nothing(visitor: Visitor) -> None:
    cuts: list[str] = []

    async def cut(route: Route) -> None:
        if cuts:
            await route.continue_()
            return
        cuts.append(route.request.url)
        reply = 'id: x-1\nevent: content\ndata: {"seq":1,"type":"content","at":1,"te'
        await route.fulfill(status=200, content_type="text/event-stream", body=reply)

    await visitor.page.route(re.compile("/api/stream"), cut)
    await visitor.ask("Cut " + visitor.script("Whole ", "text."))
    await visitor.reads("Whole text.")
    await visitor.finished()
    assert cuts


async def test_a_server_restart_in_the_middle_is_survived(visit: Visit, make_stack: StackMaker) -> None:
    stack = await make_stack()
    visitor = await visit(stack)
    await visitor.ask("Restart " + visitor.script("Before ", {"wait": "restarted"}, "after."))
    await visitor.reads("Before")
    await visitor.new_chat()
    await visitor.ask("Aside " + visitor.script("Aside ", {"wait": "restarted"}, "too."))
    await visitor.reads("Aside")
    stack.server.kill()
    visitor.let("restarted")
    await expect(visitor.answer).to_have_text("Aside")
    await stack.server.start()
    await visitor.reads("Aside too.")
    await visitor.finished()
    await expect(visitor.mark("Restart", "new answer")).to_be_visible()
    await visitor.open_chat("Restart")
    await visitor.reads("Before after.")


async def test_a_question_asked_while_the_server_is_away_is_sent_once_it_is_back(
    visit: Visit, make_stack: StackMaker
) -> None:
    stack = await make_stack()
    visitor = await visit(stack)
    await visitor.ask("Warm up")
    await visitor.finished()
    stack.server.kill()
    await visitor.ask("Are you there?")
    await expect(visitor.questions.last).to_have_class(re.compile("sending"))
    # A refresh would lose what only the page knows, were it not kept; but there is no page without a server.
    await stack.server.start()
    await expect(visitor.answers).to_have_count(2)
    await visitor.finished()
    await visitor.refresh()
    await expect(visitor.questions.filter(has_text="Are you there?")).to_have_count(1)


async def test_a_worker_that_dies_in_the_middle_is_replaced_and_the_answer_begins_again(
    visit: Visit, make_stack: StackMaker
) -> None:
    stack = await make_stack(beat=True, settings={"HEADWATER_LEASE_SECONDS": "2"})
    visitor = await visit(stack)
    mark = visitor.script("A first try ", {"hang": True})
    await visitor.ask("Kill " + mark)
    await visitor.reads("A first try")
    stack.worker.kill()
    visitor.rescript(mark, "A whole answer.")
    await stack.worker.start()
    await expect(visitor.answer).to_have_text("A whole answer.", timeout=60_000)
    await visitor.finished()


async def test_the_system_log_tells_what_happened(visit: Visit, make_stack: StackMaker) -> None:
    stack = await make_stack()
    visitor = await visit(stack)
    await visitor.open_log()
    log = visitor.page.get_by_role("complementary", name="System log")
    await expect(log).to_contain_text("PostgreSQL")
    await visitor.ask("Log " + visitor.script("some ", {"wait": "logged"}, "text"))
    await visitor.reads("some")
    await expect(log).to_contain_text("running")
    stack.server.kill()
    await expect(log).to_contain_text("connecting again")
    await stack.server.start()
    visitor.let("logged")
    await visitor.finished()
    await expect(log).to_contain_text("done")
