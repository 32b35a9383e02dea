// Numbers as people read them.

const integer = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (n) => integer.format(n);

export const tokens = (n) => `${count(n)} token${n === 1 ? "" : "s"}`;

const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

/** The unit in which a number of bytes is written: its size and its name. */
export function unitOf(n) {
  const power = n < 1024 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log2(n) / 10));
  return { size: 1024 ** power, name: UNITS[power] };
}

export function bytes(n) {
  const { size, name } = unitOf(n);
  return `${digits(n / size)} ${name}`;
}

export function parameters(n) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (n >= size) return digits(n / size) + unit;
  }
  return count(n);
}

/** Three significant digits; larger numbers whole. */
export function digits(n) {
  if (n === 0) return "0";
  if (n >= 100) return count(n);
  return String(Number(n.toPrecision(3)));
}

export function seconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${digits(ms / 1000)} s`;
}

/** A probability: "83%", "0.4%", "<0.01%". */
export function percent(p) {
  const value = p * 100;
  if (value >= 10) return `${Math.round(value)}%`;
  if (value === 0) return "0%";
  if (value >= 0.01) return `${Number(value.toPrecision(2))}%`;
  return "<0.01%";
}

/** Characters without a shape of their own as visible ones, for a token that is shown alone. */
export function visible(text) {
  const names = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
  return Array.from(text, (c) => {
    if (names[c]) return names[c];
    return c < " " || c === "\x7f" ? `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}` : c;
  }).join("");
}
