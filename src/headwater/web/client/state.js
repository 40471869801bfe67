/**
 * What a run's events add up to. The same events give the same content, reasoning, usage, stage and
 * progress on the server; `spec/cases/transcript.json` holds both to it.
 *
 * @typedef {{ seq: number, type: string, at: number, [field: string]: any }} Event
 * @typedef {object} RunState
 * @property {string} content
 * @property {string} reasoning
 * @property {object | null} usage
 * @property {string | null} stage
 * @property {number} progress from 0 to 1
 * @property {string | null} notice what the run last said about itself; gone when text arrives
 * @property {number | null} thinkingFrom Unix ms of the first reasoning
 * @property {number | null} thinkingTo Unix ms of the last reasoning, or of the text that followed it
 * @property {"queued" | "running" | "done" | "failed" | "cancelled"} status
 * @property {number} attempt
 * @property {{ code: string, message: string, retryable: boolean } | null} error
 * @property {Event | null} end the terminal event
 * @property {import("./cursor.js").Cursor | null} cursor
 */

const NOTHING = {
  content: "",
  reasoning: "",
  usage: null,
  stage: null,
  progress: 0,
  notice: null,
  thinkingFrom: null,
  thinkingTo: null,
};

/** @returns {RunState} a run of which nothing is known yet */
export const initial = () => ({ ...NOTHING, status: "queued", attempt: 0, error: null, end: null, cursor: null });

const END = { done: "done", error: "failed", cancelled: "cancelled" };

/**
 * Take in the next event of the log.
 *
 * @param {RunState} state @param {Event} event @returns {RunState} a new state
 */
export function fold(state, event) {
  switch (event.type) {
    case "content": {
      const first = state.content === "" && state.reasoning !== "";
      const thinkingTo = first ? event.at : state.thinkingTo;
      return { ...state, content: state.content + event.text, thinkingTo, notice: null };
    }
    case "reasoning": {
      const thinkingFrom = state.thinkingFrom ?? event.at;
      return { ...state, reasoning: state.reasoning + event.text, thinkingFrom, thinkingTo: event.at, notice: null };
    }
    case "usage": {
      const { seq: _seq, type: _type, at: _at, run_id: _run, ...usage } = event;
      return { ...state, usage };
    }
    case "progress":
      return { ...state, stage: event.stage, progress: event.progress, notice: event.message || state.notice };
    case "log":
      return event.level === "debug" ? state : { ...state, notice: event.message };
    case "state":
      return { ...state, status: event.state, attempt: event.attempt ?? state.attempt };
    case "reset":
      return { ...state, ...NOTHING, attempt: event.attempt ?? state.attempt, notice: event.reason ?? null };
    case "done":
    case "cancelled":
      return { ...state, status: END[event.type], end: event, notice: null };
    case "error": {
      const { code, message, retryable } = event;
      return { ...state, status: "failed", end: event, error: { code, message, retryable }, notice: null };
    }
    default:
      return state; // a type of a later version
  }
}

/**
 * Take in an event where it belongs: once, in order, and afresh when the log began again.
 *
 * @param {RunState} state @param {Event} event
 * @param {import("./cursor.js").Cursor | null} cursor the place of `event`
 * @returns {RunState | "gap"} `state` itself for an event seen before; "gap" when events before it are missing
 */
export function apply(state, event, cursor) {
  if (cursor === null) return fold(state, event); // said by the server about the stream, not part of the log
  const known = state.cursor;
  const same = known !== null && known.epoch === cursor.epoch;
  if (same && cursor.seq <= known.seq) return state;
  if (cursor.seq > (same ? known.seq : 0) + 1) return "gap";
  return { ...fold(same ? state : initial(), event), cursor };
}
