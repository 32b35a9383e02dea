"""`retnet stack` as a user meets it."""

from __future__ import annotations

from functools import partial

import pytest

from retnet.models.cost import parameter_counts
from retnet.models.directory import load_model, save_model
from retnet.stack import load_stack
from retnet.stack.build import model_config
from retnet.stack.presets import preset_names, preset_text
from retnet.stack.resolve import resolve_tokenizer
from tests.cli import command
from tests.small_models import small_model
from tests.stack.specs import BASE

MINI = "arch_intermediate_gemma2_mini"


run = partial(command.run, "stack")


@pytest.fixture
def faulty(tmp_path):
    path = tmp_path / "faulty.yml"
    path.write_text(preset_text(MINI).replace("d_model: 144", "d_model: 146").replace("hf", "fh"))
    return path


def test_validate_lists_all_faults_of_all_files_in_three_lines_each(capsys, faulty):
    assert run("validate", MINI, faulty) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{MINI}: valid, 4 layers\n"
    lines = captured.err.splitlines()
    assert lines[0] == f"{faulty}: 2 faults"
    assert [line.split(" ")[0] for line in lines[1:]] == [
        "ValidationError:",
        "Fix:",
        "See:",
        "",
        "ValidationError:",
        "Fix:",
        "See:",
    ]
    assert lines[1].endswith("(line 6, column 12)")


def test_validate_refuses_a_missing_file(capsys, tmp_path):
    assert run("validate", tmp_path / "absent.yml") == 1
    assert "cannot be read: No such file or directory" in capsys.readouterr().err


def test_report_shows_the_parameters_of_the_built_model_and_the_estimate(capsys):
    assert run("validate", MINI, "--report") == 0
    text = capsys.readouterr().out
    assert "EulerStack's estimate: 1.0M parameters (1,033,632)" in text
    assert "parameters of the built model: 1,033,632 (embedding 37,008, layers 996,624, head 0)" in text
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["1K", "8K", "32K", "128K"]


def test_explain_prints_layers_and_draws_them(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    picture = tmp_path / "stack.svg"
    assert run("explain", MINI, "--picture", picture) == 0
    text = capsys.readouterr().out
    assert [line[:15] for line in text.splitlines()[1:3]] == ["0, 2    local  ", "1, 3    global "]
    assert text.count("GeGLU 432") == 2
    assert "tokens per chunk" not in text
    assert picture.read_text().startswith("<?xml")


def test_explain_and_info_show_multi_token_prediction(capsys, tmp_path):
    path = tmp_path / "mtp.yml"
    head = "type: causal_lm_mtp\n  mtp: {head_template: a, n_predict: 2, head_layers: 3}"
    path.write_text(BASE.replace("type: causal_lm", head))
    assert run("explain", path) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "multi-token prediction: 2 modules, each 3 layers of template a (attention, window 16" in text
    counts = parameter_counts(model_config(load_stack(path)))
    assert f"head 0, mtp {counts['mtp']:,})" in text
    assert command.run("info", path) == 0
    assert f"{counts['mtp']:,} multi-token prediction)" in " ".join(capsys.readouterr().out.split())


def test_explain_tells_the_chunk_size_of_retention_on_this_device(capsys):
    assert run("explain", "arch_advanced_retnet_mini") == 0
    assert "tokens per chunk" in capsys.readouterr().out.splitlines()[-1]


def test_explain_of_a_faulty_file_is_wrong_input(capsys, faulty):
    assert run("explain", faulty) == 2
    assert "ValidationError: model.d_model" in capsys.readouterr().err


def test_compile_writes_a_model_and_its_source(capsys, tmp_path):
    assert run("compile", MINI, "--output-dir", tmp_path / "out") == 0
    model = load_model(tmp_path / "out")
    assert model.config.name == MINI.replace("_", "-")
    assert "1,033,632 parameters" in capsys.readouterr().out
    assert run("source", tmp_path / "out") == 0
    assert capsys.readouterr().out == preset_text(MINI)
    assert run("explain", tmp_path / "out") == 0
    assert "GeGLU 432" in capsys.readouterr().out


def test_compile_leaves_a_trained_model_alone_unless_forced(capsys, tmp_path):
    out = tmp_path / "out"
    assert run("compile", MINI, "-o", out) == 0
    (out / "training.json").write_text("{}")
    (out / "model.safetensors").write_bytes(b"trained")
    message = command.wrong_input(capsys, "stack", "compile", MINI, "-o", out)
    assert f"{out} exists; accepted: a new or empty directory, or --force" in message
    assert (out / "model.safetensors").read_bytes() == b"trained"
    assert run("compile", MINI, "-o", out, "--force") == 0
    assert load_model(out).config.name == MINI.replace("_", "-")
    assert not (out / "training.json").exists(), "the record of the training is of the model that was there"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("notes.txt", "saved model only"),
        ("checkpoint-5", "holds checkpoints"),
        ("trainer_state.json", "holds checkpoints"),
    ],
)
def test_force_replaces_no_directory_of_anything_else(capsys, tmp_path, file, words):
    (tmp_path / file).write_text("mine")
    assert words in command.wrong_input(capsys, "stack", "compile", MINI, "-o", tmp_path, "--force")
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_compile_writes_the_byte_tokenizer_which_transformers_reads(capsys, tmp_path):
    from transformers import AutoTokenizer

    stack = tmp_path / "bytes.yml"
    stack.write_text(BASE)
    assert run("compile", stack, "-o", tmp_path / "out") == 0
    assert "with the byte tokenizer" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [256, 97, 98]
    assert resolve_tokenizer(str(tmp_path / "out")).encode(b"ab") == [97, 98]


def test_compile_writes_another_tokenizer_on_request_and_says_where_it_is_otherwise(capsys, tmp_path):
    from tokenizers import Tokenizer, models

    vocabulary = {"<s>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    stack = tmp_path / "named.yml"
    stack.write_text(BASE.replace("pretrained: bytes", "pretrained: some/model"))
    assert run("compile", stack, "-o", tmp_path / "without") == 0
    assert "without a tokenizer: --tokenizer some/model would fetch the stack's" in capsys.readouterr().out
    assert run("compile", stack, "-o", tmp_path / "with", "--tokenizer", tmp_path / "tokenizer.json") == 0
    assert resolve_tokenizer(str(tmp_path / "with")).encode(b"ab") == [1, 2]
    stack.write_text(BASE.replace("vocab_size: 257", "vocab_size: 2").replace("pretrained: bytes", "pretrained: x"))
    message = command.wrong_input(
        capsys, "stack", "compile", stack, "-o", tmp_path / "small", "--tokenizer", tmp_path / "tokenizer.json"
    )
    assert "has 3 tokens; accepted: at most the stack's 2" in message
    assert not (tmp_path / "small").exists()


def test_a_picture_that_exists_is_not_replaced(capsys, tmp_path):
    picture = tmp_path / "stack.svg"
    picture.write_text("mine")
    message = command.wrong_input(capsys, "stack", "explain", MINI, "--picture", picture)
    assert "stack.svg exists; accepted: another file, or --force" in message
    assert picture.read_text() == "mine"
    assert run("explain", MINI, "--picture", picture, "--force") == 0
    assert picture.read_text().startswith("<?xml")


def test_a_model_that_was_not_compiled_from_a_stack_has_no_source(capsys, tmp_path):
    save_model(small_model(), tmp_path / "plain")
    assert run("source", tmp_path / "plain") == 2
    assert "was not compiled from a stack" in capsys.readouterr().err


def test_presets_are_listed_shown_and_copied(capsys, tmp_path):
    assert run("presets", "list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in preset_names())
    assert run("presets", "show", MINI) == 0
    assert capsys.readouterr().out == preset_text(MINI)
    target = tmp_path / "mine.yml"
    assert run("presets", "copy", MINI, target) == 0
    assert target.read_text() == preset_text(MINI)
    target.write_text("mine")
    assert run("presets", "copy", MINI, target) == 2
    assert "mine.yml exists; accepted: another file, or --force" in " ".join(capsys.readouterr().err.split())
    assert target.read_text() == "mine"
    assert run("presets", "copy", MINI, target, "--force") == 0
    assert target.read_text() == preset_text(MINI)
    assert run("presets", "show", "arch_gemma") == 2
    assert "arch_intermediate_gemma2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["retnet-tiny", "arch_advanced_retnett"])
def test_a_name_that_is_no_stack_says_what_is_accepted(capsys, name):
    assert run("explain", name) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"no stack '{name}'; accepted: a stack file (.yml, .yaml), a stack preset" in message
