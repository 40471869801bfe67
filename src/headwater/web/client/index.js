/** The client: parse, fold and follow runs. No DOM; browsers and Node 20 alike. */
export { createParser } from "./parser.js";
export { formatCursor, parseCursor } from "./cursor.js";
export { apply, fold, initial } from "./state.js";
export { openStream } from "./stream.js";
export { Fleet } from "./fleet.js";
