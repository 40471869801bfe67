/** A server over a real socket whose answers a test writes. */
import { once } from "node:events";
import http from "node:http";

/** @param {(request: http.IncomingMessage, response: http.ServerResponse, n: number) => void} answer */
export async function serve(answer, test) {
  const requests = [];
  const server = http.createServer((request, response) => {
    requests.push(request.url);
    answer(request, response, requests.length);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  test.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return { origin: `http://127.0.0.1:${server.address().port}`, requests };
}

export const frame = (event, { epoch = "e", run } = {}) =>
  `id: ${epoch}-${event.seq}\nevent: ${event.type}\ndata: ${JSON.stringify(run ? { run_id: run, ...event } : event)}\n\n`;

/** The answer `words` as a log. */
export function log(words) {
  const events = words.map((text, n) => ({ seq: n + 1, type: "content", at: n, text }));
  return [...events, { seq: words.length + 1, type: "done", at: 99, finish_reason: "stop" }];
}

export function stream(response) {
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  response.write("retry: 1\n\n");
  return response;
}

/** What follows the cursor in a request's address. */
export function after(url) {
  return Number(new URL(url, "http://x").searchParams.get("after")?.split("-")[1] ?? 0);
}

/** Resolves when `check` is true; the test's own time limit ends it otherwise. */
export async function eventually(check) {
  while (!check()) await new Promise((resolve) => setTimeout(resolve, 2));
}
