/**
 * Markdown that is still growing, as blocks: everything but the last is final, so only the last is
 * drawn again when text arrives. The parser's own block rules decide, so a list, a table or a fence
 * is never cut.
 */

/** Splits one growing text. Feed it the whole text each time; it looks at what is new. */
export class Splitter {
  #md;
  #text = "";
  #settled = 0; // length of the text in `#blocks`
  #blocks = [];
  /** Link definitions seen so far; a block may use one that comes later. */
  #definitions = "";

  /** @param {object} md a markdown-it instance */
  constructor(md) {
    this.#md = md;
  }

  /**
   * @param {string} text @param {boolean} finished
   * @returns {string[]} sources of the blocks, each to be rendered by itself
   */
  split(text, finished) {
    if (!text.startsWith(this.#text)) [this.#settled, this.#blocks, this.#definitions] = [0, [], ""];
    this.#text = text;
    // An unfinished line may still become anything: "2" becomes "2. item" of the list before it.
    const whole = text.lastIndexOf("\n") + 1;
    if (whole > this.#settled) this.#settle(text.slice(this.#settled, whole));
    if (finished) this.#definitions = definitions(text);
    const rest = text.slice(this.#settled);
    const last = finished ? rest : heal(rest);
    const blocks = last.trim() === "" ? this.#blocks : [...this.#blocks, last];
    return this.#definitions ? blocks.map((block) => this.#defined(block)) : blocks;
  }

  #settle(part) {
    const tokens = [];
    const env = {};
    const source = part.replace(/\r\n?/g, "\n");
    if (source !== part) return; // line numbers would lie; rare enough to wait for the end
    this.#md.block.parse(source, this.#md, env, tokens);
    const starts = tokens.filter((token) => token.level === 0 && token.nesting >= 0 && token.map).map(({ map }) => map[0]);
    if (starts.length < 2) return;
    const offsets = lineOffsets(source);
    for (let n = 0; n + 1 < starts.length; n++) {
      const block = source.slice(offsets[n === 0 ? 0 : starts[n]], offsets[starts[n + 1]]);
      this.#blocks.push(block);
      this.#settled += block.length;
    }
    if (Object.keys(env.references ?? {}).length > 0) this.#definitions = definitions(this.#text);
  }

  #defined(block) {
    return block.includes("[") ? `${block}\n\n${this.#definitions}` : block;
  }
}

function lineOffsets(text) {
  const offsets = [0];
  for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) offsets.push(at + 1);
  return offsets;
}

const definitions = (text) => (text.match(/^ {0,3}\[[^\]\n]+\]:[ \t]*\S.*$/gm) ?? []).join("\n");

/**
 * Close what the unfinished last block has opened, so that it does not change its looks when the rest
 * arrives: `**bol` is bold already, and a lone `-` does not make the line above a heading.
 *
 * @param {string} source @returns {string}
 */
export function heal(source) {
  if (/^ {0,3}(```|~~~)/m.test(source)) return source; // an open fence runs to the end by itself
  if (source.startsWith("|")) return healTable(source);
  const text = source
    .replace(/(^|\n)[ \t]*(-+|=+|#{1,6}|[*+>|]|\d{1,3}[.)])[ \t]*$/, "$1")
    .replace(/!\[([^\]\n]*)(\]\([^)\n]*|\])?$/, "$1")
    .replace(/\[([^\]\n]*)\]\([^)\n]*$/, "$1")
    .replace(/(^|[\s(])(\*{1,3}|_{1,3}|~~|`+)$/, "$1");
  const open = unclosed(text);
  if (open.length === 0) return text;
  return text.replace(/\s+$/, "") + open.reverse().join("");
}

/** A table is a table from its first row on. */
function healTable(source) {
  const [head, rule, ...rows] = source.split("\n");
  const columns = head.replace(/\|\s*$/, "").split("|").length - 1;
  const dashes = "|---".repeat(columns) + "|";
  if (rows.length > 0 || columns === 0) return source;
  if (rule === undefined || /^[|:\s-]*$/.test(rule)) return rule?.split("|").length > columns + 1 ? source : `${head}\n${dashes}`;
  return source;
}

/** Markers of the last paragraph that were opened and not closed, outermost first. */
function unclosed(text) {
  const start = text.lastIndexOf("\n\n") + 1;
  const open = [];
  let code = "";
  for (const [marker, at] of markers(text.slice(start))) {
    if (code) {
      if (marker !== code) continue;
      open.pop();
      code = "";
    } else if (marker[0] === "`") {
      code = marker;
      open.push(marker);
    } else if (open.at(-1) === marker) {
      open.pop();
    } else if (opens(text, start + at, marker)) {
      open.push(marker);
    }
  }
  return open;
}

function* markers(text) {
  for (const match of text.matchAll(/\\.|`+|\*\*|\*|__|_|~~/g)) if (match[0][0] !== "\\") yield [match[0], match.index];
}

function opens(text, at, marker) {
  const before = text[at - 1] ?? " ";
  const after = text[at + marker.length] ?? " ";
  if (/\s/.test(after)) return false;
  return marker[0] === "_" ? !/[\p{L}\p{N}]/u.test(before) : true;
}
