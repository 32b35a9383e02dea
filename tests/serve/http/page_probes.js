// Checks of a page from inside: each returns what is wrong. An object for tests to evaluate.
({
  // Elements with text of their own that does not stand out from what is behind it: [element, contrast, text].
  lowContrast(least) {
    const rgba = (text) => {
      const numbers = text.match(/[\d.]+/g).map(Number);
      return numbers.length > 3 ? numbers : [...numbers, 1];
    };
    const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const behind = (element) => {
      const layers = [];
      for (let e = element; e; e = e.parentElement) layers.unshift(rgba(getComputedStyle(e).backgroundColor));
      return layers.reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    };
    const found = [];
    for (const e of document.body.querySelectorAll("*")) {
      const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.matches("input, textarea");
      const box = e.getBoundingClientRect();
      if (!own || box.width < 2 || box.height < 2 || !e.checkVisibility({ visibilityProperty: true })) continue;
      const style = getComputedStyle(e);
      const ground = behind(e);
      const ink = rgba(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
      const [bright, dark] = [light(over(ink, ground)), light(ground)].sort((x, y) => y - x);
      const contrast = (bright + 0.05) / (dark + 0.05);
      if (contrast < least) found.push([e.outerHTML.slice(0, 60), contrast, e.textContent.slice(0, 40)]);
    }
    return found;
  },

  // Controls and regions without a name, ids that are used twice, and references to ids that do not exist.
  unnamed() {
    const text = (id) => document.getElementById(id)?.textContent ?? "";
    const references = (e, attribute) => (e.getAttribute(attribute) ?? "").split(" ").filter(Boolean);
    const name = (e) =>
      e.getAttribute("aria-label") ||
      references(e, "aria-labelledby").map(text).join("").trim() ||
      [...(e.labels ?? [])].map((label) => label.textContent.trim()).join("") ||
      (e.matches("input, textarea, aside, section, nav, [role=listbox], [role=region], [role=img]") ? "" : e.textContent.trim());
    const controls = "a, button, input, textarea, summary, meter, aside, section, nav, dialog, [role=listbox], [role=img]";
    const visible = [...document.querySelectorAll(controls)].filter((e) => e.checkVisibility());
    const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
    const attributes = ["aria-describedby", "aria-controls", "aria-labelledby", "aria-activedescendant", "for"];
    const referred = attributes.flatMap((attribute) =>
      [...document.querySelectorAll(`[${attribute}]`)].flatMap((e) => references(e, attribute)),
    );
    return [
      ...visible.filter((e) => !name(e)).map((e) => `unnamed: ${e.outerHTML.slice(0, 80)}`),
      ...ids.filter((id, i) => ids.indexOf(id) !== i).map((id) => `twice: ${id}`),
      ...referred.filter((id) => !document.getElementById(id)).map((id) => `missing: ${id}`),
    ];
  },

  // Controls that are hard to touch: smaller than the 24 pixels of WCAG 2.2.
  small() {
    return [...document.querySelectorAll("a, button, input, textarea, summary")]
      .filter((e) => e.checkVisibility() && !e.matches(".visually-hidden, .skip"))
      .filter((e) => {
        const box = (e.closest("label") ?? e).getBoundingClientRect();
        return box.width < 24 || box.height < 24;
      })
      .map((e) => e.outerHTML.slice(0, 80));
  },

  // Elements that reach over the right edge, outside of code, which scrolls by itself.
  wide() {
    return [...document.querySelectorAll("body *")]
      .filter((e) => e.checkVisibility() && !e.closest("pre, .visually-hidden"))
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
      .map((e) => e.outerHTML.slice(0, 90));
  },

  // Everything that Tab should reach, numbered in the order of the page.
  numbered() {
    const controls = [...document.querySelectorAll("a, button, input, textarea, pre")];
    const reachable = controls.filter((e) => e.checkVisibility() && !e.disabled && e.tabIndex >= 0);
    return reachable.map((e, i) => (e.dataset.number = i));
  },

  // The name of the element that has the focus.
  focused() {
    const e = document.activeElement;
    return (e.getAttribute("aria-label") ?? (e.id || e.textContent)).trim();
  },

  // Whether the element that has the focus has a ring around it.
  ringed() {
    const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
    return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
  },
})
