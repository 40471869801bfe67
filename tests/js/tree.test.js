import assert from "node:assert/strict";
import { test } from "node:test";
import { choose, path } from "../../src/headwater/web/models/tree.js";

const message = (id, parent_id, role = "user") => ({ id, parent_id, role });
const ids = (steps) => steps.map(({ message: { id } }) => id).join(" ");
const chat = [
  message("q1", null),
  message("a1", "q1"),
  message("a2", "q1"),
  message("q2", "a1"),
  message("e1", null),
  message("a3", "e1"),
];

test("the newest branch is shown", () => assert.equal(ids(path(chat, new Map())), "e1 a3"));

test("a choice at a fork shows that branch, with its place among its siblings", () => {
  const choices = new Map();
  choose(choices, chat[0]);
  assert.equal(ids(path(chat, choices)), "q1 a2");
  choose(choices, chat[1]);
  const steps = path(chat, choices);
  assert.equal(ids(steps), "q1 a1 q2");
  assert.deepEqual(
    steps.map(({ index, siblings }) => `${index + 1}/${siblings.length}`),
    ["1/2", "1/2", "1/1"],
  );
});

test("a message whose parent is missing can be read", () =>
  assert.equal(ids(path([message("a", "gone")], new Map())), "a"));

test("messages that are each other's parents do not hang the page", () =>
  assert.equal(ids(path([message("a", "b"), message("b", "a")], new Map())), ""));
