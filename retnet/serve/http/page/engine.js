// The live view of the engine, from /v1/engine. Rates are differences of the server's counters over its own clock.

import { getJson } from "./api.js";
import { chart, ticks } from "./chart.js";
import { $, h } from "./dom.js";
import { bytes, count, digits, parameters, percent, tokens, unitOf } from "./format.js";

const SHOWN_S = 120;
const samples = []; // { at, generated, prompt, running }, the newest last
const watchers = [];
let latest = null;
let contextLength = 0;
let visible = false;
let timer = null;
let failures = 0;
let parts = null;

/** Calls back with each new state of the engine, or null when the server cannot be reached. */
export function watch(call) {
  watchers.push(call);
}

export const current = () => latest;

/** The memory of a conversation of this length, in words; "" before the server is known. */
export function memoryOf(length) {
  if (!latest || !length) return "";
  const { state_bytes_per_stream: state, kv_cache_bytes_per_token: perToken } = latest.memory;
  return `${tokens(length)} in a state of ${bytes(state)}; a KV cache would hold ${bytes(length * perToken)}`;
}

/** The length of the conversation that is shown, which the memory chart marks. */
export function setContextLength(n) {
  contextLength = n;
  if (visible && latest) drawMemory();
}

/** Asks again at once, after the user said so. */
export const again = () => poll(false);

/** Once per second while the view is shown, otherwise every 5 seconds; never while the tab is hidden. */
export function start() {
  document.addEventListener("visibilitychange", schedule);
  return poll(false);
}

export function setVisible(shown) {
  visible = shown;
  if (shown) render();
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (document.hidden) return;
  const wait = failures ? Math.min(15000, 1000 * 2 ** failures) : visible ? 1000 : 5000;
  timer = setTimeout(poll, wait, true);
}

async function poll(background) {
  try {
    latest = await getJson("v1/engine", { timeout: 10000, background });
    failures = 0;
    samples.push({ at: latest.time_s, generated: latest.tokens.generated, prompt: latest.tokens.prompt });
    while (samples[0].at < latest.time_s - SHOWN_S - 5 || samples[0].at > latest.time_s) samples.shift();
    for (const call of watchers) call(latest, null);
    if (visible) render();
  } catch (error) {
    failures++;
    for (const call of watchers) call(null, error);
  }
  schedule();
}

/** Tokens per second between neighbouring samples: [seconds before now, rate]. */
function rates(field) {
  return samples.slice(1).map((sample, i) => {
    const before = samples[i];
    return [sample.at - latest.time_s, Math.max(0, sample[field] - before[field]) / Math.max(sample.at - before.at, 1e-3)];
  });
}

function render() {
  if (!latest) return;
  parts ??= build();
  const { slots, memory, prefix, model } = latest;
  const generated = rates("generated");
  const rate = generated.at(-1)?.[1] ?? 0;
  parts.rate.textContent = digits(rate >= 10 ? Math.round(rate) : rate);
  parts.prompt.textContent = `${digits(Math.round(rates("prompt").at(-1)?.[1] ?? 0))} prompt tokens/s read`;
  parts.running.textContent = `${count(slots.running)} of ${count(slots.total)}`;
  parts.waiting.textContent = slots.waiting ? `${count(slots.waiting)} waiting` : "none waiting";
  parts.state.textContent = bytes(memory.state_bytes_per_stream);
  parts.stateNote.textContent = model.constant_state ? "at every length" : `room for ${tokens(model.context_limit ?? 0)}`;
  parts.total.textContent = count(latest.tokens.generated);
  parts.totalNote.textContent = `${count(latest.tokens.prompt)} prompt tokens read`;
  drawSlots(slots);
  drawRates(generated);
  drawMemory();
  drawPrefix(prefix);
}

function build() {
  const tile = (name) => {
    const value = h("p", { class: "value" });
    const note = h("p", { class: "hint" });
    return { element: h("div", { class: "tile" }, h("h3", {}, name), value, note), value, note };
  };
  const [rate, running, state, total] = ["Tokens/s", "Streams running", "State per stream", "Tokens generated"].map(tile);
  const slots = h("div", { class: "slots", role: "img" });
  const speed = chart("Tokens per second");
  const memory = chart("Memory per stream");
  const memoryNote = h("p", { class: "note" });
  const prefix = h("div");
  $("engine-content").append(
    h("div", { class: "tiles" }, rate.element, running.element, state.element, total.element),
    slots,
    h("h3", {}, "Tokens per second, last two minutes"),
    speed.frame,
    h("h3", {}, "Memory per stream by length"),
    h("p", { class: "keys" }, h("span", { class: "key state" }, "this model’s state"), h("span", { class: "key cache" }, "KV cache of an equal Transformer")),
    memory.frame,
    memoryNote,
    h("h3", {}, "Prefix cache"),
    prefix,
  );
  return {
    rate: rate.value, prompt: rate.note, running: running.value, waiting: running.note, state: state.value,
    stateNote: state.note, total: total.value, totalNote: total.note, slots, speed, memory, memoryNote, prefix,
  };
}

function drawSlots({ total, running, waiting }) {
  const most = 128;
  const shown = Math.min(total, most);
  const busy = Math.round((running / total) * shown);
  parts.slots.setAttribute("aria-label", `${running} of ${total} slots are in use, ${waiting} requests wait`);
  parts.slots.replaceChildren(
    ...Array.from({ length: shown }, (_, i) => h("span", { class: i < busy ? "slot busy" : "slot" })),
    ...Array.from({ length: Math.min(waiting, 32) }, () => h("span", { class: "slot queued" })),
  );
}

function drawRates(points) {
  const most = Math.max(1, ...points.map(([, rate]) => rate));
  const marks = ticks(most * 1.05);
  parts.speed.draw({
    lines: [{ points, name: "state", area: true }],
    x: { min: -SHOWN_S, max: 0, ticks: [-120, -90, -60, -30, 0], format: (s) => (s ? `${s} s` : "now") },
    y: { min: 0, max: marks.at(-1), ticks: marks, format: digits },
    told: `Tokens per second: ${digits(Math.round(points.at(-1)?.[1] ?? 0))} now, ${digits(Math.round(most))} at most in two minutes`,
  });
}

function drawMemory() {
  if (!parts) return;
  const { state_bytes_per_stream: state, kv_cache_bytes_per_token: perToken } = latest.memory;
  const crossing = state / perToken;
  const longest = Math.max(2.5 * crossing, 1.25 * contextLength, 1024);
  const unit = unitOf(longest * perToken);
  const marks = ticks((longest * perToken) / unit.size, 4).map((n) => n * unit.size);
  const across = ticks(longest, 4).filter((tick) => tick <= longest);
  const here = contextLength * perToken;
  const told = `${sentence(crossing)} ${contextLength ? `This conversation has ${tokens(contextLength)}: a KV cache would hold ${bytes(here)}, the state ${bytes(state)}.` : ""}`;
  parts.memoryNote.textContent = told;
  parts.memory.draw({
    lines: [
      { points: [[0, 0], [longest, longest * perToken]], name: "cache" },
      { points: [[0, state], [longest, state]], name: "state" },
    ],
    marks: contextLength ? [{ x: contextLength, text: "this conversation" }] : [],
    x: { min: 0, max: longest, ticks: across, format: (n) => (n === across.at(-1) ? tokens(n) : count(n)) },
    y: { min: 0, max: marks.at(-1), ticks: marks, format: (n) => `${digits(n / unit.size)} ${unit.name}` },
    told,
  });
}

function sentence(crossing) {
  return `Up to ${tokens(Math.floor(crossing))}, the KV cache of a Transformer of this width and depth (bfloat16) would be smaller; from there on it grows and the state does not.`;
}

function drawPrefix(prefix) {
  if (!prefix) {
    parts.prefix.replaceChildren(h("p", { class: "note" }, "The prefix cache is off."));
    return;
  }
  const asked = prefix.hits + Object.values(prefix.misses).reduce((sum, n) => sum + n, 0);
  const rows = [
    ["Hits", prefix.hits, asked ? percent(prefix.hits / asked) : ""],
    ...Object.entries(prefix.misses).map(([reason, n]) => [`Misses: ${reason}`, n, asked ? percent(n / asked) : ""]),
    ["Prompt tokens not read again", prefix.tokens_saved, prefix.prompt_tokens ? percent(prefix.tokens_saved / prefix.prompt_tokens) : ""],
    ["States kept", prefix.states, bytes(prefix.state_bytes)],
  ];
  parts.prefix.replaceChildren(
    h(
      "table",
      {},
      h("caption", { class: "visually-hidden" }, "Prefix cache"),
      h("tbody", {}, rows.map(([name, n, beside]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, count(n)), h("td", {}, beside)))),
    ),
  );
}

/** The model in figures, and where its constant state pays off: nodes for the first view. */
export function introduction({ model, memory }) {
  const crossing = Math.floor(memory.state_bytes_per_stream / memory.kv_cache_bytes_per_token);
  const text = model.constant_state
    ? `A conversation takes the same memory and the same time per token at every length. The KV cache of an equal Transformer is larger after ${tokens(crossing)}, and goes on growing.`
    : `Every stream has a fixed place for ${tokens(model.context_limit)}.`;
  const figures = [
    ["Parameters", parameters(model.parameters)],
    ["Memory per stream", bytes(memory.state_bytes_per_stream)],
    ["Layers × width", `${count(model.layers)} × ${count(model.width)}`],
    ["Context", model.context_limit ? tokens(model.context_limit) : "no limit"],
  ];
  return [h("p", { class: "lead" }, text), h("dl", {}, figures.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))))];
}

/** The model in one line: nodes for the head of the page. */
export function facts({ model, memory }) {
  const state = bytes(memory.state_bytes_per_stream);
  const kept = model.constant_state ? `${state} per stream at every length` : `${state} per stream, fixed`;
  return [
    `${parameters(model.parameters)} parameters · ${kept}`,
    h("span", { class: "where" }, ` · ${model.dtype} on ${model.device}`),
  ];
}
