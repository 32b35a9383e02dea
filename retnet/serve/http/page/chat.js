// The chat view: messages, the text field, and what can be done with a message.

import * as conversations from "./conversations.js";
import { $, announce, button, confirmed, growing, h } from "./dom.js";
import * as engine from "./engine.js";
import { count, digits, seconds, tokens } from "./format.js";
import { copyText, show } from "./markdown.js";
import { errorBox } from "./notice.js";
import * as sessions from "./sessions.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import * as turn from "./turn.js";

let conversation = null; // the one that is shown; it is saved with its first message
const runs = new Map(); // replies that are being written, by the conversation's id: { controller, reply }
const elements = new Map(); // the shown messages, by their id

export function start() {
  const composer = $("composer");
  growing(composer);
  composer.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", stop);
  $("conversation-name").addEventListener("change", rename);
  $("conversation-name").addEventListener("keydown", (event) => event.key === "Enter" && composer.focus());
  $("delete-conversation").addEventListener("click", remove);
  $("download-state").addEventListener("click", download);
  conversations.start(open, (each) => runs.has(each.id));
  addEventListener("pagehide", () => runs.forEach((run) => store.save(run.conversation)));
  display(store.newConversation());
  engine.watch((state) => state && welcome());
}

export const running = () => runs.has(conversation.id);

export function stop() {
  runs.get(conversation.id)?.controller.abort();
}

/** Opens a conversation; null for a new one. */
function open(chosen) {
  location.hash = "#chat";
  display(chosen && runs.has(chosen.id) ? runs.get(chosen.id).conversation : chosen ?? store.newConversation());
  dispatchEvent(new CustomEvent("opened"));
  $("composer").focus();
}

function display(chosen) {
  conversation = chosen;
  elements.clear();
  $("messages").replaceChildren();
  for (const message of conversation.messages) append(message);
  refresh();
  follow(true);
}

/** What depends on the conversation as a whole: its name, the buttons, the list, the chart of memory. */
function refresh() {
  const { messages } = conversation;
  const busy = running();
  $("title-row").hidden = messages.length === 0;
  if (document.activeElement !== $("conversation-name")) $("conversation-name").value = conversations.nameOf(conversation);
  $("download-state").hidden = !conversations.statesOf(conversation).length;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("view-chat").setAttribute("aria-busy", busy);
  welcome();
  for (const message of messages) actions(message);
  const length = messages.findLast((message) => message.tokens)?.tokens ?? 0;
  engine.setContextLength(length);
  $("length-note").textContent = engine.memoryOf(length);
  conversations.render(conversation.id);
}

function welcome() {
  const element = $("welcome");
  element.hidden = conversation.messages.length > 0;
  const state = engine.current();
  if (element.hidden || !state || element.childElementCount) return;
  element.append(h("h2", {}, state.model.name), ...engine.introduction(state));
}

function save() {
  conversation.updated = Date.now();
  saveAs(conversation);
}

function saveAs(saved) {
  const room = store.save(saved);
  conversations.note(room ? "" : "This browser has no room left. This conversation is lost when the tab closes; delete others to keep it.");
}

// Sending

function send() {
  const text = $("composer").value;
  if (!text.trim() || running()) return;
  if (!settings.values()) return;
  $("composer").value = "";
  $("composer").dispatchEvent(new Event("input"));
  const system = settings.systemPrompt();
  if (!conversation.messages.length && system) add({ role: "system", content: system });
  add({ role: "user", content: text });
  reply();
}

function add(message) {
  const added = { id: store.newId(), ...message };
  conversation.messages.push(added);
  append(added);
  return added;
}

/** Writes the model's reply to the shown conversation. It goes on when another one is opened. */
async function reply() {
  const sampling = settings.values();
  if (!sampling) return;
  const mine = conversation;
  const message = add({ role: "assistant", content: "" });
  const controller = new AbortController();
  runs.set(mine.id, { controller, reply: message, conversation: mine });
  draw(message);
  save();
  refresh();
  follow(true);
  announce("The model is writing");
  let frame = 0;
  const progress = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw(message);
      follow();
    });
  };
  try {
    await turn.write(mine, message, sampling, controller.signal, progress);
    announce(`Reply: ${message.content.slice(0, 600)}${message.content.length > 600 ? " …" : ""}`);
  } catch (error) {
    message.finish = "stopped";
    if (error.name === "AbortError") announce("Stopped");
    else {
      message.finish = "error";
      message.error = { message: error.message, advice: error.advice };
      if (mine === conversation) settings.explain(error);
    }
  } finally {
    cancelAnimationFrame(frame);
    const refocus = document.activeElement === $("stop");
    runs.delete(mine.id);
    mine.updated = Date.now();
    if (!mine.deleted) saveAs(mine);
    draw(message);
    refresh();
    follow();
    if (refocus) $("composer").focus();
  }
}

// Messages

const NAMES = { user: "You", assistant: "Model", system: "System prompt", state: "Stored state" };

function append(message) {
  const body = h("div", { class: "text", dir: "auto" });
  const foot = h("div", { class: "foot" });
  const item = h(
    "li",
    { class: `message ${message.role}` },
    h("article", { "aria-label": NAMES[message.role] }, h("h3", { class: message.role === "user" ? "visually-hidden" : "who" }, NAMES[message.role]), body, foot),
  );
  elements.set(message.id, { item, body, foot });
  $("messages").append(item);
  draw(message);
  actions(message);
}

function draw(message) {
  const element = elements.get(message.id);
  if (!element) return;
  const { body, item } = element;
  const writing = runs.get(conversation.id)?.reply === message;
  item.classList.toggle("writing", writing);
  if (message.role === "state") {
    body.textContent = `${tokens(message.tokens ?? 0)} were read before this conversation. Their text is not shown.`;
  } else if (message.role === "assistant") {
    if (!body.blocks) body.replaceChildren();
    if (message.content.trim()) show(body, message.content);
    else if (writing) body.replaceChildren(h("p", { class: "hint pulse" }, "Waiting for the first token …"));
    else if (!message.error) body.replaceChildren(h("p", { class: "hint" }, message.content ? "White space only." : "No text."));
  } else {
    body.textContent = message.content;
  }
}

/** Buttons and figures under a message; none while a reply is being written. */
function actions(message) {
  const element = elements.get(message.id);
  if (!element) return;
  const { foot } = element;
  const busy = running();
  const writing = runs.get(conversation.id)?.reply === message;
  const last = conversation.messages.at(-1) === message;
  const buttons = [];
  if (message.role !== "state" && navigator.clipboard && message.content) {
    buttons.push(button("Copy", (event) => copyText(message.content, event.currentTarget)));
  }
  if (!busy && message.role === "user") buttons.push(button("Edit", () => edit(message)));
  if (!busy && message.role === "assistant" && last && !message.error) buttons.push(button("Regenerate", regenerate));
  if (!busy && message.role !== "system") buttons.push(button("Fork here", () => fork(message)));
  const figures = message.role === "assistant" && !writing ? h("p", { class: "stats" }, figuresOf(message)) : null;
  const error = message.error && errorBox(message.error, last && !busy ? regenerate : null);
  foot.replaceChildren(...[error, figures, !writing && buttons.length ? h("div", { class: "actions" }, buttons) : null].filter(Boolean));
}

function figuresOf({ stats, finish }) {
  const ended = { length: "ended at the token limit", stopped: "stopped; this part has no stored state" }[finish] ?? "";
  if (!stats) return finish ? ended : "broken off when the page was closed";
  const reuse = stats.reused
    ? `${count(stats.reused)} of ${count(stats.prompt)} prompt tokens reused`
    : `${count(stats.prompt)} prompt tokens read`;
  const parts = [
    tokens(stats.made),
    stats.rate ? `${digits(Math.round(stats.rate * 10) / 10)} tokens/s` : "",
    stats.first === null ? "" : `first after ${seconds(stats.first)}`,
    reuse + (stats.why ? ` (${stats.why})` : ""),
    ended,
    stats.notKept ? `the state was not kept: ${stats.notKept}` : "",
  ];
  return parts.filter(Boolean).join(" · ");
}

function dropFrom(index) {
  for (const message of conversation.messages.splice(index)) {
    sessions.forget(message.session);
    elements.get(message.id)?.item.remove();
    elements.delete(message.id);
  }
}

function regenerate() {
  if (running() || !settings.values()) return;
  dropFrom(conversation.messages.length - 1);
  reply();
  $("stop").focus();
}

/** Edits a message of the user in place. If there are later turns, the edited one goes into a fork. */
function edit(message) {
  const { body, foot } = elements.get(message.id);
  const index = conversation.messages.indexOf(message);
  const later = conversation.messages.slice(index + 1).some(({ role }) => role === "user");
  const field = h("textarea", { "aria-label": "Edit your message", "aria-describedby": "edit-hint" });
  field.value = message.content;
  const cancel = () => {
    draw(message);
    actions(message);
    foot.querySelector("button")?.focus();
  };
  const done = () => {
    if (!field.value.trim() || !settings.values()) return;
    replace(message, field.value, later);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      done();
    } else return;
    event.stopPropagation();
  });
  body.replaceChildren(field);
  foot.replaceChildren(
    h("p", { class: "hint", id: "edit-hint" }, later ? "The edited message begins a fork; this conversation stays as it is." : "The reply is written again."),
    h("div", { class: "actions" }, button("Send", done, { class: "" }), button("Cancel", cancel)),
  );
  growing(field);
  field.focus();
}

async function replace(message, text, intoFork) {
  const index = conversation.messages.indexOf(message);
  if (intoFork) await forkBefore(index);
  else dropFrom(index);
  add({ role: "user", content: text });
  reply();
  $("composer").focus();
}

// Forks

async function fork(message) {
  const length = conversation.messages.indexOf(message) + 1;
  const origin = conversations.nameOf(conversation);
  await forkBefore(length);
  const { role, session, tokens: read } = conversation.messages.at(-1);
  if (role === "user") {
    $("composer").value = conversation.messages.pop().content;
    display(conversation);
  }
  const state = session ? `with a state of ${tokens(read)}, so that none of them is read again` : "without a stored state, so that its text is read again";
  notice(`Forked from “${origin}” ${state}.`);
  $("composer").focus();
}

/** Opens a copy of the first messages. Its last message gets a copy of the state, the others none. */
async function forkBefore(length) {
  const source = conversation;
  const messages = source.messages.slice(0, length).map(({ session, error, ...kept }) => ({ ...kept, id: store.newId() }));
  const at = source.messages.slice(0, length).findLastIndex((message) => message.session);
  if (at >= 0) {
    try {
      messages[at].session = (await sessions.fork(source.messages[at].session)).id;
    } catch (error) {
      if (error.status !== 404) announce(error.message);
      delete source.messages[at].session; // it has expired; the text is read again
    }
  }
  const copy = store.newConversation(messages, `${conversations.nameOf(source)} (fork)`);
  display(copy);
  if (messages.length) save();
  refresh();
}

function notice(text) {
  $("messages").append(h("li", { class: "notice" }, text));
  announce(text);
  follow(true);
}

// The conversation

function rename(event) {
  conversation.name = event.target.value.trim();
  save();
  refresh();
}

async function remove() {
  const doomed = conversation;
  const states = conversations.statesOf(doomed).length;
  const text = `“${conversations.nameOf(doomed)}” is deleted from this browser${states ? ", and its states from the server" : ""}.`;
  if (!(await confirmed("Delete this conversation?", text))) return;
  doomed.deleted = true;
  runs.get(doomed.id)?.controller.abort();
  sessions.forget(...conversations.statesOf(doomed));
  store.remove(doomed);
  open(null);
}

async function download() {
  const message = conversation.messages.findLast((each) => each.session);
  $("download-state").disabled = true;
  try {
    await sessions.download(message.session, conversations.nameOf(conversation));
    announce("The state is downloaded");
  } catch (error) {
    notice(`The state could not be downloaded: ${error.message}`);
  } finally {
    $("download-state").disabled = false;
  }
}

/** Keeps the end in view, unless the reader has scrolled away from it. */
function follow(always = false) {
  const scroller = $("scroller");
  const near = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 120;
  if (always || near) scroller.scrollTop = scroller.scrollHeight;
}
