"""The README is true: its examples run, its output looks as shown, its links and commands exist; it is short."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli import command
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHECKED = "all # agree"  # the last line of `retnet check`


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def blocks(text: str, language: str) -> list[str]:
    fenced = text.split("```")[1::2]
    return [block.partition("\n")[2] for block in fenced if block.partition("\n")[0] == language]


@pytest.fixture
def demo(tmp_path, monkeypatch, byte_model) -> Path:
    """A folder with a small model in the place of the one that `make demo` trains."""
    shutil.copytree(byte_model, tmp_path / "out/demo")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", blocks(README, "python"), ids=["text", "operator"])
def test_the_python_examples_run(code, demo, capsys):
    exec(compile(code, "README.md", "exec"), {})


def test_the_example_of_text_has_twelve_lines():
    assert len(blocks(README, "python")[0].splitlines()) <= 12


def skeleton(line: str) -> str:
    """A line of output without its numbers and units of bytes, since they differ between machines and models."""
    line = re.sub(r"\d[\d,.]*(e[-+]\d+)?", "#", line)
    return " ".join(re.sub(r"\b[KMG]iB\b", "iB", line).split())


def shown() -> set[str]:
    """The lines of output in the README, without those that stand for others."""
    (block,) = (block for block in blocks(README, "") if CHECKED in skeleton(block))
    return {skeleton(line) for line in block.splitlines()} - {"..."}


def test_the_output_of_the_demo_still_looks_as_shown(demo, capsys):
    texts = demo / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / name).write_text("for x in range(10): print(x)\n" * 9)
    assert command.run("eval", "out/demo", "--data", texts, "--valid-fraction", 0.5) == 0
    assert command.run("generate", "out/demo", "def ", "--max-tokens", 150, "--seed", 0) == 0
    chunked = ("--dtype", "float64", "--dtype", "float32", "--dtype", "bfloat16", "--chunk-size", 16)
    assert command.run("check", "out/demo", "--text", "README.md", "--length", 20, *chunked) == 0
    output = "".join(capsys.readouterr()).replace(str(texts), "stdlib")
    lines = {skeleton(line) for line in output.splitlines()}
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    lines |= {skeleton(line) for line in re.findall(r'@echo "(.*)"', makefile)}
    assert shown() - lines == set()


def test_the_tree_lists_every_package_and_only_existing_folders():
    (tree,) = (block for block in blocks(CONTRIBUTING, "") if block.startswith("retnet/\n"))
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
