import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { createParser } from "../../src/headwater/web/client/index.js";

const cases = JSON.parse(readFileSync(new URL("../../spec/cases/sse.json", import.meta.url)));

function parse(chunks) {
  const seen = { frames: [], retry: undefined };
  const parser = createParser({ onFrame: (frame) => seen.frames.push(frame), onRetry: (ms) => (seen.retry = ms) });
  for (const chunk of chunks) parser.feed(chunk);
  return seen;
}

for (const { name, stream, frames, retry } of cases) {
  const bytes = new TextEncoder().encode(stream);
  const wanted = { frames, retry };

  test(`whole: ${name}`, () => assert.deepEqual(parse([bytes]), wanted));

  test(`cut at every byte: ${name}`, () => {
    assert.deepEqual(parse([...bytes].map((byte) => Uint8Array.of(byte))), wanted);
    for (let at = 0; at <= bytes.length; at++)
      assert.deepEqual(parse([bytes.slice(0, at), bytes.slice(at)]), wanted, `cut after byte ${at}`);
  });

  test(`cut twice: ${name}`, () => {
    for (let one = 0; one <= bytes.length; one++)
      for (let two = one; two <= bytes.length; two++)
        assert.deepEqual(
          parse([bytes.slice(0, one), bytes.slice(one, two), bytes.slice(two)]),
          wanted,
          `${one}, ${two}`,
        );
  });
}

test("a frame that never ends is refused", () => {
  const parser = createParser({ onFrame: () => assert.fail("no frame was finished") });
  const chunk = new TextEncoder().encode("x".repeat(1024 * 1024));
  parser.feed(new TextEncoder().encode("data: "));
  assert.throws(() => {
    for (let n = 0; n < 9; n++) parser.feed(chunk);
  }, RangeError);
});
