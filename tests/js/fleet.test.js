import assert from "node:assert/strict";
import { test } from "node:test";
import { Fleet } from "../../src/headwater/web/client/index.js";
import { after, eventually, frame, log, serve, stream } from "./support.js";

const TIME = { timeout: 180_000 };

/** `heartbeat`: as long as on the page, unless silence is what is tested: a busy machine is silent now and then. */
function follow(origin, t, ids, focus = null, heartbeat = 15_000) {
  const seen = { texts: [], gone: [], states: [] };
  const fleet = new Fleet({
    origin,
    heartbeat,
    onEvent: (id, state) => seen.texts.push([id, state.content]),
    onGone: (id, why, problem, status) => seen.gone.push([id, why, status, problem?.detail]),
    onState: (name, state) => seen.states.push(`${name} ${state}`),
  });
  t.after(() => fleet.close());
  ids.forEach((id) => fleet.follow(id));
  fleet.focus(focus);
  return { fleet, seen };
}

test("an answer cut after every event and at every byte of a frame is whole", TIME, async (t) => {
  const events = log(["Stréams ", "begin ", "here."]);
  const bytes = Buffer.from(events.map((event) => frame(event)).join(""));
  const cut = new Set();
  const { origin } = await serve((request, response) => {
    const at = Number(/\/r(\d+)/.exec(request.url)[1]);
    const rest = events
      .slice(after(request.url))
      .map((event) => frame(event))
      .join("");
    stream(response);
    if (cut.has(at)) return response.end(rest);
    cut.add(at);
    response.write(bytes.subarray(0, at), () => response.destroy());
  }, t);
  const reader = (at) =>
    new Promise((resolve) => {
      const fleet = new Fleet({ origin, onGone: resolve, onEvent: (id, state) => state.end && resolve(state.content) });
      t.after(() => fleet.close());
      fleet.follow(`r${at}`);
      fleet.focus(`r${at}`);
    });
  const places = [...bytes.keys()];
  for (let n = 0; n < places.length; n += 50) {
    const texts = await Promise.all(places.slice(n, n + 50).map(reader));
    texts.forEach((text, m) => assert.equal(text, "Stréams begin here.", `cut after byte ${n + m}`));
  }
  assert.equal(cut.size, bytes.length);
});

test("the end of a stream is not the end of a run", TIME, async (t) => {
  const events = log(["a", "b", "c"]);
  const { origin, requests } = await serve((request, response) => {
    const next = events[after(request.url)]; // one event per connection
    stream(response).end(frame(next));
  }, t);
  const { fleet } = follow(origin, t, ["r"], "r");
  await eventually(() => fleet.state("r").end);
  assert.equal(fleet.state("r").content, "abc");
  assert.deepEqual(requests, [
    "/api/stream/r",
    "/api/stream/r?after=e-1",
    "/api/stream/r?after=e-2",
    "/api/stream/r?after=e-3",
  ]);
});

test("many runs share one connection, and the one on screen has its own", TIME, async (t) => {
  const ids = Array.from({ length: 12 }, (_, n) => `r${n}`);
  const held = [];
  const { origin, requests } = await serve((request, response) => {
    const url = new URL(request.url, "http://x");
    stream(response);
    const runs = url.searchParams
      .get("runs")
      ?.split(",")
      .map((part) => part.split(":")[0]);
    held.push(() => {
      for (const event of log(["x", "y"])) {
        for (const run of runs ?? []) response.write(frame(event, { run, epoch: run }));
        if (!runs) response.write(frame(event));
      }
      response.end();
    });
  }, t);
  const { fleet } = follow(origin, t, ids, "r3");
  await eventually(() => held.length === 2);
  held.forEach((answer) => answer());
  await eventually(() => ids.every((id) => fleet.state(id).end));
  for (const id of ids) assert.equal(fleet.state(id).content, "xy");
  assert.equal(requests.length, 2);
  assert.ok(requests.includes("/api/stream/r3"));
});

test("a run that comes later joins the shared connection with the others' cursors", TIME, async (t) => {
  const open = [];
  const { origin, requests } = await serve((request, response) => open.push(stream(response)), t);
  const { fleet, seen } = follow(origin, t, ["r0"]);
  await eventually(() => open.length === 1);
  open[0].write(frame(log(["first"])[0], { run: "r0" }));
  await eventually(() => seen.texts.length === 1);
  fleet.follow("r1");
  await eventually(() => open.length === 2);
  assert.equal(requests[1], "/api/stream?runs=r0:e-1,r1:");
});

test("a hole in the log is read again, from the beginning if need be", TIME, async (t) => {
  const events = log(["a", "b", "c"]);
  const { origin, requests } = await serve((request, response, n) => {
    const rest = events.slice(after(request.url));
    stream(response).end((n <= 2 ? rest.filter(({ seq }) => seq !== 2) : rest).map((event) => frame(event)).join(""));
  }, t);
  const { fleet } = follow(origin, t, ["r"], "r");
  await eventually(() => fleet.state("r").end);
  assert.equal(fleet.state("r").content, "abc");
  assert.deepEqual(requests, ["/api/stream/r", "/api/stream/r?after=e-1", "/api/stream/r"]);
});

test("a log that was lost and begun again replaces the text", TIME, async (t) => {
  const { origin } = await serve((request, response, n) => {
    if (n === 1) return stream(response).end(frame(log(["old"])[0], { epoch: "one" }));
    const reset = frame({ seq: 0, type: "reset", at: 0, reason: "history_lost" }, { epoch: "two" });
    stream(response).end(
      reset +
        log(["new"])
          .map((event) => frame(event, { epoch: "two" }))
          .join(""),
    );
  }, t);
  const { fleet } = follow(origin, t, ["r"], "r");
  await eventually(() => fleet.state("r").end);
  assert.equal(fleet.state("r").content, "new");
});

test("a connection that says nothing for too long is given up", TIME, async (t) => {
  const { origin } = await serve((request, response, n) => {
    stream(response); // and then silence
    if (n > 1)
      response.end(
        log(["here"])
          .map((event) => frame(event))
          .join(""),
      );
  }, t);
  const { fleet } = follow(origin, t, ["r"], "r", 200);
  await eventually(() => fleet.state("r").end);
  assert.equal(fleet.state("r").content, "here");
});

test("503 and a dead server are waited out", TIME, async (t) => {
  const { origin } = await serve((request, response, n) => {
    if (n === 1)
      return response.writeHead(503, { "Content-Type": "application/problem+json" }).end('{"detail":"away"}');
    if (n === 2) return request.socket.destroy();
    stream(response).end(
      log(["up"])
        .map((event) => frame(event))
        .join(""),
    );
  }, t);
  const { fleet, seen } = follow(origin, t, ["r"], "r");
  await eventually(() => fleet.state("r").end);
  assert.equal(fleet.state("r").content, "up");
  assert.deepEqual(seen.gone, []);
});

for (const status of [204, 401, 404])
  test(`${status} is said once and not asked again before somebody wants it`, TIME, async (t) => {
    const { origin, requests } = await serve((request, response, n) => {
      if (n > 1)
        return stream(response).end(
          log(["back"])
            .map((event) => frame(event))
            .join(""),
        );
      response.writeHead(status).end();
    }, t);
    const { fleet, seen } = follow(origin, t, ["r"], "r");
    await eventually(() => seen.gone.length === 1);
    assert.deepEqual(seen.gone[0].slice(0, 3), ["r", status === 204 ? "past_end" : "refused", status]);
    fleet.follow("other"); // arranges the connections anew
    await eventually(() => requests.length === 2);
    assert.equal(requests.filter((url) => url.startsWith("/api/stream/r")).length, 1);
    fleet.retry("r");
    await eventually(() => fleet.state("r").end);
  });

test("an unknown run among several does not trouble the others", TIME, async (t) => {
  const { origin } = await serve((request, response) => {
    stream(response).write(
      'event: error\ndata: {"run_id":"bad","type":"error","code":"not_found","message":"There is no such run."}\n\n',
    );
    response.end(
      log(["fine"])
        .map((event) => frame(event, { run: "good" }))
        .join(""),
    );
  }, t);
  const { fleet, seen } = follow(origin, t, ["bad", "good"]);
  await eventually(() => fleet.state("good").end && seen.gone.length);
  assert.equal(fleet.state("good").content, "fine");
  assert.equal(fleet.state("bad").end, null);
  assert.deepEqual(seen.gone, [["bad", "refused", 404, "There is no such run."]]);
});

test("asleep it holds no connection, and awake it goes on where it was", TIME, async (t) => {
  const events = log(["a", "b"]);
  const open = [];
  const { origin, requests } = await serve((request, response) => {
    open.push(stream(response));
    if (after(request.url) === 0) response.write(frame(events[0]));
    else
      response.end(
        events
          .slice(1)
          .map((event) => frame(event))
          .join(""),
      );
  }, t);
  const { fleet } = follow(origin, t, ["r"], "r");
  await eventually(() => fleet.state("r").content === "a");
  fleet.sleep();
  await eventually(() => open[0].destroyed);
  fleet.wake();
  await eventually(() => fleet.state("r").end);
  assert.equal(fleet.state("r").content, "ab");
  assert.equal(requests.at(-1), "/api/stream/r?after=e-1");
});

test("a run that the server cannot tell of now is asked for again, and the others go on meanwhile", TIME, async (t) => {
  const open = [];
  const { origin, requests } = await serve((request, response) => open.push(stream(response)), t);
  const { fleet, seen } = follow(origin, t, ["r0", "r1"]);
  await eventually(() => open.length === 1);
  const refusal = { run_id: "r1", type: "error", code: "store_unavailable", message: "Away.", retryable: true };
  open[0].write(`event: error\ndata: ${JSON.stringify(refusal)}\n\n`);
  open[0].write(frame(log(["first"])[0], { run: "r0" }));
  await eventually(() => seen.texts.length === 1);
  assert.deepEqual(seen.gone, [["r1", "refused", 503, "Away."]]);
  assert.equal(fleet.state("r1").end, null);
  fleet.retry("r1");
  await eventually(() => open.length === 2);
  assert.equal(requests[1], "/api/stream?runs=r0:e-1,r1:");
});
