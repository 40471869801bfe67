/** One chat's messages: the tree, the path on screen, and messages on their way to the server. */
import { choose, path } from "./tree.js";

const ENDED = new Set(["done", "failed", "cancelled"]);

export class Thread {
  /** @type {Map<string, object>} oldest first */
  messages = new Map();
  /** @type {Map<string, string>} */
  choices = new Map();
  /** @type {"loading" | "ready" | "missing" | "failed"} */
  status = "loading";
  error = null;
  /** PostgreSQL was away at the last look: earlier messages may be missing. */
  degraded = false;
  /** Grows when the server accepts something; messages read before that are out of date. */
  edits = 0;

  constructor(id) {
    this.id = id;
  }

  get path() {
    return path(this.messages.values(), this.choices);
  }

  /** The answer being made, if any. */
  get processing() {
    return [...this.messages.values()].find((message) => message.status === "processing");
  }

  get sending() {
    return [...this.messages.values()].some((message) => message.status === "sending");
  }

  /** Take in the server's view. What ended before our eyes stays ended, though its row may lag behind. */
  merge(messages) {
    const before = this.messages;
    const unsent = [...before.values()].filter(
      (message) => message.status === "sending" || message.status === "unsent",
    );
    this.messages = new Map();
    for (const message of messages) {
      const ours = before.get(message.id);
      const ahead = ours && ENDED.has(ours.status) && message.status === "processing" && ours.run_id === message.run_id;
      this.messages.set(message.id, ahead ? ours : { ...message, thought: ours?.thought });
    }
    for (const message of unsent) this.messages.set(message.id, message);
    this.status = "ready";
    this.error = null;
  }

  /** A question on its way, shown at once. */
  sendingNow({ key, content, parentId }) {
    const id = `local:${key}`;
    const message = { id, key, role: "user", content, parent_id: parentId, status: "sending", error: null };
    this.messages.set(id, message);
    choose(this.choices, message);
  }

  unsent(key, error) {
    const message = this.messages.get(`local:${key}`);
    if (message) this.messages.set(message.id, { ...message, status: "unsent", error });
  }

  withdraw(key) {
    this.messages.delete(`local:${key}`);
  }

  /** The server took the question, or the wish for another answer to it. */
  accepted({ key, content, parentId }, { task_id, message_id, user_message_id }) {
    this.withdraw(key);
    this.edits += 1;
    const at = new Date().toISOString();
    if (content !== undefined && !this.messages.has(user_message_id)) {
      const question = {
        id: user_message_id,
        role: "user",
        content,
        parent_id: parentId,
        status: "done",
        created_at: at,
      };
      this.messages.set(user_message_id, question);
      choose(this.choices, question);
    }
    const parent = content === undefined ? parentId : user_message_id;
    const answer = {
      id: message_id,
      role: "assistant",
      content: "",
      parent_id: parent,
      run_id: task_id,
      created_at: at,
    };
    if (!this.messages.has(message_id)) this.messages.set(message_id, { ...answer, status: "processing", error: null });
    choose(this.choices, answer);
  }

  /** A run ended before our eyes. */
  ended(runId, state) {
    for (const message of this.messages.values()) {
      if (message.run_id !== runId || ENDED.has(message.status)) continue;
      this.messages.set(message.id, { ...message, ...live(state), status: state.status });
    }
  }
}

/** What a run's state says about its message. */
export function live(state) {
  const { content, reasoning, error, notice, stage, progress, attempt } = state;
  const thought = state.thinkingTo === null ? undefined : state.thinkingTo - state.thinkingFrom;
  return {
    content,
    reasoning,
    error,
    notice,
    stage,
    progress,
    attempt,
    thought,
    usage: state.end?.usage ?? state.usage,
  };
}
