// A small part of Markdown as DOM nodes: code blocks, headings, lists, quotes, emphasis and inline code. Model text is
// untrusted, so that nothing here reads HTML, and links stay text. Each text is scanned once, in linear time.

import { button, h } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,4})\s+(\S.*)$/;
const ITEM = /^(\s{0,6})([-*+]|\d{1,9}[.)])\s+(\S.*)$/;
const RULE = /^ {0,3}(?:-{3,}|\*{3,}|_{3,})\s*$/;

/** The blocks of a text: { kind, source, ... }. A fence that is still open is a code block, as while it is written. */
export function blocks(text) {
  const found = [];
  let paragraph = [];
  const close = () => {
    const lines = paragraph.join("\n").replace(/^\n+|\s+$/g, "");
    if (lines) found.push({ kind: "paragraph", source: lines });
    paragraph = [];
  };
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(FENCE);
    if (fence) {
      close();
      const code = [];
      for (i++; i < lines.length && !closes(lines[i], fence[1]); i++) code.push(lines[i]);
      found.push({ kind: "code", language: fence[2], source: code.join("\n") });
    } else if (HEADING.test(line)) {
      close();
      const [, marks, title] = line.match(HEADING);
      found.push({ kind: "heading", level: marks.length, source: title });
    } else if (RULE.test(line) && !paragraph.length) {
      found.push({ kind: "rule", source: "" });
    } else if (ITEM.test(line)) {
      close();
      const items = [];
      for (; i < lines.length && (ITEM.test(lines[i]) || (items.length && /^\s+\S/.test(lines[i]))); i++) {
        const item = lines[i].match(ITEM);
        if (item) items.push({ depth: item[1].length, mark: item[2], source: item[3] });
        else items.at(-1).source += "\n" + lines[i].trim();
      }
      i--;
      found.push({ kind: "list", items, source: JSON.stringify(items) });
    } else if (line.startsWith("> ")) {
      close();
      const quoted = [];
      for (; i < lines.length && lines[i].startsWith(">"); i++) quoted.push(lines[i].replace(/^> ?/, ""));
      i--;
      found.push({ kind: "quote", source: quoted.join("\n") });
    } else if (line.trim() === "" && paragraph.length) {
      close();
    } else {
      paragraph.push(line);
    }
  }
  close();
  return found;
}

function closes(line, fence) {
  const mark = line.trim();
  return mark.length >= fence.length && mark === fence[0].repeat(mark.length);
}

/** Shows a text in an element. Blocks that did not change keep their nodes, and so their selection and focus. */
export function show(element, text) {
  const shown = element.blocks ?? [];
  const wanted = blocks(text);
  wanted.forEach((block, i) => {
    const key = `${block.kind} ${block.level ?? ""} ${block.language ?? ""} ${block.source}`;
    if (shown[i]?.key === key) return;
    const code = shown[i]?.kind === "code" && block.kind === "code" ? shown[i].node : null;
    if (code) code.querySelector("code").textContent = block.source;
    const node = code ?? render(block);
    if (!shown[i]) element.append(node);
    else if (node !== shown[i].node) shown[i].node.replaceWith(node);
    shown[i] = { key, kind: block.kind, node };
  });
  for (const extra of shown.splice(wanted.length)) extra.node.remove();
  element.blocks = shown;
}

function render(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block);
    case "heading":
      return h("p", { class: `heading level-${block.level}`, role: "heading", "aria-level": block.level + 2 }, inline(block.source));
    case "rule":
      return h("hr");
    case "list":
      return h("div", { role: "list", class: "list" }, block.items.map(listItem));
    case "quote":
      return h("blockquote", {}, inline(block.source));
    default:
      return h("p", {}, inline(block.source));
  }
}

function listItem({ depth, mark, source }) {
  const sign = /\d/.test(mark) ? mark : "•";
  const attributes = { role: "listitem", class: `item depth-${Math.min(3, Math.floor(depth / 2))}` };
  return h("div", attributes, h("span", { class: "mark" }, sign), h("span", {}, inline(source)));
}

function codeBlock({ language, source }) {
  const code = h("code", {}, source);
  const copy = navigator.clipboard && button("Copy", () => copyText(code.textContent, copy));
  const head = h("div", { class: "code-head" }, h("span", {}, language || "code"), copy);
  const body = h("pre", { tabindex: 0, role: "region", "aria-label": `Code ${language}`.trim() }, code);
  return h("div", { class: "code" }, head, body);
}

export async function copyText(text, copy) {
  const label = copy.textContent;
  try {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
  } catch {
    copy.textContent = "Not allowed";
  }
  setTimeout(() => (copy.textContent = label), 1500);
}

const ELEMENTS = { "`": "code", "**": "strong", "*": "em" };

/** Nodes of a line of text: code, strong, em. A mark without its partner stays text. */
export function inline(text, marks = ["`", "**", "*"]) {
  const nodes = [];
  const missing = new Set();
  let plain = 0;
  let at = 0;
  while (at < text.length) {
    const mark = marks.find((each) => !missing.has(each) && text.startsWith(each, at));
    const end = mark ? closing(text, mark, at + mark.length) : -1;
    if (mark && end < 0) missing.add(mark);
    if (end < 0 || !opens(text, mark, at)) {
      at += mark && end < 0 ? mark.length : 1;
      continue;
    }
    const inner = text.slice(at + mark.length, end);
    if (at > plain) nodes.push(text.slice(plain, at));
    nodes.push(h(ELEMENTS[mark], {}, mark === "`" ? inner : inline(inner, marks.filter((each) => each !== mark))));
    plain = at = end + mark.length;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

/** Whether emphasis may begin: not inside a word or an expression such as `a * b`, and not before a space. */
function opens(text, mark, at) {
  if (mark === "`") return true;
  return !/[\w*]/.test(text[at - 1] ?? " ") && /[^\s*]/.test(text[at + mark.length] ?? " ");
}

function closing(text, mark, from) {
  const end = text.indexOf(mark, from);
  return end > from ? end : -1;
}
