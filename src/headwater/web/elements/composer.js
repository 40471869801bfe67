/** Where the next message is written. The text is kept per chat until it is sent. */
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { draft, saveDraft } from "../models/storage.js";
import { html, Icon } from "./html.js";

const TALLEST = 220; // px

/** @param {{ app: import("../models/app.js").App }} props */
export function Composer({ app }) {
  const field = useRef(null);
  const [text, setText] = useState("");
  const [error, setError] = useState(null);
  const chatId = app.current;
  const answer = app.shown?.processing;
  const change = (value) => {
    setText(value);
    // Not `app.current`, which may be another already: the chat whose draft is in the field.
    saveDraft(chatId, value);
  };
  // With the paint that shows the chat: what is typed now is its own.
  useLayoutEffect(() => {
    setText(draft(chatId));
    setError(null);
    // On a phone the keyboard would cover what was just opened.
    if (matchMedia("(hover: hover)").matches) field.current.focus();
  }, [chatId]);
  useLayoutEffect(() => {
    app.compose = (value) => {
      change(value);
      field.current.focus();
    };
  }, [chatId]);
  useLayoutEffect(() => {
    field.current.style.height = "auto";
    field.current.style.height = `${Math.min(TALLEST, field.current.scrollHeight)}px`;
  }, [text]);

  const send = async () => {
    const content = text.trim();
    if (!content || !app.maySend) return;
    change("");
    setError(null);
    try {
      await app.send(content);
    } catch (failure) {
      // No chat was begun. Something else may have been written meanwhile, here or after going to another chat.
      const kept = [content, draft(null)].filter(Boolean).join("\n\n");
      if (app.current !== null) return saveDraft(null, kept);
      change(kept);
      setError(failure);
    }
  };
  const onKeyDown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  };
  const stopping = answer && app.stopping.has(answer.run_id);
  return html`<form class="composer" onSubmit=${(event) => (event.preventDefault(), send())}>
    ${error && html`<p class="composer-error" role="alert">${error.message}</p>`}
    <div class="composer-box">
      <label class="visually-hidden" for="composer">Message</label>
      <textarea id="composer" ref=${field} rows="1" placeholder="Ask anything" value=${text} autocomplete="off"
        aria-describedby="composer-hint" onInput=${({ target }) => change(target.value)} onKeyDown=${onKeyDown}></textarea>
      ${
        answer && !(app.maySend && text.trim())
          ? html`<button key="stop" type="button" class="round stop" aria-label="Stop answering" title="Stop (Esc)"
            disabled=${stopping} onClick=${() => app.stop(answer.run_id)}><${Icon} name="stop" /></button>`
          : html`<button key="send" type="submit" class="round" aria-label="Send" title="Send (Enter)"
            disabled=${!text.trim() || !app.maySend}><${Icon} name="send" /></button>`
      }
    </div>
    <p class="hint" id="composer-hint"><kbd>Enter</kbd> sends, <kbd>Shift</kbd> <kbd>Enter</kbd> begins a line${answer && html`, <kbd>Esc</kbd> stops`}</p>
  </form>`;
}
