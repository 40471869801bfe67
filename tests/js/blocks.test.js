import assert from "node:assert/strict";
import { test } from "node:test";
import { heal, Splitter } from "../../src/headwater/web/models/blocks.js";
import MarkdownIt from "../../src/headwater/web/vendor/markdown-it.js";

const md = new MarkdownIt({ html: false, linkify: true });

const TEXT = `Intro with **bold** and \`code\` and a [ref][r].

Setext heading
---

1. one

   more of one
2. two
   - deep

     deeper
10. ten

\`\`\`python
x = 1

# not a heading
\`\`\`

| a | b |
|---|--:|
| 1 | 2 |
after the table

> quote
lazy line

    indented code

    still code

[r]: https://example.com

- last *item*
***
The end with __strong__ and ~~gone~~.`;

const draw = (blocks) => blocks.map((block) => md.render(block)).join("");

test("however the text arrives, the finished blocks say what the whole text says", () => {
  for (const step of [1, 2, 3, 7, 50]) {
    const splitter = new Splitter(md);
    for (let end = step; end < TEXT.length; end += step) splitter.split(TEXT.slice(0, end), false);
    assert.equal(draw(splitter.split(TEXT, true)), md.render(TEXT), `in steps of ${step}`);
  }
});

test("a block that is followed by another is final", () => {
  const splitter = new Splitter(md);
  const plain = TEXT.replace(/\[r\].*/g, ""); // a later definition may change an earlier block, rightly
  const final = [];
  for (let end = 1; end <= plain.length; end++) {
    const blocks = splitter.split(plain.slice(0, end), false);
    blocks.slice(0, -2).forEach((block, n) => assert.equal((final[n] ??= block), block, `block ${n} at ${end}`));
  }
  assert.ok(final.length > 6);
});

test("what follows an unsettled block is healed by itself", () => {
  const blocks = new Splitter(md).split("```js\nx\n```\n\nand *early", false);
  assert.deepEqual(blocks, ["```js\nx\n```\n\n", "and *early*"]);
});

test("lines may end in CRLF", () => {
  const text = TEXT.replace(/\n/g, "\r\n");
  assert.equal(draw(new Splitter(md).split(text, true)), md.render(TEXT));
});

test("another text begins anew", () => {
  const splitter = new Splitter(md);
  splitter.split("one\n\ntwo\n\nthree", false);
  assert.deepEqual(splitter.split("other", true), ["other"]);
});

for (const [source, wanted] of [
  ["a **bol", "a **bol**"],
  ["a **bol ", "a **bol**"],
  ["a *b **c", "a *b **c***"],
  ["a **", "a "],
  ["use `cod", "use `cod`"],
  ["`a * b` and *c", "`a * b` and *c*"],
  ["snake_case and 2 * 3 * 4", "snake_case and 2 * 3 * 4"],
  ["a ~~gon", "a ~~gon~~"],
  ["see [the docs](https://exa", "see the docs"],
  ["see ![a picture](https://exa", "see a picture"],
  ["a line\n-", "a line\n"],
  ["a line\n==", "a line\n"],
  ["list\n1.", "list\n"],
  ["```js\nlet a = **", "```js\nlet a = **"],
  ["all **closed** and *fine*.", "all **closed** and *fine*."],
  ["| a | b", "| a | b\n|---|---|"],
  ["| a | b |\n|--", "| a | b |\n|---|---|"],
  ["| a | b |\n|:--|--:|\n| 1", "| a | b |\n|:--|--:|\n| 1"],
])
  test(`heal ${JSON.stringify(source)}`, () => assert.equal(heal(source), wanted));
