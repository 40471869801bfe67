/**
 * The messages of a chat form a tree by `parent_id`: regenerating adds a sibling to an answer, editing
 * adds one to a question. What is shown is one path from the root to a leaf.
 *
 * @typedef {{ id: string, parent_id: string | null, role: string }} Message
 * @typedef {{ message: Message, siblings: string[], index: number }} Step
 */

const ROOT = "";

/**
 * The path on screen: at every fork the chosen child, or else the newest.
 *
 * @param {Iterable<Message>} messages oldest first
 * @param {Map<string, string>} choices parent's id ("" for the root) → chosen child's id
 * @returns {Step[]} oldest first
 */
export function path(messages, choices) {
  const children = new Map();
  const known = new Map([...messages].map((message) => [message.id, message]));
  for (const message of known.values()) {
    // A message whose parent is missing would be lost with it; at the root it can be read.
    const parent = known.has(message.parent_id) ? message.parent_id : ROOT;
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(message.id);
  }
  const steps = [];
  let parent = ROOT;
  while (children.has(parent) && steps.length <= known.size) {
    const siblings = children.get(parent);
    const chosen = siblings.indexOf(choices.get(parent) ?? "");
    const index = chosen < 0 ? siblings.length - 1 : chosen;
    parent = siblings[index];
    steps.push({ message: known.get(parent), siblings, index });
  }
  return steps;
}

/** Choose `message` wherever its siblings fork. */
export function choose(choices, message) {
  choices.set(message.parent_id ?? ROOT, message.id);
}
