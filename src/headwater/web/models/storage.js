/** What this browser remembers: drafts, the theme, and messages whose fate is not known yet. */

/** A private window may refuse storage; then nothing is remembered and everything else works. */
function attempt(action, otherwise) {
  try {
    return action();
  } catch (error) {
    if (error instanceof DOMException || error instanceof SyntaxError) return otherwise;
    throw error;
  }
}

const read = (area, key) => attempt(() => JSON.parse(area().getItem(`headwater:${key}`) ?? "null"), null);
const write = (area, key, value) =>
  attempt(() => {
    if (value === null || value === "") area().removeItem(`headwater:${key}`);
    else area().setItem(`headwater:${key}`, JSON.stringify(value));
  });
const local = () => localStorage;
const session = () => sessionStorage;

/** @param {string | null} chatId null for the chat that has not begun @returns {string} */
export const draft = (chatId) => read(local, `draft:${chatId ?? "new"}`) ?? "";
export const saveDraft = (chatId, text) => write(local, `draft:${chatId ?? "new"}`, text);

/** @returns {"auto" | "light" | "dark"} */
export const theme = () => read(local, "theme") ?? "auto";
export const saveTheme = (name) => write(local, "theme", name === "auto" ? null : name);

/**
 * Messages sent and not yet acknowledged. A refresh sends them again under the same key.
 * @returns {{ key: string, chatId: string, content: string, parentId: string | null }[]}
 */
export const outbox = () => read(session, "outbox") ?? [];

/** Keep a message until its fate is known, or with null, no longer. @param {string} key */
export function keepOutbox(key, item) {
  const items = outbox();
  const at = items.findIndex((other) => other.key === key);
  items.splice(at < 0 ? items.length : at, at < 0 ? 0 : 1, ...(item ? [item] : []));
  write(session, "outbox", items.length ? items : null);
}
