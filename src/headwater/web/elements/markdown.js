/** Markdown on screen, drawn block by block while it grows. */
import { useEffect, useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { Splitter } from "../models/blocks.js";
import { copy, html, memo } from "./html.js";
import { markdown, patch, render } from "./markup.js";

const Block = memo(function Block({ source, coloured }) {
  const box = useRef(null);
  useLayoutEffect(() => patch(box.current, render(source)), [source, coloured]);
  return html`<div class="block" ref=${box}></div>`;
});

/** @param {{ text: string, finished: boolean, coloured: boolean }} props `coloured`: code can be highlighted */
export const Markdown = memo(function Markdown({ text, finished, coloured }) {
  const splitter = useMemo(() => new Splitter(markdown), []);
  const timer = useRef(null);
  useEffect(() => () => clearTimeout(timer.current), []);
  const blocks = splitter.split(text, finished);
  const onClick = async ({ target }) => {
    const button = target.closest?.("button.copy");
    if (!button) return;
    await copy(button.closest(".code").querySelector("code").textContent);
    button.textContent = "Copied";
    timer.current = setTimeout(() => (button.textContent = "Copy"), 1600);
  };
  return html`<div class="markdown" onClick=${onClick}>
    ${blocks.map((source, n) => html`<${Block} key=${n} source=${source} coloured=${coloured} />`)}
  </div>`;
});
