"""Links between the pages of docs/, and from the other Markdown files into the repository."""

from __future__ import annotations

import re
from pathlib import Path

from tests.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [
    *ROOT.glob("*.md"),
    ROOT / "dev/LOG.md",
    *(ROOT / "recipes").rglob("*.md"),
    *(ROOT / "examples").rglob("*.md"),
]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE))


def links(page: Path) -> list[tuple[str, str]]:
    """The file (empty: the page itself) and the anchor of every link that stays in the repository."""
    found = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?(?: \"[^\"]*\")?\)", without_code(page.read_text()))
    return [(file, anchor) for file, anchor in found if "://" not in file and not file.startswith("mailto:")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, formed as by GitHub."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def test_every_link_leads_to_a_file_and_to_one_of_its_headings():
    broken = []
    for page in [*PAGES, *OTHERS]:
        for file, anchor in links(page):
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {file}#{anchor}")
    assert broken == []


def test_the_index_links_every_page():
    linked = {(DOCS / file).resolve() for file, _ in links(DOCS / "index.md")}
    assert [str(page.relative_to(DOCS)) for page in PAGES if page not in linked | {DOCS / "index.md"}] == []


def test_every_example_is_on_its_page():
    linked = {(DOCS / "learn" / file).resolve() for file, _ in links(DOCS / "learn/examples.md")}
    assert {*(ROOT / "examples").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")} <= linked
