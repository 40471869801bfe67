/** How the system is: asked every ten seconds while somebody looks at the page, more often while it is ill. */
import { request } from "./api.js";

const EVERY = 10_000; // ms
const WHILE_ILL = 3_000; // ms
const ENTRIES = 300; // lines of the system log

/** The last things that happened, for the system log. */
export class SystemLog {
  /** @type {{ n: number, at: number, level: "info" | "good" | "warn" | "bad", text: string }[]} newest last */
  entries = [];
  #n = 0;
  #changed;

  constructor(changed) {
    this.#changed = changed;
  }

  add(level, text) {
    this.entries = [...this.entries.slice(1 - ENTRIES), { n: ++this.#n, at: Date.now(), level, text }];
    this.#changed();
  }
}

export class Health {
  /** The last answer of `/api/health`; null before the first and while the server cannot be reached. */
  report = null;
  reachable = true;
  #summary = "";
  #timer = null;
  #log;
  #changed;
  #onStore;

  /** @param {{ log: SystemLog, changed: () => void, onStore: () => void }} hooks `onStore`: PostgreSQL answers */
  constructor({ log, changed, onStore }) {
    this.#log = log;
    this.#onStore = onStore;
    this.#changed = changed;
  }

  /** Begin, or stop while the page is hidden. */
  async watch() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    await this.check();
    clearTimeout(this.#timer); // another call may have come this far meanwhile
    this.#timer = setTimeout(() => this.watch(), this.report?.status === "ok" ? EVERY : WHILE_ILL);
  }

  async check() {
    try {
      this.report = await request("GET", "/api/health");
      this.reachable = true;
    } catch (error) {
      // A server that is down says so in the body of a 503.
      this.report = error.problem?.parts ? error.problem : null;
      this.reachable = error.code !== "unreachable";
    }
    const summary = this.reachable ? describe(this.report) : "The server cannot be reached.";
    if (summary !== this.#summary) {
      const level =
        !this.reachable || this.report?.status === "down" ? "bad" : this.report?.status === "ok" ? "good" : "warn";
      this.#log.add(level, summary);
      this.#summary = summary;
    }
    if (this.report?.parts?.postgres?.ok) this.#onStore();
    this.#changed();
  }
}

function describe(report) {
  if (!report) return "The health of the server is not known.";
  const away = Object.entries(report.parts ?? {}).filter(([, part]) => part?.ok === false);
  return [`System ${report.status}.`, ...away.map(([name, { detail }]) => `${name}: ${detail || "away"}`)].join(" ");
}
