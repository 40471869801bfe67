/** The conversation on screen. It follows the end while the reader is there, and only then. */
import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { html, Icon } from "./html.js";
import { Answer, Question } from "./message.js";

const NEAR = 96; // px from the end that still count as the end
const STARTERS = [
  ["Explain", "how a stream can break off and go on without losing a word"],
  ["Write", "a Python decorator that retries with exponential back-off"],
  ["Compare", "SSE, WebSocket and long polling in a table"],
];

function useFollowing(chatId, count) {
  const box = useRef(null);
  const state = useRef({ stick: true, top: 0 });
  const [away, setAway] = useState(false);
  const toEnd = () => {
    state.current.stick = true;
    box.current.scrollTop = box.current.scrollHeight;
    // Its own event comes a frame later: a reader who has scrolled up by then is seen to have come from here.
    state.current.top = box.current.scrollTop;
    setAway(false);
  };
  useLayoutEffect(toEnd, [chatId, count]);
  useLayoutEffect(() => {
    const element = box.current;
    const far = () => element.scrollHeight - element.clientHeight - element.scrollTop > NEAR;
    const onScroll = () => {
      // Growing text never scrolls up; only the reader does.
      if (element.scrollTop < state.current.top - 1 && far()) state.current.stick = false;
      else if (!far()) state.current.stick = true;
      state.current.top = element.scrollTop;
      setAway(!state.current.stick);
    };
    const observer = new ResizeObserver(() => (state.current.stick ? toEnd() : setAway(far())));
    observer.observe(element);
    observer.observe(element.firstElementChild);
    element.addEventListener("scroll", onScroll, { passive: true });
    return () => {
      observer.disconnect();
      element.removeEventListener("scroll", onScroll);
    };
  }, []);
  return { box, away, toEnd };
}

function Empty({ app }) {
  return html`<section class="empty" aria-label="New chat">
    <${Icon} name="logo" />
    <h2>What is on your mind?</h2>
    <p>Close the page, come back later: the answer goes on without you.</p>
    <ul class="starters">
      ${STARTERS.map(
        ([verb, rest]) => html`<li>
          <button type="button" onClick=${() => app.compose(`${verb} ${rest}.`)}><b>${verb}</b> ${rest}</button>
        </li>`,
      )}
    </ul>
  </section>`;
}

function Trouble({ thread, app }) {
  const missing = thread.status === "missing";
  return html`<section class="empty" role="alert">
    <${Icon} name="alert" />
    <h2>${missing ? "This chat does not exist" : "This chat cannot be read"}</h2>
    <p>${missing ? "It may have been deleted." : thread.error?.message}</p>
    <button type="button" class="button" onClick=${() => (missing ? app.open(null) : app.load(thread.id))}>
      ${missing ? "Start a new chat" : "Try again"}
    </button>
  </section>`;
}

/** @param {{ app: import("../models/app.js").App, coloured: boolean }} props */
export function ThreadView({ app, coloured }) {
  const thread = app.shown;
  const steps = thread?.path ?? [];
  const { box, away, toEnd } = useFollowing(app.current, steps.filter(({ message }) => message.role === "user").length);
  const locked = Boolean(thread?.processing || thread?.sending);
  const draw = ({ message, siblings, index }) => {
    const shared = { app, chatId: thread.id, siblings: siblings.length > 1 ? siblings.join(" ") : "", index, locked };
    if (message.role === "user") return html`<${Question} key=${message.id} message=${message} ...${shared} />`;
    const stopping = app.stopping.has(message.run_id);
    return html`<${Answer} key=${message.id} message=${app.view(message)} stopping=${stopping} coloured=${coloured} ...${shared} />`;
  };
  const trouble = thread && steps.length === 0 && (thread.status === "missing" || thread.status === "failed");
  const loading = thread && steps.length === 0 && thread.status === "loading";
  return html`<div class="scroll" ref=${box}>
      <div class="column">
        ${trouble && html`<${Trouble} thread=${thread} app=${app} />`}
        ${loading && html`<p class="loading"><span class="dots" aria-hidden="true"><i></i><i></i><i></i></span>Loading…</p>`}
        ${!trouble && !loading && steps.length === 0 && html`<${Empty} app=${app} />`}
        ${steps.length > 0 && html`<section class="conversation" aria-label="Conversation">${steps.map(draw)}</section>`}
      </div>
    </div>
    ${
      away &&
      html`<div class="jump"><button type="button" class="button" onClick=${toEnd}><${Icon} name="down" /> Jump to latest</button></div>`
    }`;
}
