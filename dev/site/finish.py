"""The last steps on the built pages: mathematics as MathML, the pages as Markdown, llms.txt, no outside scripts."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

from latex2mathml.converter import convert

from dev.site.navigation import sections

# Generators put formulas into these elements, in TeX's brackets (pymdownx.arithmatex).
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
SHIM = re.compile(r'src="https://unpkg\.com/iframe-worker/shim"')
VENDOR = Path(__file__).parent / "vendor"


def finish(site: Path, staged: Path) -> None:
    shutil.copyfile(VENDOR / "iframe-worker/shim.js", site / "assets/iframe-worker.js")
    shutil.copyfile(VENDOR / "iframe-worker/LICENSE", site / "assets/iframe-worker.LICENSE.txt")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        up = "../" * (len(page.relative_to(site).parts) - 1)
        text = SHIM.sub(f'src="{up}assets/iframe-worker.js"', FORMULA.sub(_mathml, text))
        page.write_text(text, encoding="utf-8")
    _write_markdown(site, staged)


def _mathml(match: re.Match[str]) -> str:
    display, formula = "block" if match[2] == "[" else "inline", html.unescape(match[3]).strip()
    try:
        return convert(formula, display=display)
    except Exception as error:  # the converter has no common class of errors
        raise ValueError(f"the formula {formula!r} cannot be read: {type(error).__name__}") from error


def _write_markdown(site: Path, staged: Path) -> None:
    """Each page's Markdown beside it; llms.txt, which lists them (llmstxt.org); llms-full.txt, all of them."""
    index = staged / "index.md"
    title, summary, *_ = index.read_text(encoding="utf-8").split("\n\n")
    lines = [title, "", "> " + " ".join(summary.split()), ""]
    whole = []
    for name, entries in sections(index).items():
        lines += [f"## {name}", ""]
        for entry in entries:
            text = (staged / entry.page).read_text(encoding="utf-8")
            (site / entry.page).write_text(text, encoding="utf-8")
            heading = re.search(r"^# (.*)$", text, re.MULTILINE)
            lines.append(f"- [{heading[1] if heading else entry.title}]({entry.page}): {entry.wish}")
            whole.append(f"<!-- {entry.page} -->\n\n{text}")
        lines.append("")
    (site / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    (site / "llms-full.txt").write_text("\n\n".join(["\n".join(lines), *whole]), encoding="utf-8")
