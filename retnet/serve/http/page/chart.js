// Line charts as SVG. They are drawn at the size of their frame, so that their text is readable on a phone, and redrawn
// when it changes. Colours come from the style sheet, so that they follow the theme.

import { h, svg } from "./dom.js";

const HEIGHT = 200;
const MARGIN = { left: 62, right: 14, top: 14, bottom: 28 };

/** A chart in a frame. `draw` takes what `lines` describes. */
export function chart(label) {
  const frame = h("div", { class: "chart", role: "img", "aria-label": label });
  let shown = null;
  const redraw = () => shown && frame.clientWidth && frame.replaceChildren(picture(frame.clientWidth, shown));
  new ResizeObserver(redraw).observe(frame);
  return {
    frame,
    /**
     * lines: [{ points: [[x, y], ...], name, text, area }], name being a class. x, y: { min, max, ticks, format }.
     * marks: [{ x, text }], vertical lines. told: the content in words.
     */
    draw(content) {
      shown = content;
      frame.setAttribute("aria-label", content.told);
      redraw();
    },
  };
}

function picture(width, { lines, x, y, marks = [] }) {
  const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
  const px = (value) => MARGIN.left + ((value - x.min) / (x.max - x.min || 1)) * inner.width;
  const py = (value) => MARGIN.top + (1 - (value - y.min) / (y.max - y.min || 1)) * inner.height;
  const bottom = MARGIN.top + inner.height;
  const root = svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
  for (const tick of y.ticks) {
    root.append(
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: py(tick), y2: py(tick) }),
      svg("text", { x: MARGIN.left - 8, y: py(tick) + 4, "text-anchor": "end" }, y.format(tick)),
    );
  }
  const apart = Math.ceil((x.ticks.length * 64) / inner.width);
  x.ticks.filter((_, i) => i % apart === 0 || apart > 2).forEach((tick, i) => {
    const anchor = i === 0 ? "start" : px(tick) > width - 60 ? "end" : "middle";
    root.append(svg("text", { x: px(tick), y: HEIGHT - 8, "text-anchor": anchor }, x.format(tick)));
  });
  for (const { points, name, area } of lines) {
    if (!points.length) continue;
    const path = points.map(([a, b]) => `${px(a).toFixed(1)},${py(Math.min(b, y.max)).toFixed(1)}`);
    if (area) {
      const ends = [`${px(points.at(-1)[0]).toFixed(1)},${bottom}`, `${px(points[0][0]).toFixed(1)},${bottom}`];
      root.append(svg("polygon", { class: `area ${name}`, points: [...path, ...ends].join(" ") }));
    }
    root.append(svg("polyline", { class: `line ${name}`, points: path.join(" ") }));
  }
  for (const { x: at, text } of marks) {
    const anchor = px(at) > width / 2 ? "end" : "start";
    root.append(
      svg("line", { class: "mark", x1: px(at), x2: px(at), y1: MARGIN.top, y2: bottom }),
      svg("text", { class: "mark-text", x: px(at) + (anchor === "end" ? -6 : 6), y: MARGIN.top + 11, "text-anchor": anchor }, text),
    );
  }
  return root;
}

/** About `wanted` round numbers from 0 to at least `most`. */
export function ticks(most, wanted = 4) {
  const rough = Math.max(most, 1e-9) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 || 1 }, (_, i) => i * step);
}
