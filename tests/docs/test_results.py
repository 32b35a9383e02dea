"""Every table and picture of docs/results has the command that makes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import ROOT

PAGES = sorted((ROOT / "docs/results").glob("*.md"))
SCRIPT = re.compile(r"(?:benchmarks|recipes)/[\w/]+\.(?:py|yaml)")

COMMAND = re.compile(SCRIPT.pattern + r"|\b(?:make|retnet) [a-z]+")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_and_picture_has_its_command(page: Path):
    head, *parts = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    scripts = set(SCRIPT.findall(page.read_text()))
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    for part in parts:
        if re.search(r"^\||^!\[", part, re.MULTILINE) and not COMMAND.search(head):
            assert COMMAND.search(part), f"{page.name}: {part.splitlines()[0]}"
