/**
 * Markdown → a safe piece of DOM. What a model writes is hostile until shown otherwise: HTML in it is
 * text, images are links, links leave through a new tab, and whatever the renderer makes is sanitised
 * against a short list of tags.
 */
import createPurify from "dompurify";
import MarkdownIt from "markdown-it";

const TAGS = `a blockquote br code del em h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul`;
const LARGEST_HIGHLIGHT = 30_000; // characters of code; beyond, colours cost more than they tell

const purify = createPurify(window);
const allowed = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

/** highlight.js, once it has arrived; text is shown plain until then. */
let highlighter = null;

/** @returns {Promise<void>} when code can be coloured */
export async function loadHighlighter() {
  highlighter = (await import("./highlighter.js")).default;
}

/** markdown-it, for the splitter as well. */
export const markdown = new MarkdownIt({ html: false, linkify: true, breaks: false, highlight });
markdown.validateLink = (url) => /^(?:https?:\/\/|mailto:)/i.test(url);
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
markdown.renderer.rules.image = (tokens, index) => {
  const token = tokens[index];
  const label = markdown.utils.escapeHtml(token.content || "image");
  const inLink = tokens
    .slice(0, index)
    .reduce((n, { type }) => n + (type === "link_open") - (type === "link_close"), 0);
  if (inLink > 0) return label;
  return `<a class="image" href="${markdown.utils.escapeHtml(token.attrGet("src"))}">${label}</a>`;
};
for (const rule of ["heading_open", "heading_close"]) {
  // The page has its own h1 and h2; an answer's headings are below them.
  markdown.renderer.rules[rule] = (tokens, index, options, _env, self) => {
    tokens[index].tag = `h${Math.min(6, Number(tokens[index].tag[1]) + 2)}`;
    return self.renderToken(tokens, index, options);
  };
}
for (const rule of ["th_open", "td_open"]) {
  // Alignment comes as a style attribute, which the page's policy forbids.
  markdown.renderer.rules[rule] = (tokens, index, options, _env, self) => {
    const style = tokens[index].attrGet("style");
    if (style) tokens[index].attrs = [["class", style.replace("text-align:", "align-")]];
    return self.renderToken(tokens, index, options);
  };
}

function highlight(code, language) {
  if (!highlighter?.getLanguage(language) || code.length > LARGEST_HIGHLIGHT) return "";
  return highlighter.highlight(code, { language, ignoreIllegals: true }).value;
}

/** @param {string} source @returns {DocumentFragment} */
export function render(source) {
  const fragment = purify.sanitize(markdown.render(source), allowed);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const pre of fragment.querySelectorAll("pre")) dress(pre);
  for (const table of fragment.querySelectorAll("table")) scrollable(table, "table-scroll", "Table");
  return fragment;
}

function scrollable(element, className, label) {
  const box = Object.assign(document.createElement("div"), { className, tabIndex: 0, role: "region" });
  box.setAttribute("aria-label", label);
  element.replaceWith(box);
  box.append(element);
}

/** A code block gets a head with its language and a copy button. */
function dress(pre) {
  const language = /language-([\w+#.-]+)/.exec(pre.firstElementChild?.className)?.[1] ?? "";
  const box = Object.assign(document.createElement("div"), { className: "code" });
  const head = Object.assign(document.createElement("div"), { className: "code-head" });
  const name = Object.assign(document.createElement("span"), { textContent: language || "text" });
  const button = Object.assign(document.createElement("button"), {
    type: "button",
    className: "copy",
    textContent: "Copy",
  });
  button.setAttribute("aria-label", `Copy ${language} code`.replace("  ", " "));
  head.append(name, button);
  pre.replaceWith(box);
  pre.tabIndex = 0;
  box.append(head, pre);
}

/**
 * Make `old` look like `fresh` and touch only what differs, so that a selection, the focus and the
 * scroll position inside survive.
 *
 * @param {Element} old @param {DocumentFragment | Element} fresh
 */
export function patch(old, fresh) {
  const [have, want] = [[...old.childNodes], [...fresh.childNodes]];
  want.forEach((node, n) => {
    const current = have[n];
    if (!current) old.append(node);
    else if (current.isEqualNode(node)) return;
    else if (current.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) current.data = node.data;
    else if (current.nodeName === node.nodeName && sameAttributes(current, node)) patch(current, node);
    else current.replaceWith(node);
  });
  have.slice(want.length).forEach((node) => node.remove());
}

function sameAttributes(one, other) {
  const names = one.getAttributeNames();
  return (
    names.length === other.getAttributeNames().length &&
    names.every((name) => one.getAttribute(name) === other.getAttribute(name))
  );
}
