import assert from "node:assert/strict";
import { test } from "node:test";
import { backoff } from "../../src/headwater/web/client/stream.js";

test("waits grow, are bounded, and are never the same for all readers", () => {
  const [least, most] = [() => 0, () => 0.999];
  assert.ok(backoff(0, 1000, most) <= 1000 && backoff(0, 1000, least) >= 500);
  for (let n = 1; n < 40; n++) assert.ok(backoff(n, 500, least) >= backoff(n - 1, 500, least));
  assert.ok(backoff(1000, 60_000, most) <= 10_000);
  assert.notEqual(backoff(3, 500, least), backoff(3, 500, most));
});

test("the server's wish for a longer wait is heard", () => assert.ok(backoff(0, 3000, () => 0) >= 1500));
