// The list of conversations: those of this browser, and states on the server that none of them has.

import { $, announce, confirmed, h } from "./dom.js";
import { bytes, tokens } from "./format.js";
import * as sessions from "./sessions.js";
import * as store from "./store.js";

let shownId = null;
let open = () => {};
let isRunning = () => false;
let others = [];

/** `call` opens a conversation (null: a new one); `running` tells whether a reply of one is being written. */
export function start(call, running) {
  [open, isRunning] = [call, running];
  $("new-chat").addEventListener("click", () => open(null));
  $("upload").addEventListener("click", () => $("upload-file").click());
  $("upload-file").addEventListener("change", upload);
  $("delete-all").addEventListener("click", deleteAll);
  store.onChange(() => render());
  render();
}

export function render(id = shownId) {
  shownId = id;
  const all = store.conversations();
  $("conversation-list").replaceChildren(...all.map(item), ...otherItems());
  $("delete-all").hidden = all.length === 0;
}

export const nameOf = (conversation) => conversation.name || firstWords(conversation) || "New conversation";

export function note(text) {
  $("list-note").textContent = text;
}

/** Looks for states that no conversation of this browser has, such as those that programs keep. */
export async function refreshOthers() {
  try {
    const known = new Set(store.conversations().flatMap(statesOf));
    others = (await sessions.list()).filter((session) => session.usable && !known.has(session.id)).slice(0, 50);
  } catch {
    others = []; // the view of the engine says that the server cannot be reached
  }
  render();
}

export const statesOf = (conversation) => conversation.messages.map((message) => message.session).filter(Boolean);

function firstWords(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content.replace(/\s+/g, " ").trim() ?? "";
  return first.length > 60 ? `${first.slice(0, 57)}…` : first;
}

function item(conversation) {
  const current = conversation.id === shownId;
  const length = conversation.messages.findLast((message) => message.tokens)?.tokens;
  const below = isRunning(conversation) ? "writing …" : length ? tokens(length) : "";
  return h(
    "li",
    {},
    h(
      "button",
      { type: "button", class: "entry", "aria-current": current ? "true" : null, click: () => open(conversation) },
      h("span", { class: "name", dir: "auto" }, nameOf(conversation)),
      h("span", { class: "hint" }, below),
    ),
  );
}

function otherItems() {
  if (!others.length) return [];
  const entry = (session) =>
    h(
      "li",
      {},
      h(
        "button",
        { type: "button", class: "entry other", click: () => adopt(session) },
        h("span", { class: "name" }, `State ${session.id.slice(-6)}`),
        h("span", { class: "hint" }, tokens(session.tokens)),
      ),
    );
  return [h("li", { class: "group" }, "Other states on the server"), ...others.map(entry)];
}

/** Opens a state as a conversation, with a copy of its own, so that its owner keeps it as it is. */
async function adopt(session) {
  note("");
  try {
    const copy = await sessions.fork(session.id);
    openState(copy, (await sessions.look(copy.id)).messages, `State ${session.id.slice(-6)}`);
  } catch (error) {
    note(error.message);
  }
}

function openState(session, messages, name) {
  const known = (messages ?? []).filter((message) => typeof message.content === "string");
  const shown = known.length ? known.map(({ role, content }) => ({ id: store.newId(), role, content })) : [{ id: store.newId(), role: "state", content: "" }];
  Object.assign(shown.at(-1), { session: session.id, tokens: session.tokens });
  const conversation = store.newConversation(shown, name);
  store.save(conversation);
  open(conversation);
}

async function upload() {
  const [file] = $("upload-file").files;
  $("upload-file").value = "";
  if (!file) return;
  note(`Uploading ${bytes(file.size)} …`);
  try {
    const session = await sessions.upload(file);
    openState(session, (await sessions.look(session.id)).messages, file.name.replace(/\.safetensors$/, ""));
    note("");
    announce(`Uploaded a state of ${tokens(session.tokens)}`);
  } catch (error) {
    note(`${error.message} ${error.advice ?? ""}`);
  }
}

async function deleteAll() {
  const all = store.conversations();
  const states = all.flatMap(statesOf);
  const text = `Deletes ${all.length === 1 ? "the conversation" : `all ${all.length} conversations`} in this browser, and their states on the server.`;
  if (!(await confirmed("Delete all conversations?", text))) return;
  sessions.forget(...states);
  all.forEach(store.remove);
  open(null);
}
