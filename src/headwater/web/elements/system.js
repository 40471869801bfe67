/** How the system is: banners over the conversation, and the system log. */
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { html, Icon, IconButton } from "./html.js";

const LAGGING = 5; // seconds
const PARTS = { redis: "Redis", postgres: "PostgreSQL", worker: "Worker" };

/** @param {{ app: import("../models/app.js").App }} props */
export function Banners({ app }) {
  const { report, reachable } = app.health;
  const journal = report?.parts?.journal;
  const stuck = journal?.ok === false;
  // A record is always on its way for a moment; only one that waits means that the database lags.
  const behind = journal?.oldest_seconds > LAGGING || report?.parts?.postgres?.ok === false;
  const dead = Object.entries(PARTS).filter(([name]) => name !== "postgres" && report?.parts?.[name]?.ok === false);
  return html`<div class="banners" role="status">
    ${!reachable && html`<p class="banner warn">The server cannot be reached. Your chats go on as soon as it is back.</p>`}
    ${reachable && stuck && html`<p class="banner bad">Nothing new can be sent now. ${journal.detail}</p>`}
    ${reachable && behind && !stuck && html`<p class="banner warn">History is catching up: new messages are safe on disk and will be in the database soon.</p>`}
    ${app.degraded && html`<p class="banner warn">PostgreSQL is away; this may not be complete.</p>`}
    ${reachable && dead.length > 0 && html`<p class="banner warn">${dead.map(([, name]) => name).join(" and ")} away: answers wait and go on by themselves.</p>`}
    ${
      app.trouble &&
      html`<p class="banner bad">${app.trouble.message} <${IconButton} icon="close" label="Dismiss" onClick=${() => app.dismiss()} /></p>`
    }
    ${report?.demo && html`<p class="banner demo"><b>Demo model.</b> For real answers, set <code>OPENAI_API_KEY</code> and start again.</p>`}
  </div>`;
}

/** A dot that says whether all is well. @returns {"good" | "warn" | "bad" | ""} */
export function wellness({ report, reachable }) {
  if (!reachable || report?.status === "down") return "bad";
  return report ? (report.status === "ok" ? "good" : "warn") : "";
}

function Part({ name, level, value }) {
  return html`<div class="part"><dt>${name}</dt><dd><span class="dot ${level}" aria-hidden="true"></span>${value}</dd></div>`;
}

/** @param {{ app: import("../models/app.js").App, onClose: () => void }} props */
export function LogPanel({ app, onClose }) {
  const lines = useRef(null);
  const panel = useRef(null);
  const { report } = app.health;
  const entries = app.log.entries;
  useLayoutEffect(() => panel.current.querySelector("button").focus(), []);
  useEffect(() => (lines.current.scrollTop = lines.current.scrollHeight) && undefined, [entries]);
  const journal = report?.parts?.journal;
  const state = (part) => (part === undefined ? ["", "unknown"] : part.ok === false ? ["bad", "away"] : ["good", "ok"]);
  return html`<aside class="panel" aria-label="System log" ref=${panel}>
    <div class="panel-head"><h2>System</h2><${IconButton} icon="close" label="Close the system log" onClick=${onClose} /></div>
    <dl class="parts">
      ${Object.entries(PARTS).map(([key, name]) => {
        const [level, value] = state(report?.parts?.[key]);
        return html`<${Part} key=${key} name=${name} level=${level} value=${value} />`;
      })}
      <${Part} name="Queue" level=${report ? "good" : ""} value=${report?.parts?.queue?.depth ?? "unknown"} />
      <${Part} name="Answering" level=${app.running ? "busy" : "good"} value=${app.running} />
      <${Part} name="Not yet stored" level=${journal?.backlog ? "warn" : journal ? "good" : ""} value=${journal?.backlog ?? "unknown"} />
    </dl>
    <p class="panel-facts">${[report?.model, report?.version && `headwater ${report.version}`].filter(Boolean).join(" · ")}</p>
    <div class="log" ref=${lines} tabindex="0" role="region" aria-label="Log lines">
      ${entries.length === 0 && html`<p class="list-note">Nothing has happened yet.</p>`}
      <ol>
        ${entries.map(
          (entry) => html`<li key=${entry.n} class=${entry.level}>
            <time>${new Date(entry.at).toTimeString().slice(0, 8)}</time><span>${entry.text}</span>
          </li>`,
        )}
      </ol>
    </div>
  </aside>`;
}

/** @param {{ app: object, onMenu: () => void, onLog: () => void, log: boolean, theme: string, onTheme: () => void }} props */
export function TopBar({ app, onMenu, menu, onLog, log, theme, onTheme }) {
  const title = app.current === null ? "New chat" : app.chats.get(app.current)?.title || "New chat";
  const names = { auto: "as the system", light: "light", dark: "dark" };
  return html`<header class="topbar">
    <span class="drawer-open"><${IconButton} icon="menu" label="Open chats" aria-expanded=${menu} onClick=${onMenu} /></span>
    <h1>${title}</h1>
    <${IconButton} icon=${theme} label=${`Colours: ${names[theme]}`} onClick=${onTheme} />
    <button type="button" class="icon-button" aria-label="System log" title="System log" aria-expanded=${log} onClick=${onLog}>
      <${Icon} name="pulse" /><span class="dot ${wellness(app.health)}" aria-hidden="true"></span>
    </button>
  </header>`;
}
