/** The chats: begin, find, open, rename, delete; and a mark on each that is answering or has answered. */
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { html, Icon, IconButton } from "./html.js";

const DAY = 86_400_000; // ms
const MARKS = { running: "answering", done: "new answer", failed: "the answer failed" };

function group(chat) {
  const today = new Date().setHours(0, 0, 0, 0);
  const at = Date.parse(chat.updated_at);
  if (at >= today) return "Today";
  if (at >= today - DAY) return "Yesterday";
  return at >= today - 7 * DAY ? "This week" : "Earlier";
}

function Renamer({ title, onDone }) {
  const field = useRef(null);
  const over = useRef(false);
  useLayoutEffect(() => field.current.select(), []);
  const done = (value) => {
    if (over.current) return; // leaving the field after Enter or Escape says nothing new
    over.current = true;
    onDone(value && value.trim() !== title ? value.trim() : null);
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && !event.isComposing) done(field.current.value);
    if (event.key !== "Escape") return;
    event.stopPropagation();
    done(null);
  };
  return html`<input class="renamer" ref=${field} defaultValue=${title} maxlength="200" aria-label="Title of the chat"
    onKeyDown=${onKeyDown} onBlur=${({ target }) => done(target.value)} />`;
}

function ChatItem({ app, chat, onDelete, onOpen }) {
  const [renaming, setRenaming] = useState(false);
  const row = useRef(null);
  const title = chat.title || "New chat";
  const mark = app.mark(chat.id);
  const current = chat.id === app.current;
  const renamed = (value) => {
    if (value) app.rename(chat.id, value);
    setRenaming(false);
    requestAnimationFrame(() => row.current?.querySelector("a")?.focus());
  };
  return html`<li class="chat ${current ? "current" : ""}" ref=${row}>
    ${
      renaming
        ? html`<${Renamer} title=${title} onDone=${renamed} />`
        : html`<a href=${`#/chat/${chat.id}`} aria-current=${current ? "page" : null} onClick=${onOpen}>
            <span class="title">${title}</span>
            ${mark && html`<span class="mark ${mark}" role="img" aria-label=${MARKS[mark]}></span>`}
          </a>
          <span class="chat-verbs">
            <${IconButton} icon="pencil" label=${`Rename ${title}`} onClick=${() => setRenaming(true)} />
            <${IconButton} icon="trash" label=${`Delete ${title}`} onClick=${() => onDelete(chat)} />
          </span>`
    }
  </li>`;
}

function Confirm({ chat, onAnswer }) {
  const dialog = useRef(null);
  useLayoutEffect(() => dialog.current.showModal(), []);
  const answer = (yes) => {
    dialog.current.close(); // gives the focus back to the button that opened it
    onAnswer(yes);
  };
  return html`<dialog ref=${dialog} class="dialog" aria-labelledby="confirm-title" onCancel=${(event) => (event.preventDefault(), answer(false))}
    onKeyDown=${(event) => event.stopPropagation()}>
    <h2 id="confirm-title">Delete this chat?</h2>
    <p>“${chat.title || "New chat"}” and all its messages will be gone for good.</p>
    <div class="dialog-verbs">
      <button type="button" class="button" autofocus onClick=${() => answer(false)}>Keep it</button>
      <button type="button" class="button danger" onClick=${() => answer(true)}>Delete</button>
    </div>
  </dialog>`;
}

function ChatList({ app, onDelete, onOpen }) {
  const { items, query, loading, error } = app.chats;
  if (error && items.length === 0)
    return html`<div class="list-note" role="status"><p>${error.message}</p>
      <button type="button" class="button" onClick=${() => app.chats.refresh()}>Try again</button></div>`;
  if (items.length === 0)
    return html`<p class="list-note" role="status">${loading ? "Loading…" : query ? `No chat is called “${query}”.` : "No chats yet."}</p>`;
  const groups = Map.groupBy ? Map.groupBy(items, group) : new Map([["Chats", items]]);
  return [...groups].map(
    ([name, chats]) => html`<section key=${name} aria-label=${name}>
      <h3>${name}</h3>
      <ul>
        ${chats.map((chat) => html`<${ChatItem} key=${chat.id} app=${app} chat=${chat} onDelete=${onDelete} onOpen=${onOpen} />`)}
      </ul>
    </section>`,
  );
}

/** @param {{ app: import("../models/app.js").App, open: boolean, onClose: () => void }} props */
export function Sidebar({ app, open, onClose }) {
  const [deleting, setDeleting] = useState(null);
  const list = useRef(null);
  const onScroll = ({ target }) =>
    target.scrollHeight - target.clientHeight - target.scrollTop < 200 && app.chats.more();
  const begin = () => {
    onClose();
    app.open(null);
    document.getElementById("composer")?.focus();
  };
  const answered = (yes) => {
    const chat = deleting;
    setDeleting(null);
    if (yes) app.remove(chat.id).then(() => document.getElementById("composer")?.focus());
  };
  return html`<nav class="sidebar ${open ? "open" : ""}" aria-label="Chats">
    <div class="brand">
      <${Icon} name="logo" /> <span>headwater</span>
      <span class="drawer-close"><${IconButton} icon="close" label="Close chats" onClick=${onClose} /></span>
    </div>
    <button type="button" class="button new" onClick=${begin}><${Icon} name="plus" /> New chat</button>
    <div class="search">
      <${Icon} name="search" />
      <input id="search" type="search" placeholder="Search" aria-label="Search chats by title" value=${app.chats.query}
        onInput=${({ target }) => app.chats.search(target.value)} />
      <kbd aria-hidden="true">${/Mac|iP/.test(navigator.platform) ? "⌘" : "Ctrl"} K</kbd>
    </div>
    <div class="list" ref=${list} onScroll=${onScroll}>
      <${ChatList} app=${app} onDelete=${setDeleting} onOpen=${onClose} />
      ${app.chats.next !== null && html`<button type="button" class="button more" onClick=${() => app.chats.more()}>Show earlier chats</button>`}
    </div>
    ${
      app.health.report?.access === "token" &&
      html`<form class="sign-out" method="post" action="/sign-out"><button type="submit" class="button">Sign out</button></form>`
    }
    ${deleting && html`<${Confirm} chat=${deleting} onAnswer=${answered} />`}
  </nav>`;
}
