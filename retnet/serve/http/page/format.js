// Numbers as people read them.

const integer = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (n) => integer.format(n);

export const tokens = (n) => `${count(n)} token${n === 1 ? "" : "s"}`;

/** Decimal units, as on a disk or in a network: 1 MB is 1,000,000 bytes. */
export function bytes(n) {
  for (const [size, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (n >= size) return `${digits(n / size)} ${unit}`;
  }
  return `${count(n)} bytes`;
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
