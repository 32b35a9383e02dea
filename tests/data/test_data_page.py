"""The commands and code of docs/do/data.md run, and print what the page shows."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

from retnet.cli import main
from tests.paths import ROOT

PAGE = (ROOT / "docs/do/data.md").read_text(encoding="utf-8")


def test_commands_and_code_of_the_page_run(tmp_path, monkeypatch, tokenizer_file, articles):
    monkeypatch.chdir(tmp_path)
    for folder in ("wiki", "gpt2"):
        (tmp_path / folder).mkdir()
    (tmp_path / "wiki/train.txt").write_text("\n\n\n".join(articles), encoding="utf-8")
    shutil.copyfile(tokenizer_file, "gpt2/tokenizer.json")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^\$ retnet (data .*)$", PAGE, re.MULTILINE)]
    assert [words[1] for words in commands] == ["wiki/train.txt", "show", "check"]
    for words in commands:
        with pytest.raises(SystemExit) as done:
            main(words)
        assert not done.value.code
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(code.replace("2048", "200"), "data.md", "exec"), names)
    assert names["rows"].row(5, epoch=3)["input_ids"].shape == (200,)
