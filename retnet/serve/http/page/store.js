// Conversations and settings in this browser. Each conversation has a key of its own, so that two tabs do not overwrite
// each other's. The API key is not among them: api.js keeps it for the tab only.
//
// A conversation: { id, name, updated, messages }. A message: { id, role, content }, and for a reply also
// { session, tokens, stats, finish, error }. `session` names the server's state after that message; each state belongs
// to one message. A message of role "state" stands for a state whose text is not known, such as an uploaded one.

const PREFIX = "retnet.conversation.";
const unsaved = new Map(); // conversations of this tab when the browser's storage is full or blocked

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(16).padStart(2, "0")).join("");
}

export function newConversation(messages = [], name = "") {
  return { id: newId(), name, updated: Date.now(), messages };
}

/** All conversations, the newest first. */
export function conversations() {
  const found = new Map(unsaved);
  for (const key of keys()) {
    const conversation = parsed(localStorage.getItem(key));
    if (conversation && !found.has(conversation.id)) found.set(conversation.id, conversation);
  }
  return [...found.values()].sort((a, b) => b.updated - a.updated);
}

/** Saves a conversation; returns whether the browser had room for it. */
export function save(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    unsaved.delete(conversation.id);
    return true;
  } catch {
    unsaved.set(conversation.id, conversation);
    return false;
  }
}

export function remove(conversation) {
  unsaved.delete(conversation.id);
  setting(PREFIX + conversation.id, null);
}

/** Reads an entry of the browser's storage, or writes it where a value is given (null removes it). */
export function setting(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch {
    // Storage is blocked or full: the value holds for this tab only.
  }
  return value ?? null;
}

/** Calls back when another tab changes a conversation. */
export function onChange(call) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) call();
  });
}

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}

function parsed(text) {
  try {
    const value = JSON.parse(text);
    return Array.isArray(value?.messages) && typeof value.id === "string" ? value : null;
  } catch {
    return null;
  }
}
