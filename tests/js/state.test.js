import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { apply, fold, formatCursor, initial, parseCursor } from "../../src/headwater/web/client/index.js";

const cases = JSON.parse(readFileSync(new URL("../../spec/cases/transcript.json", import.meta.url)));

for (const { name, events, end, ...wanted } of cases) {
  test(`fold: ${name}`, () => {
    const state = events.reduce(fold, initial());
    for (const [field, value] of Object.entries(wanted)) assert.deepEqual(state[field], value, field);
    assert.equal(state.end?.type ?? null, end);
  });

  test(`every event twice, and everything again: ${name}`, () => {
    let state = initial();
    for (const event of [...events.flatMap((event) => [event, event]), ...events])
      state = apply(state, event, { epoch: "e", seq: event.seq });
    for (const [field, value] of Object.entries(wanted)) assert.deepEqual(state[field], value, field);
  });
}

const say = (seq, text) => ({ seq, type: "content", at: seq, text });

test("a missing event is a gap, not a shorter text", () => {
  const state = apply(initial(), say(1, "a"), { epoch: "e", seq: 1 });
  assert.equal(apply(state, say(3, "c"), { epoch: "e", seq: 3 }), "gap");
  assert.equal(apply(initial(), say(2, "b"), { epoch: "e", seq: 2 }), "gap");
});

test("a log that begins again replaces what was shown", () => {
  let state = apply(initial(), say(1, "old"), { epoch: "one", seq: 1 });
  state = apply(state, { seq: 0, type: "reset", at: 0, reason: "history_lost" }, { epoch: "two", seq: 0 });
  assert.equal(state.content, "");
  state = apply(state, say(1, "new"), { epoch: "two", seq: 1 });
  assert.equal(state.content, "new");
  assert.deepEqual(state.cursor, { epoch: "two", seq: 1 });
});

test("thinking is timed from the first reasoning to the first text", () => {
  const state = [
    { seq: 1, type: "reasoning", at: 1000, text: "a" },
    { seq: 2, type: "reasoning", at: 2000, text: "b" },
    { seq: 3, type: "content", at: 4000, text: "c" },
    { seq: 4, type: "content", at: 9000, text: "d" },
  ].reduce(fold, initial());
  assert.equal(state.thinkingTo - state.thinkingFrom, 3000);
});

test("a notice goes when text comes", () => {
  const busy = fold(initial(), { seq: 1, type: "progress", at: 1, stage: "waiting", progress: 0, message: "busy" });
  assert.equal(busy.notice, "busy");
  assert.equal(fold(busy, say(2, "x")).notice, null);
});

test("a cursor is read back as it was written, and nothing else is a cursor", () => {
  assert.deepEqual(parseCursor(formatCursor({ epoch: "k3", seq: 12 })), { epoch: "k3", seq: 12 });
  assert.equal(formatCursor(null), "");
  for (const text of ["", null, "a", "a-", "-1", "A-1", "a-01", "a-1 ", "a-1-1", "a--1"])
    assert.equal(parseCursor(text), null, text);
});
