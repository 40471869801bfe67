/**
 * A reader's place in a run's log: `<epoch>-<seq>`. The epoch names one incarnation of the log, so
 * that a log which was lost and begun again is not taken for the old one.
 *
 * @typedef {{ epoch: string, seq: number }} Cursor
 */

const FORM = /^([0-9a-z]{1,32})-(0|[1-9][0-9]{0,14})$/;

/** @param {string | null | undefined} text @returns {Cursor | null} null when it is not a cursor */
export function parseCursor(text) {
  const match = FORM.exec(text ?? "");
  return match && { epoch: match[1], seq: Number(match[2]) };
}

/** @param {Cursor | null} cursor @returns {string} empty for the beginning */
export const formatCursor = (cursor) => (cursor ? `${cursor.epoch}-${cursor.seq}` : "");
