/** One message: what was said, how far the answer is, what went wrong, and what can be done with it. */
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { copy, html, Icon, IconButton, memo } from "./html.js";
import { Markdown } from "./markdown.js";

function Thinking({ message, busy, coloured }) {
  const [open, setOpen] = useState(false);
  const thinking = busy && !message.content;
  const seconds = Math.max(1, Math.round((message.thought ?? 0) / 1000));
  const label = thinking ? "Thinking…" : message.thought === undefined ? "Reasoning" : `Thought for ${seconds} s`;
  return html`<details class="thinking" open=${open} onToggle=${({ target }) => setOpen(target.open)}>
    <summary class=${thinking ? "busy" : ""}>${label}</summary>
    ${open && html`<${Markdown} text=${message.reasoning} finished=${!thinking} coloured=${coloured} />`}
  </details>`;
}

function Waiting({ app, chatId, message, stopping }) {
  const reason = message.queued ? "Waits for the answer before it…" : message.waiting && "Waiting for a free worker…";
  const words = stopping ? "Stopping…" : message.notice || reason;
  const percent = Math.round((message.progress ?? 0) * 100);
  return html`<p class="waiting">
    <span class="dots" aria-hidden="true"><i></i><i></i><i></i></span>
    <span>${words || html`<span class="visually-hidden">Answering</span>`}</span>
    ${percent > 0 && percent < 100 && html`<progress max="100" value=${percent} aria-label=${message.stage ?? "Progress"}></progress>`}
    ${
      message.queued &&
      html`<button type="button" class="button" aria-label="Cancel this question" disabled=${stopping}
      onClick=${() => app.stop(message.run_id, chatId)}>Cancel</button>`
    }
  </p>`;
}

function Failure({ error, onRetry, retryLabel = "Try again", children }) {
  return html`<div class="failure">
    <${Icon} name="alert" />
    <div>
      <p>${error?.message ?? "The answer could not be finished."}</p>
      <p class="failure-code">${error?.code}</p>
    </div>
    <div class="failure-verbs">
      ${children}
      <button type="button" class="button" onClick=${onRetry}><${Icon} name="again" /> ${retryLabel}</button>
    </div>
  </div>`;
}

/** `siblings`: ids with spaces between, so that an unchanged list is the same value. */
function Branches({ app, chatId, siblings: ids, index }) {
  if (ids === "") return null;
  const siblings = ids.split(" ");
  const go = (to) => app.choose(chatId, siblings[to]);
  return html`<span class="branches" role="group" aria-label="Versions">
    <${IconButton} icon="left" label="Earlier version" disabled=${index === 0} onClick=${() => go(index - 1)} />
    <span aria-label=${`Version ${index + 1} of ${siblings.length}`} role="img">${index + 1}/${siblings.length}</span>
    <${IconButton} icon="right" label="Later version" disabled=${index + 1 === siblings.length} onClick=${() => go(index + 1)} />
  </span>`;
}

function CopyButton({ text }) {
  const [copied, setCopied] = useState(false);
  useEffect(() => {
    const timer = copied && setTimeout(() => setCopied(false), 1600);
    return () => clearTimeout(timer);
  }, [copied]);
  const onClick = async () => {
    await copy(text);
    setCopied(true);
  };
  return html`<${IconButton} icon=${copied ? "check" : "copy"} label=${copied ? "Copied" : "Copy message"} onClick=${onClick} />`;
}

function Editor({ content, onSend, onCancel }) {
  const [text, setText] = useState(content);
  const field = useRef(null);
  useLayoutEffect(() => {
    field.current.focus();
    field.current.setSelectionRange(content.length, content.length);
  }, []);
  const send = () => text.trim() && onSend(text.trim());
  const onKeyDown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      onCancel();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  return html`<form class="editor" onSubmit=${(event) => (event.preventDefault(), send())}>
    <textarea ref=${field} value=${text} rows=${Math.min(12, text.split("\n").length + 1)} aria-label="Edit your message"
      onInput=${({ target }) => setText(target.value)} onKeyDown=${onKeyDown}></textarea>
    <div class="editor-verbs">
      <button type="button" class="button" onClick=${onCancel}>Cancel</button>
      <button type="submit" class="button primary" disabled=${!text.trim()}>Send</button>
    </div>
  </form>`;
}

/** What the person said. */
export const Question = memo(function Question({ app, chatId, message, siblings, index, locked }) {
  const [editing, setEditing] = useState(false);
  const resend = (text) => {
    setEditing(false);
    app.send(text, message.parent_id);
  };
  if (editing)
    return html`<${Editor} content=${message.content} onSend=${resend} onCancel=${() => setEditing(false)} />`;
  const unsent = message.status === "unsent";
  const local = unsent || message.status === "sending";
  const withdraw = () => {
    app.withdraw(chatId, message);
    app.compose?.(message.content);
  };
  return html`<article class="message question ${message.status}" aria-label="You">
    <div class="bubble">${message.content}</div>
    ${
      unsent &&
      html`<${Failure} error=${message.error} retryLabel="Send again" onRetry=${() => app.sendAgain(chatId, message)}>
      <button type="button" class="button" onClick=${withdraw}>Edit</button>
    <//>`
    }
    ${
      !local &&
      html`<div class="verbs">
      <${Branches} app=${app} chatId=${chatId} siblings=${siblings} index=${index} />
      <${CopyButton} text=${message.content} />
      ${!locked && html`<${IconButton} icon="pencil" label="Edit and send again" onClick=${() => setEditing(true)} />`}
    </div>`
    }
  </article>`;
});

/** What the model said, or is saying. */
export const Answer = memo(function Answer({ app, chatId, message, siblings, index, locked, stopping, coloured }) {
  const busy = message.status === "processing";
  const retry = () => app.regenerate(chatId, message);
  const tokens = message.usage?.completion_tokens;
  const facts = [message.model, tokens && `${message.usage.estimated ? "about " : ""}${tokens} tokens`].filter(Boolean);
  return html`<article class="message answer ${message.status}" aria-label="Assistant" aria-busy=${busy}>
    ${message.reasoning && html`<${Thinking} message=${message} busy=${busy} coloured=${coloured} />`}
    ${message.content && html`<${Markdown} text=${message.content} finished=${!busy} coloured=${coloured} />`}
    ${busy && (!(message.content || message.reasoning) || message.notice || stopping) && html`<${Waiting} app=${app} chatId=${chatId} message=${message} stopping=${stopping} />`}
    ${busy && message.content && html`<span class="caret" aria-hidden="true"></span>`}
    ${message.status === "cancelled" && html`<p class="note">You stopped this answer.</p>`}
    ${message.status === "failed" && html`<${Failure} error=${message.error} onRetry=${retry} />`}
    ${
      !busy &&
      html`<div class="verbs">
      <${Branches} app=${app} chatId=${chatId} siblings=${siblings} index=${index} />
      ${message.content && html`<${CopyButton} text=${message.content} />`}
      ${!locked && message.status !== "failed" && html`<${IconButton} icon="again" label="Answer again" onClick=${retry} />`}
      <span class="facts">${facts.join(" · ")}</span>
    </div>`
    }
  </article>`;
});
