"""Every code block of the workflow pages runs, in order, in one namespace per page."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retnet.cli import main
from retnet.models import convert
from retnet.models.directory import save_model
from retnet.models.lm import LanguageModel
from tests.paths import ROOT

NEEDS = {
    "start/five_minutes": [],
    "start/choose": [],
    "learn/three_forms": [],
    "learn/states": [],
    "learn/decay": [],
    "learn/hybrids": [],
    "do/long_context": [],
    "do/memory": [],
    "do/engine": [],
    "do/convert": [],
    "do/lora": ["peft", "trl"],
    "do/chat": [],
    "do/classify": [],
    "do/evaluate": ["lm_eval"],
    "do/export": ["onnxruntime", "onnxscript"],
}
SLOW = (
    "do/chat",
    "do/classify",
    "start/five_minutes",
    "learn/hybrids",
    "do/long_context",
    "do/memory",
    "do/evaluate",
    "do/export",
)
FLA_CONFIG = {
    "model_type": "retnet",
    "hidden_size": 32,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 61,
}
# What takes minutes on a page is cut short in its test.
SHORTER = {"max_steps=80": "max_steps=2 data=TEXT length=64", "data=stdlib": "data=TEXT"}
SERVES = ("start/five_minutes",)  # their bash blocks start a server, which tests/docs/test_serve.py does
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
"""


@pytest.fixture
def names(byte_model, tmp_path) -> dict:
    """The names that the pages use without defining them."""
    from retnet.models.hf.tokenizer import byte_tokenizer

    directory = tmp_path / "given"
    directory.mkdir()
    for file in byte_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    save_model(LanguageModel(convert.fla.config_of(FLA_CONFIG)), tmp_path / "as-fla")
    convert.convert(tmp_path / "as-fla", tmp_path / "downloaded", to="fla")
    byte_tokenizer().save_pretrained(directory)
    (tmp_path / "text.txt").write_text(" the state decays \n a token is read \n" * 4)
    for folder in ("recipes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/demo").symlink_to(directory)
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"question": q}) for q in ("Is it so?", "Is it?")))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    return {
        "directory": str(directory),
        "downloaded": str(tmp_path / "downloaded"),
        "file": str(tmp_path / "text.txt"),
        "texts": [f"text {i} of a state that decays" for i in range(24)],
        "prompt": torch.tensor([[5, 6, 7]]),
    }


def run_in_shell(command: str, names: dict, tmp_path: Path) -> None:
    """Run a line of a console block: `retnet` in this process, `python` in a new one without torch."""
    given = {"MODEL": names["directory"], "TEXT": names["file"], "TASKS": str(tmp_path / "tasks")}
    given["README.md"] = names["file"]
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    command = re.sub(rf"\b({'|'.join(given)})\b", lambda match: given[match[0]], command)
    program, *arguments = shlex.split(command)
    if program == "retnet":
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert not exit_.value.code
    else:
        assert program == "python"
        script, *arguments = arguments
        blocked = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; "
        code = blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"
        command_line = [sys.executable, "-c", code, str(ROOT / script), *arguments]
        result = subprocess.run(command_line, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in NEEDS]
)
def test_every_block_of_a_page_runs(page, names, tmp_path, monkeypatch, capsys):
    for package in NEEDS[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    fenced = (ROOT / "docs" / f"{page}.md").read_text().split("```")[1::2]
    ran = 0
    for block in fenced:
        language, _, code = block.partition("\n")
        if language == "python":
            exec(compile(code, f"docs/{page}.md", "exec"), names)
        elif language == "bash":
            assert page in SERVES
        else:
            assert language == "console"
            for line in code.splitlines():
                run_in_shell(line.removeprefix("$ "), names, tmp_path)
        ran += 1
    assert ran >= 1


def test_examples_are_short():
    examples = list((ROOT / "examples").glob("*.py"))
    assert examples
    for example in examples:
        assert len(example.read_text().splitlines()) <= 60, example
