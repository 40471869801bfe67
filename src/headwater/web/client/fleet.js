/**
 * All runs that somebody wants to follow, over two connections at most: the run on screen has its
 * own, all others share one. A browser allows six connections per host over HTTP/1.1, so one per run
 * would stop the seventh and every other request.
 */
import { formatCursor, parseCursor } from "./cursor.js";
import { apply, fold, initial } from "./state.js";
import { openStream } from "./stream.js";

const SHARED_RUNS = 64; // on one connection; keeps its address under 8 KiB. The others wait their turn.
const GATHER = 30; // ms; changes to the set within this time open one connection, not several

/**
 * @typedef {object} FleetOptions
 * @property {string} [origin] before `/api/…`
 * @property {(id: string, state: import("./state.js").RunState, event: object) => void} onEvent
 * @property {(id: string, why: "past_end" | "refused", problem: object | null, status: number) => void} onGone
 *   the server has nothing more of this run, although no terminal event was seen: ask what became of it
 * @property {(name: "focus" | "shared", state: string, detail: string) => void} [onState]
 * @property {typeof fetch} [fetch]
 * @property {number} [heartbeat] ms
 */
export class Fleet {
  /** @type {Map<string, import("./state.js").RunState>} */
  #runs = new Map();
  #gaps = new Map(); // run → how often in a row its log had a hole
  #parked = new Set(); // the server had nothing more of them; `onGone` is finding out
  #focus = null;
  #streams = { focus: null, shared: null };
  #following = { focus: "", shared: "" };
  #timer = null;
  #asleep = false;
  #options;

  /** @param {FleetOptions} options */
  constructor(options) {
    this.#options = { origin: "", onState: () => {}, ...options };
  }

  /** @param {string} id @returns {import("./state.js").RunState | undefined} */
  state(id) {
    return this.#runs.get(id);
  }

  /** Follow a run from its beginning, if it is not followed already. */
  follow(id) {
    if (this.#runs.has(id)) return;
    this.#runs.set(id, initial());
    this.#later();
  }

  /** No longer follow a run; what was seen is forgotten. */
  forget(id) {
    this.#runs.delete(id);
    this.#gaps.delete(id);
    this.#parked.delete(id);
    this.#later();
  }

  /** Ask the server again for a run that `onGone` told of. */
  retry(id) {
    if (this.#parked.delete(id)) this.#later();
  }

  /** Give this run a connection of its own; null gives it to none. */
  focus(id) {
    if (this.#focus === id) return;
    this.#focus = id;
    this.#later();
  }

  /** Connections may be dead or waiting: try again now. */
  wake() {
    this.#asleep = false;
    this.#streams.focus?.wake();
    this.#streams.shared?.wake();
    this.#later();
  }

  /** Give the connections back; `wake` goes on where they stopped. */
  sleep() {
    this.#asleep = true;
    this.#later();
  }

  close() {
    this.sleep();
    clearTimeout(this.#timer);
    this.#arrange();
  }

  // Connections

  #later() {
    this.#timer ??= setTimeout(() => this.#arrange(), GATHER);
  }

  #open(id) {
    return this.#runs.get(id)?.end === null;
  }

  #live() {
    return [...this.#runs.keys()].filter((id) => this.#open(id) && !this.#parked.has(id));
  }

  #arrange() {
    this.#timer = null;
    const live = this.#asleep ? [] : this.#live();
    const focus = live.filter((id) => id === this.#focus);
    const shared = live.filter((id) => id !== this.#focus).slice(0, SHARED_RUNS);
    this.#reopen("focus", focus, () => {
      const after = formatCursor(this.#runs.get(focus[0])?.cursor ?? null);
      return `/api/stream/${focus[0]}${after && `?after=${after}`}`;
    });
    this.#reopen("shared", shared, () => {
      const open = shared.filter((id) => this.#open(id));
      return `/api/stream?runs=${open.map((id) => `${id}:${formatCursor(this.#runs.get(id).cursor)}`).join(",")}`;
    });
  }

  #reopen(name, ids, path) {
    const wanted = ids.join(",");
    if (wanted === this.#following[name]) return;
    // Runs that merely ended need no new connection: the server sends nothing more of them.
    const before = this.#following[name].split(",");
    const same = before.filter((id) => this.#open(id)).join(",") === wanted;
    if (wanted !== "" && same && this.#streams[name]) return;
    this.#drop(name);
    if (wanted === "") return;
    this.#following[name] = wanted;
    this.#streams[name] = this.#connect(name, ids, path);
  }

  #connect(name, ids, path) {
    const { origin, fetch, heartbeat, onState } = this.#options;
    return openStream({
      fetch,
      heartbeat,
      url: () => origin + path(),
      onFrame: (frame) => this.#take(frame, name, ids),
      onState: (state, detail) => onState(name, state, detail),
      onOver: (why, problem, status) => this.#over(name, ids, why, problem, status),
    });
  }

  #take(frame, name, ids) {
    const event = JSON.parse(frame.data);
    const id = event.run_id ?? ids[0];
    const before = this.#runs.get(id);
    if (before === undefined || before.end !== null) return;
    // Without a number it is no event of the log: the server says something about the run itself.
    if (event.seq === undefined && event.type === "error") return this.#refused(id, event, name, ids);
    const cursor = event.seq === undefined ? null : parseCursor(frame.id);
    let after = apply(before, event, cursor);
    if (after === before) return;
    if (after === "gap") after = this.#mend(id, before, event, cursor);
    else this.#gaps.delete(id);
    this.#runs.set(id, after);
    this.#options.onEvent(id, after, event);
    if (after.end === null) return;
    if (!ids.some((other) => this.#open(other))) this.#drop(name); // the server is about to end it
    this.#later(); // there may be room for a run that waits its turn
  }

  /** The server leaves one run out of a connection that goes on for the others. */
  #refused(id, event, name, ids) {
    if (this.#parked.has(id)) return;
    // It is not on this connection, so `retry` has to open another.
    const rest = this.#following[name].split(",").filter((other) => other !== id);
    this.#following[name] = rest.join(",");
    this.#park(id, "refused", { detail: event.message, ...event }, event.retryable ? 503 : 404);
    if (!ids.some((other) => this.#open(other) && !this.#parked.has(other))) this.#drop(name);
  }

  #drop(name) {
    this.#streams[name]?.close();
    this.#streams[name] = null;
    this.#following[name] = "";
  }

  /**
   * Events are missing. Reading again from the last one seen helps, or else from the beginning; a hole
   * that is still there the fourth time is the server's, and the rest is better than nothing.
   */
  #mend(id, before, event, cursor) {
    const gaps = (this.#gaps.get(id) ?? 0) + 1;
    this.#gaps.set(id, gaps);
    if (gaps > 3) return { ...fold(before, event), cursor };
    if (gaps > 1) this.#runs.set(id, { ...before, cursor: null });
    throw new Error("events are missing");
  }

  #over(name, ids, why, problem, status) {
    this.#drop(name);
    if (problem?.code === "bad_cursor") {
      // Our cursors cannot be read, so they are worth nothing: begin again.
      for (const id of ids) if (this.#open(id)) this.#runs.set(id, initial());
      setTimeout(() => this.#later(), 1000);
      return;
    }
    for (const id of ids) if (this.#open(id)) this.#park(id, why, problem, status);
    this.#later();
  }

  #park(id, why, problem, status) {
    this.#parked.add(id);
    this.#options.onGone(id, why, problem, status);
  }
}
