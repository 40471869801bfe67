import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { App } from "../../src/headwater/web/models/app.js";
import { keepOutbox, outbox } from "../../src/headwater/web/models/storage.js";
import { eventually, frame, log } from "./support.js";

const CHAT = "0198c0de-7abc-7def-8123-456789abcdef";
const TAKEN = { task_id: "run", message_id: "a", user_message_id: "q", chat_id: CHAT };

class Storage {
  #items = new Map();
  getItem = (key) => this.#items.get(key) ?? null;
  setItem = (key, value) => this.#items.set(key, value);
  removeItem = (key) => this.#items.delete(key);
}

/** What `POST …/messages` gets, by turns; the last answer stays. @type {((options: object) => Response | Promise<Response>)[]} */
let answers = [];
let keys = [];
let places = [];
let health = { status: "ok", parts: {} };
let degraded = false;
let lists = 0;
/** What a stream is answered. @type {() => Response | Promise<Response>} */
let streams;
/** The chat as it is stored; null for one that is not there. @type {object | null} */
let stored;

const json = (status, body) => new Response(JSON.stringify(body), { status });
const away = () => {
  throw new TypeError("fetch failed");
};

const silence = ({ signal }) => new Promise((_, refuse) => signal?.addEventListener("abort", () => refuse(signal.reason)));

function answer(path, options) {
  const { method, headers } = options;
  if (path.startsWith("/api/stream")) return streams();
  if (path === "/api/health") return json(200, health);
  if (path.startsWith("/api/chats?")) {
    lists += 1;
    return json(200, { items: [], next: null, degraded });
  }
  if (path === `/api/chats/${CHAT}` && stored) return json(200, stored);
  if (method !== "POST") return json(404, { detail: "There is nothing of that id." });
  keys.push(headers["Idempotency-Key"]);
  return (answers.length > 1 ? answers.shift() : answers[0])(options);
}

beforeEach(() => {
  [answers, keys, places, lists, degraded] = [[], [], [], 0, false];
  streams = () => new Promise(() => {});
  stored = null;
  const wait = globalThis.setTimeout;
  Object.assign(globalThis, {
    sessionStorage: new Storage(),
    localStorage: new Storage(),
    document: { hidden: false, addEventListener() {} },
    location: { hash: `#/chat/${CHAT}`, assign: (place) => places.push(place) },
    addEventListener() {},
    requestAnimationFrame: (draw) => wait(draw, 0),
    fetch: async (path, options = {}) => answer(path, { method: "GET", ...options }),
  });
});

/** A page that has loaded; the pauses between tries are over at once. */
function page(t) {
  const wait = globalThis.setTimeout;
  const timers = [];
  t.mock.method(globalThis, "setTimeout", (then, ms) => {
    timers.push(wait(then, ms >= 250 && ms < 9000 ? 0 : ms));
    return timers.at(-1);
  });
  t.after(() => timers.forEach(clearTimeout));
  const app = new App();
  app.current = CHAT;
  app.thread(CHAT).merge([]);
  return app;
}

const shown = (app) => app.shown.path.map(({ message }) => `${message.status} ${message.content}`);

test("a message that no server took stays, and the next load of the page sends it under the same key", async (t) => {
  answers = [away];
  await page(t).send("Why?", null);
  assert.deepEqual(
    outbox().map(({ content }) => content),
    ["Why?"],
  );
  const [key] = keys;
  answers = [() => json(202, TAKEN)];
  const again = page(t);
  again.start();
  await eventually(() => outbox().length === 0);
  assert.equal(keys.at(-1), key);
  assert.deepEqual(shown(again), ["done Why?", "processing "]);
});

test("a message is sent for as long as a server takes to start, and is refused sooner by one that answers", async (t) => {
  answers = [away];
  await page(t).send("Why?", null);
  assert.equal(keys.length, 12);
  answers = [() => json(503, { detail: "Not now." })];
  await page(t).send("And why?", null);
  assert.equal(keys.length, 12 + 6);
});

test("a message stays over a sign-in that ran out", async (t) => {
  answers = [() => json(401, { detail: "Sign in first.", code: "sign_in_required" })];
  await page(t).send("Why?", null);
  assert.equal(outbox().length, 1);
  assert.deepEqual(places, ["/sign-in"]);
});

test("a message that was taken, refused for good or withdrawn is not sent again", async (t) => {
  const app = page(t);
  answers = [() => json(202, TAKEN)];
  await app.send("taken", null);
  assert.deepEqual(outbox(), []);
  answers = [() => json(422, { detail: "content is too long", code: "invalid_input" })];
  await app.send("refused", null);
  assert.deepEqual(outbox(), []);
  answers = [away];
  await app.send("withdrawn", null);
  assert.equal(outbox().length, 1);
  app.withdraw(CHAT, [...app.shown.messages.values()].find(({ content }) => content === "withdrawn"));
  assert.deepEqual(outbox(), []);
});

test("the outbox keeps each message once and in order", () => {
  keepOutbox("1", { key: "1", content: "one" });
  keepOutbox("2", { key: "2", content: "two" });
  keepOutbox("1", { key: "1", content: "uno" });
  assert.deepEqual(
    outbox().map(({ content }) => content),
    ["uno", "two"],
  );
  keepOutbox("3", null);
  keepOutbox("1", null);
  assert.deepEqual(
    outbox().map(({ content }) => content),
    ["two"],
  );
});

test("a list that may not be complete says so and is read again when PostgreSQL answers", async (t) => {
  const app = page(t);
  degraded = true;
  await app.chats.refresh();
  assert.equal(app.degraded, true);
  health = { status: "degraded", parts: { postgres: { ok: false } } };
  await app.health.check();
  assert.equal(lists, 1);
  degraded = false;
  health = { status: "ok", parts: { postgres: { ok: true } } };
  await app.health.check();
  await eventually(() => !app.degraded);
  await app.health.check();
  assert.equal(lists, 2);
});

test("while it answers another message can be sent only to a server that would not refuse it, and is shown waiting", async (t) => {
  const app = page(t);
  answers = [
    () => json(202, TAKEN),
    () => json(202, { task_id: "run2", message_id: "a2", user_message_id: "q2", chat_id: CHAT }),
  ];
  await app.send("Why?", null);
  assert.equal(app.maySend, false);
  health = { status: "ok", when_busy: "enqueue", parts: {} };
  await app.health.check();
  assert.equal(app.maySend, true);
  await app.send("And then?");
  const [first, second] = [...app.shown.messages.values()].filter(({ role }) => role === "assistant");
  assert.deepEqual([second.id, app.view(second).queued], ["a2", true]);
  assert.equal(app.view(first).queued, undefined);
  assert.equal(app.shown.messages.get("q2").parent_id, first.id);
  app.shown.ended("run", { content: "So.", status: "done", end: {} });
  assert.equal(app.view(second).queued, undefined);
});

test("an answer that the server no longer knows is over on the page as well, and can be asked for again", async (t) => {
  const app = page(t);
  answers = [() => json(202, TAKEN)];
  streams = () => json(404, { detail: "There is no such run.", code: "not_found" });
  await app.send("Why?", null);
  await eventually(() => app.running === 0);
  assert.deepEqual(shown(app), ["done Why?", "failed "]);
  assert.equal(app.shown.messages.get("a").error.code, "not_found");
});

test("a chat that is gone already is deleted", async (t) => {
  const app = page(t);
  app.chats.put({ id: CHAT, title: "Gone", updated_at: "2026-01-01T00:00:00Z" });
  await app.remove(CHAT);
  assert.deepEqual([app.trouble, app.chats.get(CHAT)], [null, undefined]);
});

test("a request that gets no answer is given up and sent again", async (t) => {
  const wait = globalThis.setTimeout;
  t.mock.method(AbortSignal, "timeout", () => {
    const controller = new AbortController();
    wait(() => controller.abort(), 1);
    return controller.signal;
  });
  const app = page(t);
  answers = [silence, () => json(202, TAKEN)];
  await app.send("Why?", null);
  assert.deepEqual(shown(app), ["done Why?", "processing "]);
  assert.equal(keys[0], keys[1]);
});

test("a page that a network puts in the server's place is not taken for its answer", async (t) => {
  const app = page(t);
  answers = [() => new Response("<html>Sign in to this network</html>", { status: 200 }), () => json(202, TAKEN)];
  await app.send("Why?", null);
  assert.deepEqual(shown(app), ["done Why?", "processing "]);
});

test("an answer that ended before its chat was opened is shown ended though its row lags behind", async (t) => {
  const app = page(t);
  app.current = null;
  const messages = [{ id: "a", role: "assistant", content: "", parent_id: null, status: "processing", run_id: "run" }];
  stored = { id: CHAT, updated_at: "2026-01-01T00:00:00Z", active_task_id: "run", degraded: false, messages };
  streams = () => new Response(log(["So", "."]).map((event) => frame(event)).join(""));
  app.chats.onItems([stored]);
  await eventually(() => app.running === 0);
  app.current = CHAT;
  await app.load(CHAT);
  assert.deepEqual(shown(app), ["done So."]);
});
