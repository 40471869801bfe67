/**
 * One SSE response after another until it is over: reconnects by itself, never gives up while the
 * trouble may pass, and notices a connection that died without saying so.
 */
import { createParser } from "./parser.js";

const FIRST_WAIT = 500; // ms, unless the server says `retry:`
const LONGEST_WAIT = 10_000; // ms
const HEARTBEAT = 15_000; // ms; the server's longest silence
const LOST_AFTER = 2.5; // heartbeats without a byte

/**
 * @typedef {object} StreamOptions
 * @property {() => string} url asked before each connection, so that it carries the newest cursors
 * @property {(frame: import("./parser.js").Frame) => void} onFrame throws to have the stream opened again
 * @property {(reason: "past_end" | "refused", problem: object | null, status: number) => void} onOver
 *   204: everything asked for was delivered before; or the server refuses for good (401, 403, 404 …)
 * @property {(state: "connecting" | "open" | "waiting", detail: string) => void} [onState]
 * @property {typeof fetch} [fetch]
 * @property {number} [heartbeat] ms
 * @property {() => number} [random] 0 to 1
 */

/** How long to wait before the n-th try in a row: exponential, never in step with other readers. */
export function backoff(tries, base = FIRST_WAIT, random = Math.random) {
  const full = Math.min(LONGEST_WAIT, Math.max(base, FIRST_WAIT / 2) * 2 ** Math.min(tries, 10));
  return full / 2 + (full / 2) * random();
}

/**
 * Open a stream and keep it open.
 *
 * @param {StreamOptions} options
 * @returns {{ close(): void, wake(): void }} `wake` ends a wait, and doubts a connection that has been quiet
 */
export function openStream(options) {
  const { url, onFrame, onOver, onState = () => {}, heartbeat = HEARTBEAT, random = Math.random } = options;
  const fetcher = options.fetch ?? globalThis.fetch.bind(globalThis);
  let closed = false;
  let controller = new AbortController();
  let endWait = () => {};
  let base = FIRST_WAIT;
  let tries = 0;
  let lastByte = 0;

  async function read(response) {
    const parser = createParser({
      onRetry: (ms) => (base = ms),
      onFrame: (frame) => {
        tries = 0; // bytes alone prove little: a proxy may answer and hang up
        if (!closed) onFrame(frame);
      },
    });
    const reader = response.body.getReader();
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done || closed) return;
        lastByte = performance.now();
        parser.feed(value);
      }
    } finally {
      reader.cancel().catch(() => {}); // it is broken already: nothing is lost
    }
  }

  /** @returns {Promise<string>} why it ended; a stream that ends without a terminal event is not finished */
  async function once() {
    controller = new AbortController();
    lastByte = performance.now();
    const watchdog = setInterval(() => {
      if (performance.now() - lastByte > LOST_AFTER * heartbeat) controller.abort(new Error("silence"));
    }, heartbeat / 4);
    watchdog.unref?.();
    try {
      const headers = { Accept: "text/event-stream" };
      const response = await fetcher(url(), { headers, cache: "no-store", signal: controller.signal });
      if (closed) return "closed";
      if (response.status === 200) {
        onState("open", "");
        await read(response);
        return "the server ended the connection";
      }
      const problem = await response.json().catch(() => null); // 204 and proxies' pages carry none
      if (response.status === 204) return over("past_end", null, 204);
      const passing = response.status >= 500 || response.status === 429 || response.status === 408;
      if (!passing) return over("refused", problem, response.status);
      base = Math.max(base, 1000 * Number(response.headers.get("Retry-After") ?? 0) || 0);
      return problem?.detail ?? `HTTP ${response.status}`;
    } catch (error) {
      return String(error?.message ?? error);
    } finally {
      clearInterval(watchdog);
    }
  }

  function over(reason, problem, status) {
    if (!closed) {
      close();
      onOver(reason, problem, status);
    }
    return reason;
  }

  async function loop() {
    while (!closed) {
      onState("connecting", "");
      const reason = await once();
      if (closed) return;
      const ms = backoff(tries++, base, random);
      onState("waiting", reason);
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, ms);
        endWait = () => {
          clearTimeout(timer);
          resolve();
        };
      });
      endWait = () => {};
    }
  }

  function close() {
    closed = true;
    controller.abort(new Error("closed"));
    endWait();
  }

  loop();
  return {
    close,
    wake() {
      tries = 0;
      if (performance.now() - lastByte > 1000) controller.abort(new Error("woken"));
      endWait();
    },
  };
}
