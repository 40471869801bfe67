/**
 * Server-sent events, as https://html.spec.whatwg.org/multipage/server-sent-events.html says.
 *
 * @typedef {{ id: string, event: string, data: string }} Frame
 */

/** Characters of one unfinished frame after which the stream is taken for something else. */
const LARGEST_FRAME = 8 * 1024 * 1024;

/**
 * A parser that takes bytes cut anywhere, even inside a character or between CR and LF.
 *
 * @param {{ onFrame: (frame: Frame) => void, onRetry?: (ms: number) => void }} on
 * @returns {{ feed(bytes: Uint8Array): void }} `feed` throws RangeError on a frame beyond 8 Mi characters
 */
export function createParser({ onFrame, onRetry = () => {} }) {
  const decoder = new TextDecoder(); // drops the byte order mark
  let rest = "";
  let afterCR = false; // the last line ended in CR: a following LF belongs to it
  let id = ""; // stays until another replaces it
  let event = "";
  let data = [];
  let size = 0;

  function field(name, value) {
    if (name === "data") {
      data.push(value);
      size += value.length;
    } else if (name === "event") event = value;
    else if (name === "id" && !value.includes("\0")) id = value;
    else if (name === "retry" && /^[0-9]+$/.test(value)) onRetry(Number(value));
  }

  function line(text) {
    if (text === "") {
      if (data.length > 0) onFrame({ id, event: event || "message", data: data.join("\n") });
      [event, data, size] = ["", [], 0];
      return;
    }
    const colon = text.indexOf(":");
    if (colon === 0) return; // a comment: a heartbeat
    if (colon < 0) field(text, "");
    else field(text.slice(0, colon), text.slice(text[colon + 1] === " " ? colon + 2 : colon + 1));
  }

  return {
    feed(bytes) {
      let text = decoder.decode(bytes, { stream: true });
      if (text === "") return;
      if (afterCR && text[0] === "\n") text = text.slice(1);
      afterCR = text === "" ? false : text.endsWith("\r");
      // Only the new text is searched for line ends, so a long line in many pieces costs its length once.
      const parts = text.split(/\r\n|\n|\r/);
      parts[0] = rest + parts[0];
      rest = parts.pop();
      if (rest.length + size > LARGEST_FRAME) throw new RangeError("The stream sent a frame that is too large.");
      parts.forEach(line);
    },
  };
}
