"""Every cell of docs/reference/works_with.md links an existing test."""

from __future__ import annotations

import re

from tests.paths import ROOT

PAGE = ROOT / "docs/reference/works_with.md"
TEXT = PAGE.read_text()


def test_every_cell_links_an_existing_test():
    rows = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for _, *cells in rows:
        assert cells[0].strip(), "a row without any test"
        for cell in filter(None, map(str.strip, cells)):
            found = re.fullmatch(r'\[(?:yes|refused)\]\((\S+) "(\w+)"\)', cell)
            assert found, cell
            file, name = found.groups()
            assert re.search(rf"^def {name}\(", (PAGE.parent / file).read_text(), re.MULTILINE), cell
