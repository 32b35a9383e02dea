"""Commands on the pages that no test runs, because they take long or need other machines, are spelt right."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from retnet.cli import app
from tests.docs.test_workflows import NEEDS
from tests.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages with python, console or bash blocks that tests elsewhere run.
ELSEWHERE = {
    "do/data": "tests/data/test_data_page.py",
    "do/serve": "tests/docs/test_serve.py",
    "reference/stack": "tests/stack/test_stack_guide.py",
}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The language and the text of every fenced block."""
    for block in page.read_text().split("```")[1::2]:
        language, _, code = block.partition("\n")
        yield language, code


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `retnet` command in a block."""
    for _, code in blocks(page):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.removeprefix("$ ").startswith("retnet ") else []
            if words:
                yield words[words[0] == "$" :]


def test_every_page_with_code_is_run_by_a_test():
    ran = {*NEEDS, *ELSEWHERE}
    for page in (ROOT / "docs").rglob("*.md"):
        languages = {language for language, _ in blocks(page)} & {"python", "console", "bash", "yaml"}
        name = str(page.relative_to(ROOT / "docs").with_suffix(""))
        assert not languages or name in ran, f"{page} has blocks of {languages}"
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


def test_every_command_has_the_options_that_it_is_given():
    found, root = 0, typer.main.get_command(app)
    for page in PAGES:
        for words in commands(page):
            command, rest = root, words[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            while rest and (inner := getattr(command, "commands", {})):
                name = rest[0] if rest[0] in inner else "write"  # of `retnet data IN OUT`
                if name not in inner:
                    assert rest[0].startswith("-"), f"{page.relative_to(ROOT)}: no verb {rest[0]}"  # retnet --version
                    break
                command, rest = inner[name], rest[1:] if name == rest[0] else rest
                known |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            for option in (word.split("=")[0] for word in rest if word.startswith("--")):
                assert option in known | {"--help"}, f"{page.relative_to(ROOT)}: {shlex.join(words)}"
            found += 1
    assert found > 30


def test_every_setting_of_training_is_known():
    transformers = pytest.importorskip("transformers")
    from retnet.train.recipe import Recipe

    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)} | set(Recipe.model_fields)
    keys = set()
    for page in PAGES:
        for _, code in blocks(page):
            for line in code.replace("\\\n", " ").splitlines():
                command = line.split(" #")[0]
                if re.search(r"retnet(\.cli)? train ", command):
                    keys |= set(re.findall(r"(?<=[\s'])([a-z_0-9]+)=", command.split("train ", 1)[1]))
    assert len(keys) > 10
    assert keys <= known
