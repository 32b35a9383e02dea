// Start of the page: views, side panels, the theme, the key.

import { onMissingKey, setKey } from "./api.js";
import * as chat from "./chat.js";
import * as completion from "./completion.js";
import * as conversations from "./conversations.js";
import { $, announce } from "./dom.js";
import * as engine from "./engine.js";
import * as settings from "./settings.js";
import { setting } from "./store.js";

const VIEWS = ["chat", "completion", "engine"];
const FIRST_FIELD = { chat: "composer", completion: "prompt", engine: "view-engine" };
let view = "chat";

function showView() {
  const asked = location.hash.slice(1);
  if (VIEWS.includes(asked)) view = asked;
  for (const name of VIEWS) $(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = view;
  engine.setVisible(view === "engine");
  closePanels();
}

// Side panels. Beside the text where there is room; over it, with the rest inert, where there is not.

const PANELS = { conversations: "open-conversations", settings: "open-settings" };
const FIRST_IN_PANEL = { conversations: "new-chat", settings: "setting-temperature" };
const narrow = matchMedia("(max-width: 899px)");

function setPanel(name, open, focus = true) {
  const panel = $(name);
  const opener = $(PANELS[name]);
  const beside = name === "conversations" && !narrow.matches;
  panel.hidden = !open && !beside;
  panel.classList.toggle("over", open && narrow.matches);
  opener.setAttribute("aria-expanded", String(open));
  const over = Object.keys(PANELS).some((each) => $(each).classList.contains("over"));
  for (const element of [$("main"), $("skip"), document.querySelector(".top"), ...Object.keys(PANELS).map($)]) {
    element.inert = over && !element.classList.contains("over");
  }
  if (!focus) return;
  if (open) $(FIRST_IN_PANEL[name]).focus();
  else opener.focus();
}

function closePanels() {
  for (const name of Object.keys(PANELS)) if ($(name).classList.contains("over")) setPanel(name, false, false);
}

function startPanels() {
  for (const [name, opener] of Object.entries(PANELS)) {
    $(opener).addEventListener("click", () => setPanel(name, $(opener).getAttribute("aria-expanded") !== "true"));
    setPanel(name, false, false);
  }
  for (const close of document.querySelectorAll("[data-close]")) {
    close.addEventListener("click", () => setPanel(close.dataset.close, false));
  }
  narrow.addEventListener("change", () => {
    for (const name of Object.keys(PANELS)) setPanel(name, false, false);
  });
  addEventListener("opened", closePanels);
  addEventListener("reveal", () => setPanel("settings", true, false));
}

// The theme: the system's, light or dark. theme.js sets a stored one before the first paint.

function startTheme() {
  const themes = ["system", "light", "dark"];
  const apply = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    $("theme-name").textContent = `Theme: ${theme}`;
  };
  let theme = document.documentElement.dataset.theme ?? "system";
  apply(theme);
  $("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    apply(theme);
    setting("retnet.theme", theme === "system" ? null : theme);
  });
}

// The key

function askForKey(refusal) {
  const dialog = $("key-dialog");
  $("key-error").textContent = refusal;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
  });
}

function startKey() {
  onMissingKey(askForKey);
  $("key-cancel").addEventListener("click", () => $("key-dialog").close(""));
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key-dialog").close("given");
  });
}

function showEngine(state, error) {
  const offline = $("offline");
  offline.hidden = !error;
  if (error) $("offline-text").textContent = `${error.message} ${error.advice ?? ""}`;
  if (!state) return;
  document.title = `${state.model.name} · RetNet`;
  $("model-name").textContent = state.model.name;
  $("model-facts").replaceChildren(...engine.facts(state));
}

function onEscape(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const open = Object.keys(PANELS).find((name) => $(name).classList.contains("over"));
  if (open) setPanel(open, false);
  else if (view === "completion" && completion.running()) completion.stop();
  else if (chat.running()) chat.stop();
}

startTheme();
startKey();
$("offline-again").addEventListener("click", engine.again);
settings.start($("settings-form"));
engine.watch(showEngine);
chat.start();
completion.start();
startPanels();
showView();
addEventListener("hashchange", () => {
  showView();
  announce(`${view} view`);
});
addEventListener("keydown", onEscape);
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $(FIRST_FIELD[view]).focus();
});
await engine.start();
conversations.refreshOthers();
