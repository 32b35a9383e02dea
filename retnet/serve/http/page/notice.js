// Errors, shown where they happen, with what can be done.

import { button, h } from "./dom.js";

/** A box with the error, the advice and, if given, a button that tries again. */
export function errorBox(error, again) {
  const advice = error.advice ?? "";
  return h(
    "div",
    { class: "error", role: "alert" },
    h("p", {}, error.message),
    advice && h("p", { class: "hint" }, advice),
    again && button("Try again", again),
  );
}
