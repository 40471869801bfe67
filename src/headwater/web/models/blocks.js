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
    // An unfinished line may still become anything: "2" becomes "2. item" of the list before it. So it
    // is shown as what it is now, but settles nothing.
    const whole = text.lastIndexOf("\n") + 1;
    if (whole > this.#settled) this.#settle(text.slice(this.#settled, whole));
    if (finished) this.#definitions = definitions(text);
    const rest = this.#cut(text.slice(this.#settled));
    const last = finished ? rest.at(-1) : heal(rest.at(-1));
    const blocks = [...this.#blocks, ...rest.slice(0, -1), ...(last.trim() === "" ? [] : [last])];
    return this.#definitions ? blocks.map((block) => this.#defined(block)) : blocks;
  }

  #settle(part) {
    const blocks = this.#cut(part).slice(0, -1);
    this.#blocks.push(...blocks);
    this.#settled += blocks.reduce((length, block) => length + block.length, 0);
  }

  /** The blocks of `source`, which together are `source`; at least one. */
  #cut(source) {
    const tokens = [];
    const env = {};
    // The parser counts lines after making all line ends alike; a lone CR would shift them.
    if (/\r(?!\n)/.test(source)) return [source];
    this.#md.block.parse(source.replace(/\r/g, ""), this.#md, env, tokens);
    if (Object.keys(env.references ?? {}).length > 0) this.#definitions = definitions(this.#text);
    const offsets = lineOffsets(source);
    const tops = tokens.filter((token) => token.level === 0 && token.nesting >= 0 && token.map);
    const cuts = tops.slice(1).map(({ map }) => offsets[map[0]]);
    return [0, ...cuts].map((from, n) => source.slice(from, cuts[n] ?? source.length));
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
  if (rule === undefined || /^[|:\s-]*$/.test(rule))
    return rule?.split("|").length > columns + 1 ? source : `${head}\n${dashes}`;
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
