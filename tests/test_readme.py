"""The README is true: its Python examples run; its tree, links and commands exist; it is short."""

from __future__ import annotations

import re

import pytest

from tests.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_the_readme_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def blocks(language: str) -> list[str]:
    fenced = README.split("```")[1::2]
    return [block.partition("\n")[2] for block in fenced if block.partition("\n")[0] == language]


@pytest.mark.parametrize("code", blocks("python"), ids=["model", "operator"])
def test_the_python_examples_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_tree_lists_every_package_and_only_existing_folders():
    (tree,) = (block for block in blocks("") if block.startswith("retnet/\n"))
    folder = ROOT
    for line in tree.splitlines():
        if line.startswith("     "):  # the description continues
            continue
        name = line.split()[0]
        folder = ROOT / "retnet" if line.startswith("  ") else ROOT
        assert (folder / name).exists(), name
    packages = {path.name + "/" for path in (ROOT / "retnet").iterdir() if (path / "__init__.py").exists()}
    assert packages <= {line.split()[0] for line in tree.splitlines()}


def test_every_link_leads_to_a_file():
    headings = (line.lstrip("# ").lower() for line in README.splitlines() if line.startswith("## "))
    anchors = {re.sub(r"[^a-z ]", "", heading).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_verb_and_make_target_exists():
    from retnet.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"^retnet (\w+) ", README, re.MULTILINE)) <= names
    targets = set(re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets
