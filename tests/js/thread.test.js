import assert from "node:assert/strict";
import { test } from "node:test";
import { fold, initial } from "../../src/headwater/web/client/index.js";
import { Thread } from "../../src/headwater/web/models/thread.js";

const item = { key: "k", content: "Why?", parentId: null };
const taken = { task_id: "run", message_id: "a", user_message_id: "q" };
const shown = (thread) => thread.path.map(({ message }) => `${message.role} ${message.status} ${message.content}`);

function asked() {
  const thread = new Thread("chat");
  thread.merge([]);
  thread.sendingNow(item);
  thread.accepted(item, taken);
  return thread;
}

test("a question is shown while it is sent, and once when it was taken", () => {
  const thread = new Thread("chat");
  thread.merge([]);
  thread.sendingNow(item);
  assert.deepEqual(shown(thread), ["user sending Why?"]);
  thread.accepted(item, taken);
  thread.accepted(item, taken);
  assert.deepEqual(shown(thread), ["user done Why?", "assistant processing "]);
});

test("a question that could not be sent outlives the server's view", () => {
  const thread = new Thread("chat");
  thread.sendingNow(item);
  thread.unsent("k", new Error("away"));
  thread.merge([]);
  assert.deepEqual(shown(thread), ["user unsent Why?"]);
  thread.withdraw("k");
  assert.deepEqual(shown(thread), []);
});

test("what ended before our eyes stays ended while the server's row lags", () => {
  const thread = asked();
  const events = [
    { seq: 1, type: "content", at: 1, text: "So." },
    { seq: 2, type: "done", at: 2, finish_reason: "stop" },
  ];
  thread.ended("run", events.reduce(fold, initial()));
  const row = { id: "a", parent_id: "q", role: "assistant", content: "", status: "processing", run_id: "run" };
  const question = { id: "q", parent_id: null, role: "user", content: "Why?", status: "done", run_id: null };
  thread.merge([question, row]);
  assert.deepEqual(shown(thread), ["user done Why?", "assistant done So."]);
  thread.merge([question, { ...row, status: "done", content: "So. (stored)" }]);
  assert.deepEqual(shown(thread), ["user done Why?", "assistant done So. (stored)"]);
});

test("another answer stands beside the first and is the one that is shown", () => {
  const thread = asked();
  thread.ended("run", { ...initial(), status: "done", content: "One." });
  thread.accepted({ parentId: "q" }, { task_id: "run2", message_id: "b", user_message_id: "q" });
  assert.deepEqual(shown(thread), ["user done Why?", "assistant processing "]);
  assert.deepEqual(thread.path[1].siblings, ["a", "b"]);
});

test("reading that began before something was accepted can be told", () => {
  const thread = new Thread("chat");
  const before = thread.edits;
  thread.sendingNow(item);
  thread.accepted(item, taken);
  assert.notEqual(thread.edits, before);
});
