"""The order of the pages, read from docs/index.md: its sections, and the links of their lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A line of the index. wish: what a reader wants to do; title, page: its link."""

    wish: str
    title: str
    page: str


def sections(index: Path) -> dict[str, list[Entry]]:
    """The entries of each third-level heading, in order. Raises ValueError for a line without exactly one link."""
    found: dict[str, list[Entry]] = {}
    heading = None
    lines = re.sub(r"\n  +", " ", index.read_text(encoding="utf-8")).splitlines()  # an entry may go over several lines
    for line in lines:
        if line.startswith("#"):
            heading = line.removeprefix("### ") if line.startswith("### ") else None
        elif heading and line.startswith("- "):
            found.setdefault(heading, []).append(_entry(line))
    return found


def _entry(line: str) -> Entry:
    match = re.fullmatch(r"- ([^\[]+): \[([^\]]+)\]\(([^)#]+\.md)\)", line)
    if match is None:
        raise ValueError(f"docs/index.md: {line!r}; accepted: '- what a reader wants: [title](page.md)'")
    return Entry(*match.groups())


def nav(index: Path) -> list[dict]:
    """The navigation in MkDocs' format."""
    pages = [{name: [{_capital(e.title): e.page} for e in entries]} for name, entries in sections(index).items()]
    return [{"I want to ...": "index.md"}, *pages]


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]
