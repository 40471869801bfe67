/** The page: makes the model, draws it, and listens to the keyboard. */
import { render } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Composer } from "./elements/composer.js";
import { html } from "./elements/html.js";
import { loadHighlighter } from "./elements/markup.js";
import { Sidebar } from "./elements/sidebar.js";
import { Banners, LogPanel, TopBar } from "./elements/system.js";
import { ThreadView } from "./elements/thread.js";
import { App } from "./models/app.js";
import { saveTheme, theme as savedTheme } from "./models/storage.js";

const THEMES = ["auto", "light", "dark"];

function useModel(app) {
  const [, draw] = useState(0);
  // Before the next frame, in which the model tells of what has changed since the page was drawn.
  useLayoutEffect(() => app.subscribe(() => draw((n) => n + 1)), []);
}

function useTheme() {
  const [theme, setTheme] = useState(savedTheme);
  // Before the next paint, so that the button never names colours the page does not have yet.
  useLayoutEffect(() => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    saveTheme(theme);
  }, [theme]);
  return [theme, () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length])];
}

function useKeys(handle) {
  const latest = useRef(handle);
  latest.current = handle;
  // What is on screen answers to its keys.
  useLayoutEffect(() => {
    const listener = (event) => latest.current(event);
    addEventListener("keydown", listener);
    return () => removeEventListener("keydown", listener);
  }, []);
}

function Page({ app }) {
  useModel(app);
  const [theme, nextTheme] = useTheme();
  const [menu, setMenu] = useState(false);
  const [log, setLog] = useState(false);
  const [coloured, setColoured] = useState(false);
  useEffect(() => {
    loadHighlighter().then(
      () => setColoured(true),
      (error) => app.log.add("warn", `Code is shown without colours: ${error.message}`),
    );
  }, []);
  const title = app.current === null ? "" : app.chats.get(app.current)?.title;
  useEffect(() => {
    document.title = `${app.running ? `(${app.running}) ` : ""}${title ? `${title} · ` : ""}headwater`;
  }, [title, app.running]);

  const closeMenu = () => {
    if (!menu) return;
    setMenu(false);
    requestAnimationFrame(() => document.querySelector(".drawer-open button")?.focus());
  };
  const closeLog = () => {
    setLog(false);
    requestAnimationFrame(() => document.querySelector(".topbar [aria-label='System log']")?.focus());
  };
  const openMenu = () => {
    setMenu(true);
    requestAnimationFrame(() => document.querySelector(".drawer-close button")?.focus());
  };
  useKeys((event) => {
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      setMenu(true);
      requestAnimationFrame(() => document.getElementById("search").focus());
    } else if (event.key === "Escape") {
      if (menu) closeMenu();
      else if (log && event.target.closest?.(".panel")) closeLog();
      else if (app.shown?.processing) app.stop(app.shown.processing.run_id);
    }
  });
  const skip = (event) => {
    event.preventDefault();
    document.getElementById("composer").focus();
  };
  return html`
    <a class="skip" href="#composer" onClick=${skip}>Skip to the message field</a>
    <${Sidebar} app=${app} open=${menu} onClose=${closeMenu} />
    ${menu && html`<div class="shade" onClick=${closeMenu}></div>`}
    <main class="stage">
      <${TopBar} app=${app} menu=${menu} onMenu=${openMenu} log=${log} onLog=${() => (log ? closeLog() : setLog(true))} theme=${theme} onTheme=${nextTheme} />
      <${Banners} app=${app} />
      <${ThreadView} app=${app} coloured=${coloured} />
      <${Composer} app=${app} />
    </main>
    ${log && html`<${LogPanel} app=${app} onClose=${closeLog} />`}
    <p class="visually-hidden" role="status" aria-live="polite" id="announcer">${app.announcement}</p>
  `;
}

const app = new App();
// Begun first, so that nothing is drawn but the chat of this address.
app.start();
render(html`<${Page} app=${app} />`, document.getElementById("page"));
