"""The words that a new user reads: suggestions for mistyped names, tables that explain themselves, the prompt."""

from __future__ import annotations

import importlib
import sys

import pytest
from rich.console import Console

from retnet.cli._common import printable
from retnet.models.presets import PRESETS
from tests.cli.command import run, wrong_input

HINT = "--debug"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["info", "retnet-tiyn"], "retnet-tiny"),
        (["info", "arch_begginer_llama"], "arch_beginner_llama"),
        (["stack", "validate", "arch_begginer_llama"], "arch_beginner_llama"),
        (["stack", "presets", "show", "arch_begginer_llama"], "arch_beginner_llama"),
        (["data", "show", "stdlb"], "stdlib"),
        (["data", "stdlib", "OUT", "--tokenizer", "bytes.json"], "bytes"),
        (["train", "data=stdlib", "model=retnet-tiny", "eval_strategy=step"], "steps"),
        (["check", "operator", "--dtype", "flaot32"], "float32"),
        (["check", "operator", "--device", "cdua"], "cuda"),
        (["convert", "nothing", "OUT", "--to", "flaa"], "fla"),
        (["tune", "--heads", "64x64", "--dtype", "bf16"], "bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_mistyped_name_is_answered_with_the_nearest_and_no_hint(capsys, tmp_path, monkeypatch, words, meant):
    monkeypatch.chdir(tmp_path)
    message = wrong_input(capsys, *words)
    assert f"did you mean {meant!r}?" in message
    assert HINT not in message


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["trian"], "train"), (["evall"], "eval"), (["stack", "expalin"], "explain"), (["data", "chekc", "x"], "check")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_mistyped_verb_or_option_is_answered_with_the_nearest(capsys, words, meant):
    assert f"Did you mean '{meant}'?" in wrong_input(capsys, *words)
    assert "Possible options: --device" in wrong_input(capsys, "check", "operator", "--devcie", "cpu")


def test_a_mistyped_path_is_answered_with_its_neighbour(capsys, tmp_path, monkeypatch, byte_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(byte_model)
    (tmp_path / "notes.txt").write_text("some text")
    assert "did you mean 'demo'?" in wrong_input(capsys, "info", "dmeo")
    assert "did you mean 'notes.txt'?" in wrong_input(capsys, "check", "demo", "--text", "ntoes.txt")


def test_only_an_error_of_another_library_is_followed_by_the_debug_hint(capsys, monkeypatch):
    from retnet.stack import resolve

    assert HINT not in wrong_input(capsys, "info", "nothing")
    monkeypatch.setattr(resolve, "resolve_config", lambda name: importlib.import_module("json").loads("{"))
    assert HINT in wrong_input(capsys, "info", "nothing")


def test_the_server_says_that_it_does_not_run_on_windows(capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "accepted on Windows: Linux in WSL 2" in wrong_input(capsys, "serve", "retnet-tiny")


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_device_without_kernels_is_refused(capsys, byte_model, device):
    message = wrong_input(capsys, "generate", byte_model, "x", "--device", device)
    assert f"device is '{device}', which has no kernels here; accepted: auto, cpu, cuda" in message


def test_info_without_a_model_lists_the_presets_with_their_sizes(capsys, monkeypatch):
    from retnet.models import presets

    few = {name: make for name, make in PRESETS.items() if name.startswith("retnet-tiny")}
    monkeypatch.setattr(presets, "PRESETS", few)
    assert run("info") == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
    assert set(few) <= set(lines)
    assert lines["retnet-tiny"] == ["3,064,032", "648", "KiB"]
    assert "no model" in wrong_input(capsys, "info", "--json")


def test_stack_presets_are_listed_with_their_sizes(capsys, monkeypatch):
    from retnet.stack import presets

    monkeypatch.setattr(presets, "preset_names", lambda: ("arch_beginner_llama_mini",))
    assert run("stack", "presets", "list") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "arch_beginner_llama_mini 787,712 8 MiB" in text
    assert "retnet train model=NAME" in text


def test_check_says_what_the_limit_bounds_and_that_other_tokens_are_not_judged(capsys, byte_model):
    assert run("check", byte_model, "--length", 20, "--dtype", "bfloat16", "--chunk-size", 4) == 0
    text = capsys.readouterr().out
    assert "which the limit bounds" in text
    assert "reported, not judged" in text
    assert "/20\n" in text
    assert "…" not in text  # nothing is cut at 80 columns
    assert run("check", "operator", "--length", 20, "--dtype", "float64", "--chunk-size", 4) == 0
    assert "judged" not in capsys.readouterr().out


def test_eval_says_how_to_read_its_table(capsys, byte_model, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("for x in range(10): print(x)\n")
    assert run("eval", byte_model, "--data", tmp_path, "--valid-fraction", 0.5) == 0
    text = capsys.readouterr().out
    assert "lower is better; gzip and xz copy what the scored text repeats" in text
    assert "order-2 bytes: predicts a byte from the two before it" in text
    assert run("eval", byte_model, "--data", tmp_path, "--part", "all") == 0
    assert "order-2" not in capsys.readouterr().out  # it has no training documents, and no row


class TestPrompt:
    """`generate` shows the prompt on a terminal, or if it is asked for."""

    WORDS = ("--max-tokens", 5, "--seed", 0, "--no-stats")

    def output(self, capsys: pytest.CaptureFixture[str], model: object, prompt: str, *more: object) -> str:
        assert run("generate", model, prompt, *self.WORDS, *more) == 0
        return capsys.readouterr().out

    def on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("retnet.cli.generate")
        terminal = Console(force_terminal=True, color_system="standard", width=20)
        monkeypatch.setattr(module, "console", terminal)

    def test_a_pipe_gets_the_output_alone_unless_it_asks_for_both(self, capsys, byte_model):
        alone = self.output(capsys, byte_model, "def f(")
        assert not alone.startswith("def f(")
        assert self.output(capsys, byte_model, "def f(", "--echo") == "def f(" + alone

    def test_a_terminal_shows_it_dimmed_and_not_wrapped(self, capsys, byte_model, monkeypatch):
        prompt = "def a_name_longer_than_the_terminal("
        alone = self.output(capsys, byte_model, prompt)
        self.on_a_terminal(monkeypatch)
        assert self.output(capsys, byte_model, prompt) == f"\x1b[2m{prompt}\x1b[0m{printable(alone)}"
        assert self.output(capsys, byte_model, prompt, "--no-echo") == printable(alone)

    def test_what_a_model_writes_does_not_control_the_terminal(self, capsys, byte_model, monkeypatch):
        monkeypatch.setattr("retnet.api.stream_text", lambda *given: iter(["\x1b[2Jcleared\r\n", "\x9b2J\tso"]))
        assert self.output(capsys, byte_model, "x") == "\x1b[2Jcleared\r\n\x9b2J\tso\n"
        self.on_a_terminal(monkeypatch)
        assert self.output(capsys, byte_model, "x", "--no-echo") == "\ufffd[2Jcleared\ufffd\n\ufffd2J\tso\n"

    def test_a_terminal_shows_the_end_of_a_long_one(self, capsys, byte_model, monkeypatch):
        module = importlib.import_module("retnet.cli.generate")
        monkeypatch.setattr(module, "LONGEST_ECHO", 10)
        self.on_a_terminal(monkeypatch)
        prompt = "a[bold]" * 5
        assert f"...{prompt[-10:]}\x1b[0m" in self.output(capsys, byte_model, prompt)
        assert prompt in self.output(capsys, byte_model, prompt, "--echo")
