/** Everything the page knows. Elements read it and call its verbs; it knows no element. */
import { Fleet } from "../client/index.js";
import { persistently, request, signIn } from "./api.js";
import { Directory } from "./directory.js";
import { Health, SystemLog } from "./health.js";
import { keepOutbox, outbox, saveDraft } from "./storage.js";
import { live, Thread } from "./thread.js";
import { choose } from "./tree.js";

const ASK_AGAIN = 2000; // ms until a run that the stream does not know is looked for again
const HIDDEN_FOR = 20_000; // ms; then the connections are left to other tabs
const TRIES_AWAY = 12; // to send a message; more than half a minute, in which a server that was restarted is back

/** Plain HTTP on another host has no `randomUUID`. */
const newKey = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint32Array(4))].join("-");

export class App {
  /** @type {string | null} the chat on screen; null for one that has not begun */
  current = null;
  /** What a screen reader is told next. */
  announcement = "";
  /** Chats whose answer ended unseen. @type {Map<string, "done" | "failed">} */
  marks = new Map();
  /** Runs that were asked to stop. */
  stopping = new Set();
  /** @type {Map<string, Thread>} */
  #threads = new Map();
  /** @type {Map<string, string>} active run → chat */
  #runs = new Map();
  #listeners = new Set();
  #scheduled = false;
  #hiddenTimer = null;

  constructor() {
    const changed = () => this.#changed();
    this.log = new SystemLog(changed);
    this.health = new Health({ log: this.log, changed, onStore: () => this.#complete() });
    this.chats = new Directory({ changed, onItems: (items) => items.forEach((chat) => this.#noticed(chat)) });
    this.fleet = new Fleet({
      onEvent: (...event) => this.#heard(...event),
      onGone: (...gone) => this.#gone(...gone),
      onState: (name, state, detail) => this.#connection(name, state, detail),
    });
  }

  start() {
    addEventListener("hashchange", () => this.#route());
    addEventListener("online", () => this.#woken("The network is back."));
    addEventListener("offline", () => this.log.add("warn", "The network is gone; what runs goes on without us."));
    addEventListener("pageshow", (event) => event.persisted && this.#woken("The page is back."));
    document.addEventListener("visibilitychange", () => this.#visibility());
    this.#route();
    this.chats.refresh();
    this.health.watch();
    for (const item of outbox()) this.#deliver(item);
  }

  /** @param {() => void} listener called at most once a frame @returns {() => void} to stop */
  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  // Reading

  /** @param {string} id @returns {Thread} */
  thread(id) {
    if (!this.#threads.has(id)) this.#threads.set(id, new Thread(id));
    return this.#threads.get(id);
  }

  get shown() {
    return this.current === null ? null : this.thread(this.current);
  }

  /** A message as it is now, with what its run has said so far. */
  view(message) {
    if (message.status !== "processing") return message;
    if (message !== this.shown?.processing) return { ...message, queued: true };
    const state = this.fleet.state(message.run_id);
    return state ? { ...message, ...live(state), waiting: state.status === "queued" } : message;
  }

  /** Whether a message can be sent in the chat on screen: while it answers, only if the server would not refuse it. */
  get maySend() {
    const policy = this.health.report?.when_busy ?? "reject";
    return !this.shown?.sending && (!this.shown?.processing || policy !== "reject");
  }

  /** @returns {"running" | "done" | "failed" | null} */
  mark(chatId) {
    for (const chat of this.#runs.values()) if (chat === chatId) return "running";
    return this.marks.get(chatId) ?? null;
  }

  get running() {
    return this.#runs.size;
  }

  // Verbs

  open(id) {
    location.hash = id === null ? "#/" : `#/chat/${id}`;
  }

  /**
   * Ask. In a chat that has not begun, begins it.
   * @throws {Error} when a chat cannot be begun; nothing was sent then
   */
  async send(content, parentId = this.shown?.path.at(-1)?.message.id ?? null) {
    const key = newKey();
    let chatId = this.current;
    if (chatId === null) {
      chatId = (await this.chats.create(`${key}-chat`)).id;
      this.thread(chatId).merge([]);
      if (this.current === null) this.open(chatId);
    }
    const item = { key, chatId, content, parentId };
    await this.#deliver(item);
  }

  /** Send again what could not be sent; the same key makes it safe. */
  sendAgain(chatId, message) {
    return this.#deliver({ key: message.key, chatId, content: message.content, parentId: message.parent_id });
  }

  withdraw(chatId, message) {
    this.thread(chatId).withdraw(message.key);
    keepOutbox(message.key, null);
    this.#changed();
  }

  async regenerate(chatId, message) {
    const key = newKey();
    await this.#tell(async () => {
      const answer = await persistently("POST", `/api/chats/${chatId}/messages/${message.id}/regenerate`, { key });
      this.thread(chatId).accepted({ parentId: message.parent_id }, answer);
      this.#started(answer.task_id, chatId);
    });
  }

  async stop(runId, chatId = this.current) {
    this.stopping.add(runId);
    // One that waits behind an answer is not followed after a reload, and its end must be heard.
    this.#follow(runId, chatId);
    this.#changed();
    const sent = await this.#tell(() => persistently("POST", `/api/task/${runId}/cancel`));
    if (!sent) this.stopping.delete(runId);
  }

  choose(chatId, messageId) {
    const thread = this.thread(chatId);
    choose(thread.choices, thread.messages.get(messageId));
    this.#changed();
  }

  async remove(chatId) {
    if (!(await this.#tell(() => this.chats.remove(chatId)))) return;
    for (const [run, chat] of this.#runs) if (chat === chatId) this.#forget(run);
    this.#threads.delete(chatId);
    for (const item of outbox()) if (item.chatId === chatId) keepOutbox(item.key, null);
    saveDraft(chatId, "");
    if (this.current === chatId) this.open(null);
  }

  /** Whether what is on screen may lack something, because PostgreSQL was away when it was read. */
  get degraded() {
    return this.chats.degraded || (this.shown?.degraded ?? false);
  }

  async rename(chatId, title) {
    await this.#tell(() => this.chats.rename(chatId, title));
  }

  async load(chatId) {
    const thread = this.thread(chatId);
    const edits = [thread.edits, this.chats.edits];
    try {
      const chat = await persistently("GET", `/api/chats/${chatId}`);
      if (thread.edits !== edits[0]) return this.load(chatId);
      thread.merge(chat.messages);
      for (const { run_id } of chat.messages) {
        const state = this.fleet.state(run_id); // it may have ended before the chat was opened, and its row lag behind
        if (state?.end) thread.ended(run_id, state);
      }
      thread.degraded = chat.degraded;
      if (this.chats.edits === edits[1]) this.chats.put(chat);
      this.#noticed(chat);
      const answer = thread.processing;
      if (answer?.run_id) this.#follow(answer.run_id, chatId);
    } catch (error) {
      thread.error = error;
      if (error.status === 404 || error.status === 422) thread.status = "missing";
      else if (thread.messages.size === 0) thread.status = "failed";
    }
    this.#focus();
    this.#changed();
  }

  /** What went wrong with a verb, until the next one. @type {Error | null} */
  trouble = null;

  dismiss() {
    this.trouble = null;
    this.#changed();
  }

  // Inside

  #changed() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    const tell = () => {
      this.#scheduled = false;
      for (const listener of this.#listeners) listener();
    };
    // A hidden page gets no frames.
    if (document.hidden) setTimeout(tell, 200);
    else requestAnimationFrame(tell);
  }

  /** @returns {Promise<boolean>} whether it worked; if not, the page says why */
  async #tell(action) {
    try {
      this.trouble = null;
      await action();
      return true;
    } catch (error) {
      this.trouble = error;
      this.log.add("bad", error.message);
      return false;
    } finally {
      this.#changed();
    }
  }

  #route() {
    const id = /^#\/chat\/([\w-]+)$/.exec(location.hash)?.[1] ?? null;
    this.current = id;
    this.trouble = null;
    if (id !== null) {
      this.marks.delete(id);
      if (!this.thread(id).sending) this.load(id);
    }
    this.#focus();
    this.#changed();
  }

  async #deliver(item) {
    const thread = this.thread(item.chatId);
    keepOutbox(item.key, item);
    thread.sendingNow(item);
    this.#changed();
    const body = { content: item.content, parent_id: item.parentId };
    const sent = { body, key: item.key, away: TRIES_AWAY };
    try {
      const answer = await persistently("POST", `/api/chats/${item.chatId}/messages`, sent);
      keepOutbox(item.key, null);
      thread.accepted(item, answer);
      this.#started(answer.task_id, item.chatId);
    } catch (error) {
      // What may pass, and a sign-in that ran out, must not cost the message: the next load of the page sends it.
      if (!error.passing && error.status !== 401) keepOutbox(item.key, null);
      if (error.code === "chat_busy" && error.problem.task_id) this.#follow(error.problem.task_id, item.chatId);
      thread.unsent(item.key, error);
      this.log.add("bad", `Not sent: ${error.message}`);
    } finally {
      this.#focus();
      this.#changed();
    }
  }

  #started(runId, chatId) {
    this.#follow(runId, chatId);
    const known = this.chats.get(chatId);
    this.chats.put({ ...known, id: chatId, updated_at: new Date().toISOString(), active_task_id: runId });
    if (!known?.title) this.chats.refresh(); // the server names a chat after its first question
    this.#focus();
  }

  #noticed(chat) {
    if (chat.active_task_id) this.#follow(chat.active_task_id, chat.id);
  }

  #follow(runId, chatId) {
    if (this.#runs.has(runId) || this.fleet.state(runId)?.end) return;
    this.#runs.set(runId, chatId);
    this.fleet.follow(runId);
    this.log.add("info", `Run ${runId.slice(-6)} followed.`);
    if (chatId === this.current) this.announcement = "Answering.";
  }

  /** Read again what could not be read whole. */
  #complete() {
    if (this.chats.degraded) this.chats.refresh();
    if (this.shown?.degraded) this.load(this.current);
  }

  #focus() {
    this.fleet.focus(this.shown?.processing?.run_id ?? null);
  }

  #heard(runId, state, event) {
    const short = runId.slice(-6);
    if (event.type === "state")
      this.log.add("info", `Run ${short} ${event.state}${event.attempt > 1 ? `, attempt ${event.attempt}` : ""}.`);
    else if (event.type === "reset")
      this.log.add("warn", `Run ${short} begins again: ${event.reason ?? "its log was lost"}.`);
    else if (event.type === "log")
      this.log.add(event.level === "error" ? "bad" : event.level === "info" ? "info" : "warn", event.message);
    else if (event.type === "progress" && event.message) this.log.add("info", `Run ${short}: ${event.message}`);
    if (state.end !== null) this.#ended(runId, state);
    this.#changed();
  }

  #ended(runId, state) {
    const chatId = this.#runs.get(runId);
    const title = this.chats.get(chatId)?.title ?? "another chat";
    const said = { done: "Answer finished", cancelled: "Answer stopped", failed: "The answer failed" }[state.status];
    this.log.add(
      state.status === "failed" ? "bad" : "good",
      `Run ${runId.slice(-6)} ${state.status}. ${state.error?.message ?? ""}`,
    );
    this.announcement = chatId === this.current ? `${said}.` : `${said} in ${title}.`;
    this.#threads.get(chatId)?.ended(runId, state);
    this.#forget(runId);
    if (chatId === this.current && !document.hidden) this.load(chatId);
    else this.marks.set(chatId, state.status === "failed" ? "failed" : "done");
    if (chatId !== this.current) this.chats.refresh();
  }

  #forget(runId) {
    this.#runs.delete(runId);
    this.stopping.delete(runId);
    if (!this.fleet.state(runId)?.end) this.fleet.forget(runId);
    const chat = this.chats.items.find((item) => item.active_task_id === runId);
    if (chat) chat.active_task_id = null;
  }

  /** The stream has nothing more of a run that has not ended for us: ask what became of it. */
  async #gone(runId, _why, problem, status) {
    if (status === 401) return signIn();
    const task = await request("GET", `/api/task/${runId}`).catch((error) => ({
      status: error.status === 404 ? "gone" : "unknown",
    }));
    if (["queued", "running", "unknown", "processing"].includes(task.status)) {
      if (problem?.detail) this.log.add("warn", problem.detail);
      setTimeout(() => this.fleet.retry(runId), ASK_AGAIN);
      return;
    }
    const chatId = this.#runs.get(runId);
    if (task.status === "gone") {
      // Deleted with its chat, as a rule: nobody will ever say how it ended.
      const error = { code: "not_found", message: "The server no longer knows this answer." };
      this.#threads.get(chatId)?.ended(runId, { ...this.fleet.state(runId), status: "failed", error });
    }
    this.#forget(runId);
    if (chatId !== undefined) await this.load(chatId);
  }

  #connection(name, state, detail) {
    const which = name === "focus" ? "The chat on screen" : "The other chats";
    if (state === "open") this.log.add("good", `${which}: connected.`);
    if (state === "waiting") this.log.add("warn", `${which}: connecting again (${detail}).`);
  }

  #visibility() {
    clearTimeout(this.#hiddenTimer);
    this.health.watch();
    if (document.hidden) this.#hiddenTimer = setTimeout(() => this.fleet.sleep(), HIDDEN_FOR);
    else this.#woken("The page is visible again.");
  }

  /** After sleep nothing that is open can be trusted, and other tabs may have begun runs. */
  #woken(why) {
    this.log.add("info", why);
    this.fleet.wake();
    this.chats.refresh();
    this.health.check();
    if (this.current !== null) this.#route();
  }
}
