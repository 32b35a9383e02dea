// Settings of requests. A field that is empty is not sent, so that what is shown is what the server gets.

import { announce, button, h } from "./dom.js";
import { setting } from "./store.js";

const STORED = "retnet.settings";

const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 takes the likeliest token. Below 1 is safer, above 1 wilder.", min: 0, max: 5, initial: 0.8 },
  { name: "top_p", label: "Top p", hint: "Keeps the likeliest tokens that together have this probability. 1 keeps all.", min: 0, max: 1, initial: 0.95 },
  { name: "max_tokens", label: "Max new tokens", hint: "The reply ends here at the latest.", min: 1, whole: true, initial: 512 },
  { name: "seed", label: "Seed", hint: "The same seed and text give the same reply. Empty: a new one each time.", min: 0, max: 2 ** 53 - 1, whole: true },
  { name: "top_k", label: "Top k", hint: "Keeps this many of the likeliest tokens. 0 keeps all.", min: 0, whole: true, more: true },
  { name: "min_p", label: "Min p", hint: "Keeps tokens at least this times as likely as the likeliest.", min: 0, max: 1, more: true },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "Above 1 avoids tokens of the text so far.", min: 0.01, max: 10, more: true },
  { name: "presence_penalty", label: "Presence penalty", hint: "Above 0 avoids tokens that the reply has already.", min: -2, max: 2, more: true },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "Above 0 avoids tokens the more often the reply has them.", min: -2, max: 2, more: true },
  { name: "stop", label: "Stop strings", hint: "One on each line; \\n stands for a line break. The reply ends before them.", text: true, more: true },
  { name: "system", label: "System prompt", hint: "Instructions before a conversation. Chat only; used by conversations that begin after the change.", text: true, more: true, chat: true },
];

let form;

/** Builds the form, with the values of the last visit. */
export function start(element) {
  form = element;
  const stored = JSON.parse(setting(STORED) ?? "null") ?? initial();
  const main = FIELDS.filter((field) => !field.more).map(row);
  const more = FIELDS.filter((field) => field.more).map(row);
  const reset = button("Reset to defaults", () => {
    put(initial());
    changed();
    announce("Settings are reset");
  });
  form.append(...main, h("details", {}, h("summary", {}, "More settings"), more), reset);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    check(event.target);
    changed();
  });
  put(stored);
}

function initial() {
  return Object.fromEntries(FIELDS.map((field) => [field.name, field.initial ?? ""]));
}

function row(field) {
  const id = `setting-${field.name}`;
  const common = { id, name: field.name, "aria-describedby": `${id}-hint ${id}-error`, autocomplete: "off" };
  const limits = { min: field.min, max: field.max, step: field.whole ? 1 : "any" };
  const input = field.text
    ? h("textarea", { ...common, rows: 2, spellcheck: "false" })
    : h("input", { ...common, type: "number", inputmode: "decimal", placeholder: "not sent", ...limits });
  return h(
    "div",
    { class: field.text ? "field" : "field short" },
    h("label", { for: id }, field.label),
    input,
    h("p", { class: "hint", id: `${id}-hint` }, field.hint),
    h("p", { class: "field-error", id: `${id}-error`, role: "alert" }),
  );
}

function put(values) {
  for (const { name } of FIELDS) {
    form.elements[name].value = values[name] ?? "";
    check(form.elements[name]);
  }
}

function changed() {
  setting(STORED, JSON.stringify(Object.fromEntries(FIELDS.map(({ name }) => [name, form.elements[name].value]))));
}

function check(input) {
  showError(input, input.checkValidity() ? "" : input.validationMessage);
}

function showError(input, message) {
  if (message) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  document.getElementById(`${input.id}-error`).textContent = message;
}

/** The fields of a request, without those that are empty; null if one is not valid, which is then shown. */
export function values() {
  const given = {};
  for (const field of FIELDS.filter((each) => !each.chat)) {
    const input = form.elements[field.name];
    if (!input.checkValidity()) {
      reveal(input, input.validationMessage);
      return null;
    }
    const value = field.name === "stop" ? strings(input.value) : input.value.trim();
    if (value.length) given[field.name] = field.text ? value : Number(value);
  }
  return given;
}

function strings(text) {
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\([nt\\])/g, (_, c) => escapes[c]));
}

export function systemPrompt() {
  return form.elements.system.value.trim();
}

/** Shows a refusal of the server at the field that it names; returns whether there is such a field. */
export function explain(error) {
  const name = error.param === "max_completion_tokens" ? "max_tokens" : error.param;
  const input = FIELDS.some((field) => field.name === name && !field.chat) && form.elements[name];
  if (!input || error.code === "context_length_exceeded") return false;
  reveal(input, error.message);
  return true;
}

function reveal(input, message) {
  showError(input, message);
  form.dispatchEvent(new CustomEvent("reveal", { bubbles: true }));
  const more = input.closest("details");
  if (more) more.open = true;
  input.focus();
}
