"""The documentation site: built strictly, read from its folder without a server or the network."""

from __future__ import annotations

import base64
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dev.site.generated import BEYOND
from dev.site.navigation import sections
from dev.site.staging import Staging
from tests.paths import ROOT
from tests.serve.http.browser import PATIENCE, chromium

# What a browser loads by itself. Links that a reader may follow (<a href>) are not among them.
LOADED = (
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc\s*=\s*[\"']?(?:https?:)?//[^\"' >]+",
    r"<link\b[^>]*?\bhref\s*=\s*[\"']?(?:https?:)?//[^\"' >]+",
    r"url\(\s*[\"']?(?:https?:)?//[^\"')]+",
    r"@import\s+[\"'](?:https?:)?//[^\"']+",
)


def test_the_index_has_the_sections_of_the_site():
    found = sections(ROOT / "docs/index.md")
    assert list(found) == ["Start", "Learn", "Do", "Reference", "Results"]
    pages = [entry.page for entries in found.values() for entry in entries]
    assert len(pages) == len(set(pages))


@pytest.mark.parametrize("name", BEYOND)
def test_every_name_of_the_api_page_exists_and_is_documented(name):
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute).__doc__


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def staged(folder: Path, page: str) -> dict[str, str]:
    """The texts of the staged pages, from a repository with one page, one test and one folder."""
    write(
        folder / "root", **{"docs__do__page.md": page, "tests__test_a.py": "import x\n\n\ndef test_it():\n    pass\n"}
    )
    (folder / "root/recipes").mkdir()
    Staging(folder / "root", folder / "out").all_pages()
    return {str(path.relative_to(folder / "out")): path.read_text() for path in (folder / "out").rglob("*.md")}


def test_a_link_out_of_the_pages_leads_to_a_page_with_the_file(tmp_path):
    pages = staged(tmp_path, "[the `a` test](../../tests/test_a.py) `[b](c.md)`\n\n```\n[d](e.md)\n```\n")
    assert pages["do/page.md"].startswith("[the `a` test](../files/tests/test_a.py.md) `[b](c.md)`")
    assert "[d](e.md)" in pages["do/page.md"]
    assert "```python\nimport x" in pages["files/tests/test_a.py.md"]


def test_a_link_with_the_name_of_a_test_leads_to_its_line(tmp_path):
    pages = staged(tmp_path, '[yes](../../tests/test_a.py "test_it")')
    assert pages["do/page.md"] == "[yes](../files/tests/test_a.py.md#__codelineno-0-4)"


def test_a_link_to_a_folder_becomes_its_text(tmp_path):
    assert staged(tmp_path, "see [recipes](../../recipes).")["do/page.md"] == "see recipes."


def test_a_notebook_becomes_a_page_with_its_texts_code_and_outputs(tmp_path):
    picture = base64.b64encode(b"a picture").decode()
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": picture, "text/plain": ["<Figure>"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "see [the page](../docs/do/page.md)"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": outputs},
        {"cell_type": "code", "source": [], "outputs": []},
        {"cell_type": "code", "source": ["draw()"], "outputs": [], "metadata": {"tags": ["hide-input"]}},
    ]
    write(tmp_path / "root", **{"notebooks__n.ipynb": json.dumps({"cells": cells})})
    pages = staged(tmp_path, "[it](../../notebooks/n.ipynb)")
    assert pages["do/page.md"] == "[it](../files/notebooks/n.ipynb.md)"
    page = pages["files/notebooks/n.ipynb.md"]
    assert "[the page](../../do/page.md)" in page
    assert "```python\nprint(1)\n```\n\n```text\none\ntwo\n```" in page
    assert "<summary>Code of the picture</summary>\n\n```python\ndraw()\n```" in page
    assert 'src="n.ipynb-1.png"' in page
    assert (tmp_path / "out/files/notebooks/n.ipynb-1.png").read_bytes() == b"a picture"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("[x](../missing.png)", "links ../missing.png, which does not exist"),
        ('[x](../../tests/test_a.py "test_b")', "has no function test_b"),
        ("[x](../../../out.md)", "does not exist"),
        ("<!-- generated: nothing -->", "generated: nothing; accepted: command-line, stack-schema, api"),
    ],
)
def test_a_page_that_cannot_be_built_is_named(tmp_path, page, said):
    (tmp_path / "out.md").write_text("outside of the repository")
    with pytest.raises(ValueError, match=re.escape(said)):
        staged(tmp_path, page)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("zensical", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "dev.site", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_no_page_loads_anything_from_outside(site):
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".svg")]
    assert len(files) > 20
    found = {
        f"{file.relative_to(site)}: {hit[0]}"
        for file in files
        for pattern in LOADED
        for hit in re.finditer(pattern, file.read_text(), re.IGNORECASE)
    }
    assert found == set()


@pytest.mark.slow
def test_the_reference_has_every_command_key_and_public_name(site):
    import typer

    from retnet import _EXPORTS
    from retnet.cli import app

    commands = (site / "reference/command_line.html").read_text()
    for name in typer.main.get_command(app).commands:
        assert f'id="retnet-{name}"' in commands
    api = (site / "reference/api.html").read_text()
    for name, module in _EXPORTS.items():
        assert f'id="{module}.{name}"' in api
    assert [name for name in BEYOND if f'id="{name}"' not in api] == []
    schema = (site / "reference/stack_schema.html").read_text()
    for key in ("schema_version", "vendor.retnet.decay", "rope_scaling", "capacity_drop_policy"):
        assert f"<code>{key}</code>" in schema


@pytest.mark.slow
def test_llms_txt_lists_every_page_and_its_markdown_exists(site):
    text = (site / "llms.txt").read_text()
    assert text.startswith("# retnet\n\n> ")
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\): ", text, re.MULTILINE)
    assert listed == [entry.page for entries in sections(ROOT / "docs/index.md").values() for entry in entries]
    whole = (site / "llms-full.txt").read_text()
    for page in listed:
        assert (site / page).read_text() in whole
    assert "<!-- generated" not in whole


@pytest.mark.slow
def test_pages_open_offline_search_answers_and_formulas_and_dark_mode_are_drawn(site):
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark", offline=True)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("request", lambda request: request.url.startswith("http") and faults.append(request.url))

        page.goto(f"file://{site}/index.html")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 80, background
        page.keyboard.press("/")
        page.keyboard.type("short convolution")
        page.get_by_text("Short convolution").first.wait_for()

        page.goto(f"file://{site}/learn/math.html")
        formulas = page.locator("math")
        assert formulas.count() > 5
        boxes = [formulas.nth(n).bounding_box() for n in range(formulas.count())]
        assert all(box and box["width"] > 5 and box["height"] > 5 for box in boxes)
        assert "\\(" not in page.locator("article").inner_text()

        page.set_viewport_size({"width": 390, "height": 844})
        page.goto(f"file://{site}/reference/works_with.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # wide tables scroll inside themselves
        page.locator("article td a").first.click()
        page.wait_for_url("**/files/tests/**")
        assert faults == []
        context.close()
