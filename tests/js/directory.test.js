import assert from "node:assert/strict";
import { test } from "node:test";
import { Directory } from "../../src/headwater/web/models/directory.js";

const chat = (n) => ({ id: `chat-${n}`, title: `Chat ${n}`, updated_at: new Date(1000 * n).toISOString() });

/** The server's chats, the latest first, in pages of three. */
function serve(chats) {
  globalThis.fetch = async (path) => {
    const from = Number(new URL(path, "http://x").searchParams.get("after") ?? 0);
    const next = from + 3 < chats.length ? String(from + 3) : null;
    return new Response(JSON.stringify({ items: chats.slice(from, from + 3), next, degraded: false }));
  };
}

const names = (directory) => directory.items.map(({ id }) => id);

test("a chat that was deleted elsewhere leaves the list, and those of further pages stay", async () => {
  const directory = new Directory({ changed: () => {}, onItems: () => {} });
  const chats = [9, 8, 7, 6, 5, 4, 3].map(chat);
  serve(chats);
  await directory.refresh();
  await directory.more();
  assert.deepEqual(names(directory), ["chat-9", "chat-8", "chat-7", "chat-6", "chat-5", "chat-4"]);
  chats.splice(1, 1);
  await directory.refresh();
  assert.deepEqual(names(directory), ["chat-9", "chat-7", "chat-6", "chat-5", "chat-4"]);
});
