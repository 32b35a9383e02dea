// Completion with the probability of every token, and its alternatives.

import { events } from "./api.js";
import { $, announce, button, growing, h } from "./dom.js";
import { percent, seconds, tokens as tokensOf, visible } from "./format.js";
import { modelName } from "./model.js";
import { errorBox } from "./notice.js";
import * as settings from "./settings.js";

const ALTERNATIVES = 5;
let controller = null;
let shown = []; // { name, at, logprob, top: [[name, logprob], ...], given, element }; at: characters before it
let written = []; // the characters of the text so far
let promptOf = ""; // the prompt of what is shown
let active = -1;

export function start() {
  growing($("prompt"));
  $("completion-form").addEventListener("submit", (event) => {
    event.preventDefault();
    complete();
  });
  $("stop-completion").addEventListener("click", stop);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      complete();
    }
  });
  const list = $("tokens");
  list.addEventListener("keydown", move);
  list.addEventListener("focus", () => activate(active < 0 ? 0 : active));
  list.addEventListener("pointerover", (event) => pointed(event.target));
  list.addEventListener("click", (event) => pointed(event.target));
}

export const running = () => controller !== null;

export function stop() {
  controller?.abort();
}

async function complete() {
  if (controller) return;
  const sampling = settings.values();
  if (!sampling) return;
  const prompt = (promptOf = $("prompt").value);
  const echo = $("echo").checked && prompt !== "";
  const body = { model: modelName(), prompt, ...sampling, echo, logprobs: ALTERNATIVES, stream: true, stream_options: { include_usage: true } };
  const mine = (controller = new AbortController());
  const began = performance.now();
  const seen = { usage: null, finish: null, first: null };
  clear();
  setBusy(true);
  announce("Continuing the text");
  try {
    for await (const chunk of events("v1/completions", body, mine.signal)) {
      const [choice] = chunk.choices ?? [];
      if (choice) {
        seen.first ??= performance.now();
        seen.finish = choice.finish_reason ?? seen.finish;
        for (const character of choice.text ?? "") written.push(character);
        add(choice.logprobs, Array.from(prompt).length, echo);
      }
      seen.usage = chunk.usage ?? seen.usage;
      tell(seen, began);
    }
    announce(`Done, ${tokensOf(shown.filter((token) => !token.given).length)}`);
  } catch (error) {
    seen.finish = "stopped";
    if (error.name === "AbortError") announce("Stopped");
    else if (!settings.explain(error)) $("completion-error").replaceChildren(errorBox(error, complete));
  } finally {
    tell(seen, began);
    controller = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  $("complete").hidden = busy;
  $("stop-completion").hidden = !busy;
  $("tokens").setAttribute("aria-busy", busy);
  if (busy) $("stop-completion").focus();
  else if (document.activeElement === $("stop-completion") || document.activeElement === document.body) $("complete").focus();
}

function clear() {
  shown = [];
  written = [];
  active = -1;
  $("tokens").replaceChildren();
  $("tokens").removeAttribute("aria-activedescendant");
  $("completion-error").replaceChildren();
  $("completion-stats").textContent = "Waiting for the first token …";
  $("token-detail").hidden = true;
  $("completion-result").hidden = false;
}

/** Adds the tokens of a chunk. With echo, those that begin inside the prompt (in characters) are the prompt's own. */
function add(logprobs, promptLength, echo) {
  const names = logprobs?.tokens ?? [];
  const list = $("tokens");
  names.forEach((name, i) => {
    const at = logprobs.text_offset[i];
    const logprob = logprobs.token_logprobs[i];
    const top = Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]);
    const given = echo && at < promptLength;
    const begins = echo && !given && shown.at(-1)?.given;
    const text = textOf(name, at, logprobs.text_offset[i + 1] ?? written.length);
    const classes = ["token", bin(logprob), begins && "begins", text.startsWith("\\x") && "bytes"].filter(Boolean);
    const element = h(
      "span",
      { role: "option", id: `token-${shown.length}`, class: classes.join(" "), "aria-label": told(name, logprob) },
      text,
    );
    element.dataset.index = shown.length;
    shown.push({ name, at, logprob, top, given, element });
    list.append(element);
  });
}

/** The text of a token. One that is a part of a character is named by its bytes; the last part shows the character. */
function textOf(name, at, end) {
  if (!name.startsWith("bytes:\\x")) return name;
  return written.slice(at, end).join("") || name.slice("bytes:".length);
}

function tell({ usage, finish, first }, began) {
  if (first === null) {
    if (finish) $("completion-stats").textContent = "";
    return;
  }
  const made = shown.filter((token) => !token.given);
  const rated = shown.filter((token) => token.logprob !== null && token.logprob !== undefined);
  const mean = rated.reduce((sum, token) => sum + token.logprob, 0) / (rated.length || 1);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const parts = [
    tokensOf(made.length),
    `first after ${seconds(first - began)}`,
    rated.length ? `perplexity ${Math.exp(-mean).toFixed(2)} over ${tokensOf(rated.length)}` : "",
    cached ? `${tokensOf(cached)} of the text reused` : "",
    { length: "ended at the token limit", stopped: "stopped" }[finish] ?? "",
  ];
  $("completion-stats").textContent = parts.filter(Boolean).join(" · ");
}

function bin(logprob) {
  if (logprob === null || logprob === undefined) return "unrated";
  const p = Math.exp(logprob);
  return `p${[0.05, 0.2, 0.5, 0.9].filter((limit) => p >= limit).length}`;
}

function told(text, logprob) {
  const word = text.trim() ? text : visible(text);
  return logprob === null || logprob === undefined ? `${word}, not rated` : `${word}, ${percent(Math.exp(logprob))}`;
}

function pointed(target) {
  const index = target.closest?.("[data-index]")?.dataset.index;
  if (index !== undefined) activate(Number(index), false);
}

function move(event) {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 20, PageUp: -20, Home: -1e9, End: 1e9 };
  const step = steps[event.key];
  if (!step || !shown.length || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  activate(Math.max(0, Math.min(shown.length - 1, Math.max(active, 0) + step)));
}

function activate(index, scroll = true) {
  const token = shown[index];
  if (!token) return;
  shown[active]?.element.classList.remove("active");
  shown[active]?.element.setAttribute("aria-selected", "false");
  active = index;
  token.element.classList.add("active");
  token.element.setAttribute("aria-selected", "true");
  $("tokens").setAttribute("aria-activedescendant", token.element.id);
  if (scroll) token.element.scrollIntoView({ block: "nearest" });
  detail(token, index);
}

/** The card of a token: its alternatives as bars, each with a way to continue with it instead. */
function detail(token, index) {
  const among = token.top.some(([name]) => name === token.name);
  const rows = among || token.logprob == null ? token.top : [...token.top, [token.name, token.logprob]];
  const card = $("token-detail");
  card.hidden = false;
  card.replaceChildren(
    h("h3", {}, h("code", {}, visible(token.name)), ` token ${index + 1}${token.given ? " of your text" : ""}`),
    rows.length
      ? h("ul", { class: "plain alternatives" }, rows.map(([name, logprob]) => alternative(name, logprob, token)))
      : h("p", { class: "hint" }, "Nothing comes before it, so that it has no probability."),
  );
}

function alternative(name, logprob, token) {
  const p = Math.exp(logprob);
  const word = visible(name);
  const usable = name !== token.name && name && !/^bytes:\\x|^token_id:\d/.test(name);
  return h(
    "li",
    {},
    h("code", { class: name === token.name ? "chosen" : "" }, word),
    h("meter", { min: 0, max: 1, value: p, "aria-label": `Probability of ${word}` }, percent(p)),
    h("span", { class: "number" }, percent(p)),
    usable && button("Use this instead", () => instead(name, token), { "aria-label": `Use ${word} instead` }),
  );
}

/** Continues from another token: the text before it and its text are the new prompt. */
function instead(name, token) {
  const from = shown[0].given ? 0 : shown[0].at;
  const before = written.slice(0, token.at - from).join("");
  $("prompt").value = (shown[0].given ? "" : promptOf) + before + name;
  $("prompt").dispatchEvent(new Event("input"));
  complete();
}
