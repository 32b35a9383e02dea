"""The help: every verb has an example, and every example runs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text

from retnet.cli import app
from retnet.cli.diagnosis import child
from retnet.cli.help_text import all_examples, example_of, short_help
from retnet.models import presets
from retnet.models.directory import load_model, save_model
from tests.cli.command import run
from tests.paths import ROOT
from tests.stack.specs import BASE
from tests.train.distil.models import teacher

COMMAND = typer.main.get_command(app)
EXAMPLES = dict(all_examples(COMMAND))
# What a test runs instead, where the example takes minutes or does not end.
SHORTER = {
    "max_steps=1000": "max_steps=2 length=16 num_samples=0",
    "arch_expert_research_mini": "small.yml",
    "--keep-attention 4": "max_steps=2 length=16 num_samples=0 --keep-attention 1",
}
SLOW = ("retnet train", "retnet distil")


def test_every_verb_has_an_example_that_begins_with_the_verb():
    assert len(EXAMPLES) >= 20
    for verb, example in EXAMPLES.items():
        assert example is not None, verb
        if verb not in ("retnet data write", "retnet data", "retnet stack", "retnet stack presets"):
            assert example == verb or example.startswith(f"{verb} ")


def test_help_shows_the_verbs_by_panel_with_their_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for panel in ("Train and evaluate", "Generate and serve", "Models", "This machine"):
        assert f"─ {panel} ─" in text
    for verb, command in COMMAND.commands.items():  # type: ignore[attr-defined]
        assert f"{verb} " in text
        assert example_of(command.help) in text


def test_markup_in_an_example_is_text():
    def verb():
        """Do [something].

        Example: retnet verb '[bold]'
        """

    shown = Text.from_markup(short_help(verb)).plain
    assert shown == "Do [something].\nretnet verb '[bold]'"
    assert short_help("Only this.") == "Only this."


@pytest.fixture
def folder(tmp_path, monkeypatch, byte_model, text_folder) -> Path:
    """A folder with everything that the examples name; the presets in it are small."""
    monkeypatch.chdir(tmp_path)
    small = load_model(byte_model)
    monkeypatch.setitem(presets.PRESETS, "retnet-tiny", lambda: small.config)
    shutil.copytree(text_folder, "my/texts")
    shutil.copytree(byte_model, "out/demo")
    Path("wiki.txt").write_text("one text\n\n\nanother text\n\n\n" * 50)
    Path("small.yml").write_text(BASE)
    shutil.copy("small.yml", "my-stack.yml")
    shutil.copytree(byte_model, "downloads/retnet-1.3B-100B")
    return tmp_path


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of a few merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(["one text, another text"] * 10, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def words_of(example: str) -> list[str]:
    """The arguments of an example, shortened; without the redirection of its output."""
    for long, short in SHORTER.items():
        example = example.replace(long, short)
    return shlex.split(example.partition(" > ")[0])[1:]


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=pytest.mark.slow) if verb in SLOW else verb for verb in EXAMPLES]
)
def test_every_example_runs(folder, capsys, monkeypatch, verb):
    example = EXAMPLES[verb]
    assert example is not None
    expected = 0
    if verb == "retnet serve":  # which does not end
        monkeypatch.setattr("retnet.serve.http.run.serve", lambda *arguments: 0)
    if verb == "retnet chat":
        monkeypatch.setattr("sys.stdin", (folder / "wiki.txt").open())
        (folder / "wiki.txt").write_text("")
    if verb == "retnet doctor":  # its checks have their own tests
        monkeypatch.setattr(child, "findings_of", lambda *arguments: iter(()))
    if verb == "retnet tune":  # it measures a GPU
        expected = 2
    if verb == "retnet distil":
        save_model(teacher(2), folder / "my-llama")
    if "gpt2/tokenizer.json" in example:
        write_tokenizer(folder / "gpt2")
    if "tokens/wiki" in example and verb in ("retnet data show", "retnet data check"):
        assert run("data", "wiki.txt", "tokens/wiki") == 0
    if verb == "retnet data merge":
        assert run("data", "wiki.txt", "tokens/wiki", "--shard", "1/1") == 0
    if "my-model" in example and verb == "retnet stack source":
        assert run("stack", "compile", "small.yml", "--output-dir", "my-model") == 0
    if verb == "retnet stack presets copy":
        (folder / "my-stack.yml").unlink()
    assert run(*words_of(example)) == expected, capsys.readouterr()
    if expected:
        assert "no CUDA device" in capsys.readouterr().err


def completed(line: str, cwd: Path) -> list[str]:
    """What bash is offered for a line, as the installed script asks for it."""
    environment = os.environ | {
        "_RETNET_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - (not line.endswith(" "))),
    }
    words = [sys.executable, "-m", "retnet.cli"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=cwd, timeout=60)
    return done.stdout.split()


def test_a_shell_completes_verbs_and_options_without_torch(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert completed("retnet t", ROOT) == ["train", "tune"]
    assert "--max-tokens" in completed("retnet generate --max-t", ROOT)
    assert completed("retnet data sh", ROOT) == ["show"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_is_printed_offline(shell, monkeypatch):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "_RETNET_COMPLETE": f"source_{shell}"}
    words = [sys.executable, "-m", "retnet.cli"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)
    assert "_RETNET_COMPLETE" in done.stdout
