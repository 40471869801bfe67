"""Asking and answering, in one chat and in several."""

from __future__ import annotations

import json
import re

from playwright.async_api import Route, expect

from browser.conftest import Visit
from browser.visitor import Visitor
from support.openai_scenarios import Scenario, chunk
from support.wait import eventually


async def test_an_answer_arrives_word_by_word(visitor: Visitor) -> None:
    await visitor.ask("Count " + visitor.script("One ", {"wait": "word-2"}, "two ", {"wait": "word-3"}, "three."))
    await visitor.reads("One")
    await visitor.answering()
    await visitor.heard("Answering.")
    visitor.let("word-2")
    await visitor.reads("One two")
    await visitor.answering()
    visitor.let("word-3")
    await visitor.reads("One two three.")
    await visitor.finished()
    await visitor.heard("Answer finished.")


async def test_the_chat_is_named_after_the_first_question(visitor: Visitor) -> None:
    await visitor.ask("Rivers of the Harz mountains")
    await expect(visitor.page.get_by_role("heading", level=1)).to_have_text("Rivers of the Harz mountains")
    await expect(visitor.chat("Rivers of the Harz mountains")).to_have_count(1)


async def test_markdown_is_drawn_while_it_streams(visitor: Visitor) -> None:
    code = "```python\nprint('hi')\n```\n\nDone **well** and *early"
    await visitor.ask("Code " + visitor.script(code, {"wait": "closing"}, "*."))
    block = visitor.answer.locator(".code")
    await expect(block.locator(".code-head span")).to_have_text("python")
    await expect(block.locator(".hljs-string")).to_have_text("'hi'")
    await expect(visitor.answer.locator("em")).to_have_text("early")
    # A block that is complete is not drawn again: the same element stays.
    await block.evaluate("element => { element.dataset.seen = 'yes' }")
    visitor.let("closing")
    await visitor.finished()
    await expect(visitor.answer.locator(".code")).to_have_attribute("data-seen", "yes")
    await expect(visitor.answer.locator("em")).to_have_text("early")


async def test_code_and_messages_can_be_copied(visit: Visit) -> None:
    visitor = await visit(permissions=["clipboard-read", "clipboard-write"])
    await visitor.ask("Copy " + visitor.script("```js\nlet a = 1;\n```\n"))
    await visitor.finished()
    await visitor.press("Copy js code")
    await visitor.copied("let a = 1;\n")
    await visitor.press("Copy message", visitor.answers.last)
    await visitor.copied("```js\nlet a = 1;\n```\n")


async def test_reasoning_is_folded_and_can_be_opened(visitor: Visitor) -> None:
    thought = {"chunk": chunk(reasoning="First the **cursor**.")}
    await visitor.ask("Think " + visitor.script(thought, {"wait": "thought"}, "So it is."))
    await expect(visitor.answers.last.locator("summary")).to_have_text("Thinking…")
    visitor.let("thought")
    await visitor.finished()
    await visitor.reads("So it is.")
    summary = visitor.answers.last.locator("summary")
    await expect(summary).to_have_text(re.compile(r"^Thought for \d+ s$"))
    await summary.click()
    await expect(visitor.answers.last.locator("details strong")).to_have_text("cursor")


async def test_stopping_keeps_what_was_said(visitor: Visitor) -> None:
    await visitor.ask("Stop me " + visitor.script("Half a sentence", {"hang": True}))
    await visitor.reads("Half a sentence")
    await visitor.stop()
    await expect(visitor.answers.last).to_contain_text("You stopped this answer.")
    await visitor.heard("Answer stopped.")
    await visitor.refresh()
    await visitor.reads("Half a sentence")
    await expect(visitor.answers.last).to_contain_text("You stopped this answer.")


async def test_another_answer_stands_beside_the_first(visitor: Visitor) -> None:
    mark = visitor.script("The first answer.")
    await visitor.ask("Again " + mark)
    await visitor.finished()
    visitor.rescript(mark, "The second answer.")
    await visitor.press("Answer again")
    await visitor.reads("The second answer.")
    await visitor.finished()
    await expect(visitor.page.get_by_role("img", name="Version 2 of 2")).to_be_visible()
    await visitor.press("Earlier version")
    await visitor.reads("The first answer.")
    await visitor.press("Later version")
    await visitor.reads("The second answer.")
    await expect(visitor.answers).to_have_count(1)


async def test_an_edited_question_begins_a_branch(visitor: Visitor) -> None:
    await visitor.ask("First thought")
    await visitor.finished()
    await visitor.ask("A follow-up " + visitor.script("It follows."))
    await visitor.reads("It follows.")
    await visitor.finished()
    first = visitor.questions.first
    await first.hover()
    await visitor.press("Edit and send again", first)
    await visitor.page.get_by_label("Edit your message").fill("Second thought " + visitor.script("A new branch."))
    await visitor.page.keyboard.press("Enter")
    await visitor.reads("A new branch.")
    await visitor.finished()
    await expect(visitor.questions).to_have_count(1)
    await visitor.press("Earlier version", visitor.questions.first)
    await visitor.reads("It follows.")
    await expect(visitor.questions).to_have_count(2)


async def test_an_error_is_shown_in_place_and_can_be_tried_again(visitor: Visitor) -> None:
    mark = visitor.script()
    visitor.refuse(mark, visitor.model.scenarios["auth"])
    await visitor.ask("Will fail " + mark)
    await expect(visitor.answers.last.locator(".failure")).to_contain_text("provider_auth")
    await visitor.heard("The answer failed.")
    visitor.rescript(mark, "Now it works.")
    await visitor.press("Try again")
    await visitor.reads("Now it works.")


async def test_a_busy_model_is_said_while_it_is_waited_for(visitor: Visitor) -> None:
    mark = visitor.script()
    busy = visitor.model.scenarios["busy"]
    visitor.refuse(mark, Scenario(busy.steps, 429, {**busy.headers, "retry-after": "2"}))
    await visitor.ask("Patience " + mark)
    await eventually(lambda: any(mark in request.question for request in visitor.model.chats))
    # When it is asked again it says nothing until the page has been looked at.
    visitor.rescript(mark, {"wait": "patience"}, "Here I am.")
    await expect(visitor.answers.last.locator(".waiting")).to_contain_text(re.compile("busy|again", re.IGNORECASE))
    visitor.let("patience")
    await visitor.reads("Here I am.")
    await visitor.finished()


async def test_two_chats_answer_at_once_and_each_has_its_mark(visitor: Visitor) -> None:
    await visitor.ask("Alpha " + visitor.script("a1 ", {"wait": "alpha"}, "a2"))
    await visitor.reads("a1")
    await visitor.new_chat()
    await visitor.ask("Beta " + visitor.script("b1 ", {"wait": "beta"}, "b2"))
    await visitor.reads("b1")
    await expect(visitor.mark("Alpha", "answering")).to_be_visible()
    await expect(visitor.mark("Beta", "answering")).to_be_visible()
    visitor.let("alpha")
    await expect(visitor.mark("Alpha", "new answer")).to_be_visible()
    await expect(visitor.mark("Beta", "answering")).to_be_visible()
    await visitor.open_chat("Alpha")
    await visitor.reads("a1 a2")
    await expect(visitor.mark("Alpha", "new answer")).to_have_count(0)
    visitor.let("beta")
    await expect(visitor.mark("Beta", "new answer")).to_be_visible()


async def test_eight_chats_answer_at_once_over_two_connections(visitor: Visitor) -> None:
    names = [f"Choir {n}" for n in range(8)]
    for name in names:
        await visitor.ask(f"{name} " + visitor.script(f"{name} sings ", {"wait": "choir"}, "the end."))
        await visitor.reads(f"{name} sings")
        if name != names[-1]:
            await visitor.new_chat()
    for name in names:
        await expect(visitor.mark(name, "answering")).to_be_visible()
    visitor.let("choir")
    await visitor.reads("Choir 7 sings the end.")
    for name in names[:-1]:
        await expect(visitor.mark(name, "new answer")).to_be_visible()
    for name in names:
        await visitor.open_chat(name)
        await visitor.reads(f"{name} sings the end.")
    # A stream that is replaced may still be closing while the next one opens.
    assert visitor.most_streams <= 4


async def test_a_second_question_waits_for_the_answer(visitor: Visitor) -> None:
    await visitor.ask("Slow " + visitor.script("…", {"wait": "second-question"}, " done"))
    await visitor.answering()
    await visitor.field.fill("Too early")
    await visitor.page.keyboard.press("Enter")
    await expect(visitor.questions).to_have_count(1)
    await expect(visitor.field).to_have_value("Too early")
    visitor.let("second-question")
    await visitor.finished()
    await visitor.page.keyboard.press("Enter")
    await expect(visitor.questions).to_have_count(2)


async def lets_wait(visitor: Visitor) -> None:
    """As with HEADWATER_WHEN_BUSY=enqueue, which the servers of these tests are not started with."""

    async def patient(route: Route) -> None:
        answer = await route.fetch()
        await route.fulfill(response=answer, json={**await answer.json(), "when_busy": "enqueue"})

    async def enqueue(route: Route) -> None:
        asked = json.loads(route.request.post_data or "{}")
        await route.continue_(post_data={**asked, "when_busy": "enqueue"})

    await visitor.page.route("**/api/health", patient)
    await visitor.page.route(re.compile(r"/api/chats/[^/]+/messages$"), enqueue)
    await visitor.page.reload()
    # Until the page has heard of it, it sends nothing while it answers.
    await expect(visitor.page.locator(".topbar .dot")).to_have_class(re.compile("good|warn"))


async def test_where_messages_may_wait_a_second_question_is_shown_waiting_and_answered(visitor: Visitor) -> None:
    await lets_wait(visitor)
    await visitor.ask("Slow " + visitor.script("…", {"wait": "first-answer"}, " done"))
    await visitor.answering()
    await visitor.ask("And then?")
    await expect(visitor.answers).to_have_count(2)
    await expect(visitor.answers.last).to_contain_text("Waits for the answer before it")
    visitor.let("first-answer")
    await expect(visitor.answers.first).to_contain_text("done")
    await visitor.finished()
    await expect(visitor.answers.last).not_to_contain_text("Waits")


async def test_a_question_that_waits_can_be_cancelled_by_keyboard_also_after_a_reload(visitor: Visitor) -> None:
    await lets_wait(visitor)
    await visitor.ask("Slow " + visitor.script("…", {"wait": "before-the-cancelled"}, " done"))
    await visitor.answering()
    await visitor.ask("Never mind")
    await expect(visitor.answers).to_have_count(2)
    await visitor.page.reload()
    await visitor.page.get_by_role("button", name="Cancel this question").press("Enter")
    await expect(visitor.answers.last).to_contain_text("You stopped this answer.")
    visitor.let("before-the-cancelled")
    await expect(visitor.answers.first).to_contain_text("done")
    await visitor.finished()
    await expect(visitor.answers.last).to_contain_text("You stopped this answer.")


async def test_a_chat_that_answers_elsewhere_says_so_and_loses_nothing(visit: Visit) -> None:
    one = await visit()
    await one.ask("Shared " + one.script("first ", {"wait": "shared"}, "ends"))
    await one.reads("first")
    other = await visit()
    await other.open_chat("Shared")
    await other.reads("first")
    one.let("shared")
    await other.reads("first ends")
    await one.reads("first ends")


async def test_a_refused_message_says_why_and_can_be_changed(visitor: Visitor) -> None:
    await visitor.ask("Fine")
    await visitor.finished()
    await visitor.field.fill("x" * 33_000)
    await visitor.page.keyboard.press("Enter")
    await expect(visitor.questions.last.locator(".failure")).to_contain_text("invalid_input")
    await visitor.press("Edit", visitor.questions.last)
    await expect(visitor.field).to_have_value("x" * 33_000)


async def test_a_lost_reply_does_not_send_twice(visitor: Visitor) -> None:
    await visitor.ask("Warm up")
    await visitor.finished()
    keys = []

    async def lose_the_first(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) == 1:
            await route.fetch()  # the server takes it; the page never hears of it
            await route.abort("connectionreset")
        else:
            await route.continue_()

    await visitor.page.route(re.compile(r"/api/chats/[^/]+/messages$"), lose_the_first)
    await visitor.ask("Once only")
    await expect(visitor.answers).to_have_count(2)
    await visitor.finished()
    assert len(keys) == 2
    assert keys[0] == keys[1]
    chat_id = visitor.page.url.rpartition("/")[2]
    chat = await visitor.page.evaluate(f"fetch('/api/chats/{chat_id}').then(answer => answer.json())")
    said = [message["content"] for message in chat["messages"] if message["role"] == "user"]
    assert said == ["Warm up", "Once only"], json.dumps(said)
