// Elements from JavaScript. Every text becomes a text node: no text is ever read as HTML.

export const $ = (id) => document.getElementById(id);

/** An element. Attributes that are functions become listeners of the event that they name. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function button(text, click, attributes = {}) {
  return h("button", { type: "button", class: "quiet", click, ...attributes }, text);
}

/** Tells a screen reader, once. The region is emptied first, so that the same text is read again. */
export function announce(text) {
  const region = $("status");
  region.textContent = "";
  setTimeout(() => (region.textContent = text), 50);
}

/** Asks in a dialog; resolves to whether the answer is yes. */
export function confirmed(title, text, yes = "Delete") {
  const dialog = $("confirm-dialog");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }),
  );
}

/** Grows a text field with its text where the browser does not do so by itself. */
export function growing(textarea) {
  if (CSS.supports("field-sizing", "content")) return;
  textarea.addEventListener("input", () => {
    textarea.style.height = "auto";
    textarea.style.height = `${textarea.scrollHeight + 2}px`;
  });
}
