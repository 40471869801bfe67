/** The chats in the side bar: pages of a list, newest first, or of a search by title. */
import { persistently, request } from "./api.js";

const PAGE = 30; // chats
const TYPING = 180; // ms without a key before the search is sent

export class Directory {
  /** @type {{ id: string, title: string | null, created_at: string, updated_at: string, active_task_id: string | null }[]} */
  items = [];
  next = null;
  query = "";
  loading = false;
  /** PostgreSQL was away at the last look: these are the chats that were at hand. */
  degraded = false;
  /** @type {Error | null} */
  error = null;
  /** Grows with every change made here; what was read before a change is out of date. */
  edits = 0;
  #latest = 0; // number of the newest request; answers to older ones are out of date
  #timer = null;
  #changed;

  /** @param {{ changed: () => void, onItems: (items: object[]) => void }} hooks */
  constructor({ changed, onItems }) {
    this.#changed = changed;
    this.onItems = onItems;
  }

  get(id) {
    return this.items.find((chat) => chat.id === id);
  }

  /** Read the first page again and keep the further ones. */
  async refresh() {
    const page = await this.#read(null);
    if (page === null) return;
    const fresh = new Set(page.items.map((chat) => chat.id));
    const end = Date.parse(page.items.at(-1)?.updated_at); // what is missing before it is no more
    const further = (chat) => !fresh.has(chat.id) && Date.parse(chat.updated_at) <= end;
    const kept = page.next === null ? [] : this.items.filter(further);
    if (kept.length === 0) this.next = page.next;
    this.items = newestFirst([...page.items, ...kept]);
    this.#changed();
  }

  async more() {
    if (this.next === null || this.loading) return;
    const page = await this.#read(this.next);
    if (page === null) return;
    const known = new Set(this.items.map((chat) => chat.id));
    this.items = [...this.items, ...page.items.filter((chat) => !known.has(chat.id))];
    this.next = page.next;
    this.#changed();
  }

  search(text) {
    this.query = text;
    this.#changed();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      [this.items, this.next] = [[], null];
      this.refresh();
    }, TYPING);
  }

  async create(key) {
    const chat = await persistently("POST", "/api/chats", { body: {}, key });
    this.put({ active_task_id: null, ...chat });
    return chat;
  }

  async rename(id, title) {
    this.put(await request("PATCH", `/api/chats/${id}`, { body: { title } }));
    this.#edited();
  }

  async remove(id) {
    await request("DELETE", `/api/chats/${id}`).catch((error) => {
      if (error.status !== 404) throw error; // it is gone: the answer to an earlier try was lost, perhaps
    });
    this.items = this.items.filter((chat) => chat.id !== id);
    this.#edited();
  }

  #edited() {
    this.edits += 1;
    this.refresh(); // makes the answers that are still on their way out of date
  }

  /** Take in what is known about a chat; a new one joins unless a search is shown. */
  put(chat) {
    const { messages: _, ...fields } = chat;
    const known = this.get(chat.id);
    if (known) Object.assign(known, fields);
    else if (this.query === "") this.items.push(fields);
    this.items = newestFirst(this.items);
    this.#changed();
  }

  async #read(after) {
    const number = ++this.#latest;
    const params = new URLSearchParams({ limit: PAGE });
    if (after) params.set("after", after);
    if (this.query.trim()) params.set("q", this.query.trim());
    this.loading = true;
    this.#changed();
    try {
      const page = await persistently("GET", `/api/chats?${params}`);
      if (number !== this.#latest) return null;
      this.error = null;
      this.degraded = page.degraded;
      this.onItems(page.items);
      return page;
    } catch (error) {
      if (number === this.#latest) this.error = error;
      return null;
    } finally {
      if (number === this.#latest) this.loading = false;
      this.#changed();
    }
  }
}

const newestFirst = (chats) => chats.sort((a, b) => Date.parse(b.updated_at) - Date.parse(a.updated_at));
