"""The command line as a user meets it: exit codes, one message for wrong input, a traceback only on demand."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import retnet
import retnet.api
from retnet.cli import main
from retnet.models.directory import load_model, save_model
from retnet.serve.engine import Engine
from retnet.system.extras import LIBRARIES
from tests.cli.command import run, wrong_input
from tests.paths import ROOT
from tests.small_models import ALIBI, BYTES, MTP, PAPER, small_model


def test_help_names_every_verb(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("train", "generate", "check", "info", "eval"))


def test_the_module_runs_like_the_command():
    words = [sys.executable, "-m", "retnet.cli", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("retnet ")


@pytest.mark.parametrize("words", [["info"], ["check"], ["generate", "--file", __file__]])
def test_an_unknown_model_is_refused_with_what_is_accepted(capsys, words):
    message = wrong_input(capsys, *words, "retnet-tinny")
    assert "no model 'retnet-tinny'" in message
    assert "did you mean 'retnet-tiny'?" in message
    assert len(message) < 250  # the presets are in `retnet info`, not in the message


@pytest.mark.parametrize("words", [["info"], ["check"], ["generate", "--file", __file__]])
def test_a_directory_without_a_model_is_refused(capsys, tmp_path, words):
    assert "it has no config.json" in wrong_input(capsys, *words, tmp_path)


def test_a_model_of_another_type_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is of model_type 'llama'" in wrong_input(capsys, "info", tmp_path)


def test_damaged_weights_are_refused(capsys, tmp_path, byte_model):
    (tmp_path / "config.json").write_bytes((byte_model / "config.json").read_bytes())
    weights = (byte_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "damaged" in wrong_input(capsys, "generate", tmp_path, "text")


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(FileNotFoundError, match="no model 'nothing'"):
        main(["--debug", "info", "nothing"])


def test_info_counts_the_parameters_of_the_saved_weights(capsys, byte_model):
    from retnet.models.directory import load_model

    assert run("info", byte_model, "--json", "--context", 100, "--context", 1000) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == sum(p.numel() for p in load_model(byte_model).parameters())
    first, second = facts["contexts"]
    assert first["state_bytes"] == second["state_bytes"] > 0
    assert second["transformer_cache_bytes"] == 10 * first["transformer_cache_bytes"]
    assert [len(windows) for windows in facts["windows"]] == [2, 2]
    assert facts["window_layers"] == [0, 1]


def test_info_numbers_the_layers_of_retention_by_their_places(capsys, tmp_path):
    other = replace(PAPER, mixer=replace(PAPER.mixer, decay="none"))
    save_model(small_model((ALIBI, PAPER, other, ALIBI, PAPER, PAPER), **BYTES), tmp_path / "m")
    assert run("info", tmp_path / "m") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("windows of")]
    assert lines == [
        "windows of layers 1, 4 to 5, tokens: 146, 293",
        "windows of layer 2, tokens: no decay, no decay",
    ]
    assert run("info", tmp_path / "m", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["window_layers"] == [1, 2, 4, 5]
    assert len(facts["windows"]) == 4


def test_a_picture_of_info_or_generate_that_exists_is_not_replaced(capsys, tmp_path, byte_model):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"mine")
    for words in (["info", byte_model], ["generate", byte_model, "a", "--max-tokens", "2"]):
        assert "a.png exists; accepted: another file, or --force" in wrong_input(capsys, *words, "--png", picture)
        assert picture.read_bytes() == b"mine"
    assert run("info", byte_model, "--png", picture, "--force") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_samples_of_an_evaluation_that_exist_are_not_replaced(capsys, tmp_path, byte_model):
    file = tmp_path / "samples.jsonl"
    file.write_text("of another model")
    message = wrong_input(capsys, "eval", byte_model, "--tasks", "arc_easy", "--samples", file)
    assert "samples.jsonl exists; accepted: another file, or --force" in message
    assert file.read_text() == "of another model"


def test_generate_promises_flat_memory_of_the_layers_that_have_it_only(capsys):
    assert run("generate", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "where every layer is retention, Mamba or attention with a window" in text
    assert "The cache of attention without a window grows with every token" in text


@pytest.mark.parametrize(
    "model", ["retnet-tiny", pytest.param("retnet-tiny-gated", marks=pytest.mark.slow), "retnet-6.7b"]
)
def test_info_prints_and_draws_presets_of_any_size(capsys, tmp_path, model):
    picture = tmp_path / "pictures" / "info.png"
    assert run("info", model, "--png", picture) == 0
    text = capsys.readouterr().out
    assert "retention on cpu: 64 tokens per chunk" in text
    assert model in text
    assert "1,048,576" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_generate_streams_text_and_reports_time_and_memory(capsys, byte_model, tmp_path):
    picture = tmp_path / "stream.png"
    words = ("generate", byte_model, "def f(", "--max-tokens", 40, "--seed", 3)
    assert run(*words, "--png", picture) == 0
    first = capsys.readouterr()
    assert len(first.out) > 10
    assert "tokens/s" in first.err
    assert "throughout" in first.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run(*words, "--no-stats") == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err == ""


def test_generate_drafts_with_the_modules_of_the_model(capsys, tmp_path):
    save_model(small_model(mtp=MTP, **BYTES), tmp_path)
    outputs = []
    for words in ((), ("--speculate", 3), ("--speculate", 3, "--drafts", "context")):
        assert run("generate", tmp_path, "def f(", "--max-tokens", 20, "--seed", 3, *words) == 0
        captured = capsys.readouterr()
        outputs.append(captured.out)
        assert ("draft tokens accepted (" in captured.err) == bool(words) or "context" in words
    assert outputs[1] == outputs[2] == outputs[0]
    assert run("generate", tmp_path, "def f(", "--speculate", 3, "--drafts", "modules") == 2
    assert "drafts is 'modules'; accepted: auto, mtp, context" in capsys.readouterr().err


def test_generate_starts_from_a_state(capsys, byte_model, tmp_path):
    from retnet.models.directory import load_model
    from tests.models.test_initial_state import start_of

    file, words = tmp_path / "state.safetensors", ("--max-tokens", 12, "--temperature", 0, "--no-stats")
    start_of(load_model(byte_model)).save(file)
    texts = []
    for prompt, more in (("", ()), ("", ("--state", file)), ("def f(", ("--state", file))):
        assert run("generate", byte_model, prompt, *more, *words) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 3
    message = wrong_input(capsys, "generate", "retnet-tiny", "x", "--state", file)
    assert "the snapshot is of another model" in message
    assert "no snapshot at" in wrong_input(capsys, "generate", byte_model, "x", "--state", tmp_path / "missing")


def test_the_reported_size_of_a_growing_state_counts_the_tokens_of_the_text_that_is_continued(capsys, tmp_path):
    from retnet.models.directory import save_model
    from retnet.serve.engine import Engine
    from retnet.serve.request import Request
    from retnet.system.sizes import parse_bytes
    from tests.small_models import ALIBI, BYTES, prompt, small_model

    model, file = small_model([ALIBI], **BYTES), tmp_path / "state.safetensors"
    save_model(model, tmp_path / "model")
    engine = Engine(model, num_slots=1, max_tokens=1500)
    earlier = engine.submit(Request(prompt(1000), 1, keep_state=True))
    engine.run()
    earlier.snapshot.save(file)
    sizes = []
    for more in ((), ("--state", file)):
        assert run("generate", tmp_path / "model", "x", "--max-tokens", 9, *more) == 0
        sizes.append(parse_bytes(re.search(r"; state ([^,]+),", capsys.readouterr().err)[1]))
    assert sizes[1] > 50 * sizes[0]


def test_generate_reports_a_single_token_too(capsys, byte_model):
    assert run("generate", byte_model, "x", "--max-tokens", 1) == 0
    assert capsys.readouterr().err.startswith("1 token, after ")


def test_brackets_in_names_are_shown_as_they_are(capsys, byte_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, text = Path("m[bold]"), Path("[dim]text.txt")
    shutil.copytree(byte_model, model)
    text.write_text("some text")

    def shows(name: str, *words: object) -> None:
        assert run(*words) == 0
        assert name in capsys.readouterr().out.replace("\n", "")

    shows("m[bold]", "info", model)
    shows("m[bold], 9 tokens of", "check", model, "--length", 9, "--dtype", "float32")
    shows("[dim]text.txt", "eval", model, "--file", text)
    shows("m[bold]", "eval", model, "--data", text, "--part", "all")
    shows("written to out[red]", "stack", "compile", "arch_advanced_retnet_mini", "-o", "out[red]")
    shows("[bold]new", "convert", model, "[bold]new")
    assert run("generate", "--help") == 0
    assert "retnet[quantize]" in capsys.readouterr().out


def test_the_prompt_comes_from_an_argument_a_file_or_standard_input_alike(capsys, monkeypatch, byte_model, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("café")

    def output(*words: object, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert run("generate", byte_model, *words, "--max-tokens", 20, "--temperature", 0) == 0
        return capsys.readouterr().out

    from_argument = output("café")
    assert output("--file", prompt) == from_argument
    assert output("--file", "-", stdin=prompt.read_bytes()) == from_argument
    assert output(stdin=prompt.read_bytes()) == from_argument
    assert output() != from_argument


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text", "--temperature", "-1"], "temperature is -1"),
        (["text", "--top-k", "0"], "top_k is 0"),
        (["text", "--top-p", "2"], "top_p is 2"),
        (["text", "--file", "x"], "one of the two, not both"),
        (["--file", "missing.txt"], "missing.txt"),
    ],
)
def test_generate_refuses_options_out_of_range(capsys, byte_model, words, message):
    assert message in wrong_input(capsys, "generate", byte_model, *words)


def test_generate_reports_weights_that_are_not_finite(capsys, byte_model, tmp_path):
    model = load_model(byte_model)
    with torch.no_grad():
        model.layers[0].mixer.q_proj.weight[0, 0] = float("nan")
    save_model(model, tmp_path / "broken")
    assert "not finite" in wrong_input(capsys, "generate", tmp_path / "broken", "hello", "--max-tokens", 20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_an_absent_device_is_refused(capsys, byte_model):
    assert "no CUDA device here; accepted: cpu" in wrong_input(capsys, "generate", byte_model, "x", "--device", "cuda")


@pytest.mark.parametrize("words", [["generate", "x"], ["check"], ["eval", "--file", __file__]])
def test_a_device_that_torch_cannot_use_here_is_refused(capsys, byte_model, words):
    verb, *rest = words
    message = wrong_input(capsys, verb, byte_model, *rest, "--device", "meta")
    assert "device is 'meta', which has no kernels here; accepted: auto, cpu, cuda" in message


def test_a_file_that_is_not_text_is_named(capsys, byte_model, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    message = wrong_input(capsys, "eval", byte_model, "--file", tmp_path / "bad.txt")
    assert "bad.txt is not UTF-8 at byte 2; accepted: text in UTF-8" in message


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "text"], ["check", "--text", __file__], ["eval", "--file", __file__], ["eval", "--data", __file__],
        ["chat"], ["serve", "--port", "0"],
    ],
)  # fmt: skip
def test_a_model_without_its_tokenizer_is_refused_before_its_weights_are_loaded(capsys, tmp_path, words, monkeypatch):
    save_model(small_model(vocab_size=100), tmp_path)
    monkeypatch.setattr(retnet.api, "load", lambda *args: pytest.fail("the weights were loaded"))
    verb, *rest = words
    message = wrong_input(capsys, verb, tmp_path, *rest)
    assert "has a vocabulary of 100 and no tokenizer.json beside its weights; accepted" in message


def test_generate_without_a_prompt_on_a_terminal_says_what_to_do(capsys, byte_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    message = wrong_input(capsys, "generate", byte_model)
    assert 'no prompt; accepted: text after the model (or "" for none), --file FILE, or text piped in' in message
    assert run("generate", byte_model, "", "--max-tokens", 2) == 0


def test_the_options_of_generate_reach_the_engine(capsys, byte_model, monkeypatch):
    seen = {}

    class Spy(Engine):
        def __init__(self, model, **options):
            seen.update(options, model=model)
            super().__init__(model, **options)

        def stream(self, request, after=None):
            seen["request"] = request
            return super().stream(request, after)

    monkeypatch.setattr(retnet.api, "Engine", Spy)
    words = [
        "--stop", r"\n\n", "--stop", "END", "--temperature", "0.5", "--top-k", "9", "--top-p", "0.9", "--min-p", "0.1",
        "--repetition-penalty", "1.2", "--presence-penalty", "0.3", "--frequency-penalty", "0.4", "--seed", "5",
        "--dtype", "bfloat16", "--device", "cpu", "--speculate", "3", "--max-tokens", "4",
    ]  # fmt: skip
    assert run("generate", byte_model, "x", *words) == 0
    request = seen["request"]
    assert request.sampling == retnet.Sampling(
        temperature=0.5, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, seed=5,
    )  # fmt: skip
    assert (list(request.stop_strings), request.max_new_tokens) == (["\n\n", "END"], 4)
    assert seen["speculation"].draft_tokens == 3
    assert seen["model"].embedding.weight.dtype == torch.bfloat16


def test_int8_quantises_the_model_that_generates(capsys, byte_model, monkeypatch):
    from retnet.models.decode import int8

    monkeypatch.setitem(LIBRARIES, "quantize", ())
    quantised = []
    monkeypatch.setattr(int8, "quantize_int8_", quantised.append)
    assert run("generate", byte_model, "x", "--int8", "--max-tokens", 2) == 0
    assert [model.directory for model in quantised] == [byte_model]


def test_generate_leaves_out_the_stop_string_and_what_follows(capsys, byte_model):
    words = ("generate", byte_model, "x", "--max-tokens", 60, "--seed", 4, "--no-stats")
    assert run(*words) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert run(*words, "--stop", text[20:23]) == 0
    assert capsys.readouterr().out == text[: text.index(text[20:23])] + "\n"


@pytest.mark.parametrize("verb", ["generate", "check", "eval"])
def test_the_device_is_the_gpu_if_there_is_one(capsys, verb):
    assert run(verb, "--help") == 0
    assert "auto (the GPU if there is one)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    "words", [["generate", "x"], ["check"], ["eval", "--data", "stdlib"], ["eval", "--file", __file__]]
)
def test_a_device_that_torch_does_not_know_is_refused(capsys, byte_model, words):
    verb, *rest = words
    assert "device is 'gpu'; accepted: auto, cpu, cuda" in wrong_input(
        capsys, verb, byte_model, *rest, "--device", "gpu"
    )
    assert "device is 'gpu'" in wrong_input(capsys, "check", "operator", "--device", "gpu")


def test_check_passes_on_a_model_over_random_and_real_input(capsys, byte_model, tmp_path):
    words = ("check", byte_model, "--length", 40, "--dtype", "float32", "--dtype", "bfloat16")
    assert run(*words) == 0
    assert "all 20 agree" in capsys.readouterr().out
    text = tmp_path / "text"
    text.write_text("for x in range(10): print(x)")
    assert run(*words, "--text", text, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["tokens"] for row in rows} == {29}
    assert all(row["passed"] for row in rows)


def test_check_passes_on_the_operator(capsys):
    assert run("check", "operator", "--length", 33, "--dtype", "float64", "--chunk-size", 5, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"parallel", "recurrent", "chunkwise, C = 5", "chunkwise, C = 5, per token"} <= {row["way"] for row in rows}
    assert all(row["relative"] < 1e-10 for row in rows)


def test_check_fails_when_a_form_is_wrong(capsys, byte_model, monkeypatch):
    from retnet.ops import cpu_recurrent

    def slightly_wrong(*arguments):  # not by a factor, which the head norm would take out again
        out, *rest = forward(*arguments)
        return out + 1e-3 * out.flip(-1), *rest

    forward = cpu_recurrent.forward
    monkeypatch.setattr(cpu_recurrent, "forward", slightly_wrong)
    assert run("check", byte_model, "--length", 20, "--dtype", "float32", "--json") == 1
    failed = {row["way"] for row in json.loads(capsys.readouterr().out) if not row["passed"]}
    assert "recurrent" in failed
    assert "parallel" not in failed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "int8"], "dtype is 'int8'; accepted: float64, float32, float16, bfloat16"),
        (["--length", "1"], "need T >= 2"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_check_refuses_wrong_arguments(capsys, byte_model, words, message):
    assert message in wrong_input(capsys, "check", byte_model, *words)


def test_generate_refuses_text_without_limit_where_a_cache_grows(capsys, tmp_path):
    save_model(small_model([ALIBI], **BYTES), tmp_path / "model")
    message = wrong_input(capsys, "generate", tmp_path / "model", "hello", "--max-tokens", 0)
    assert "the text has no limit and layer 0 is attention without a window" in message
    assert run("generate", tmp_path / "model", "hello", "--max-tokens", 2, "--no-stats") == 0


def test_eval_compares_the_model_with_compressors(capsys, byte_model, text_folder):
    assert run("eval", byte_model, "--data", text_folder, "--valid-fraction", 0.2, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["bits_per_byte"]) == {"gzip -9", "xz -9", "order-2 bytes", str(byte_model)}
    assert run("eval", byte_model, "--data", text_folder, "--part", "all") == 0
    assert "30 documents" in capsys.readouterr().out


def test_eval_refuses_missing_and_empty_data(capsys, byte_model, tmp_path):
    assert "no such file or folder" in wrong_input(capsys, "eval", byte_model, "--data", tmp_path / "gone")
    (tmp_path / "empty.txt").touch()
    assert "1 empty file" in wrong_input(capsys, "eval", byte_model, "--data", tmp_path)


def test_train_goes_from_text_to_a_model_that_every_verb_takes(capsys, byte_model, text_folder, tmp_path):
    output = tmp_path / "trained"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("length: 32\nmax_steps: 2\nper_device_train_batch_size: 2\nsave_strategy: no\n")
    words = ("train", recipe, f"output_dir={output}", "--data", text_folder, "--model", byte_model)
    assert run(*words, "valid_fraction=0.2") == 0
    assert f"saved in {output}" in capsys.readouterr().out
    assert run("generate", output, "state", "--max-tokens", 5, "--no-stats") == 0
    assert run("check", output, "--length", 16, "--dtype", "float32") == 0
    assert run("info", output) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model is missing"),
        (["a.yaml", "b.yaml"], "2 recipes are given (a.yaml, b.yaml); accepted: one"),
        (["gone.yaml"], "no such recipe: gone.yaml"),
        (["model=retnet-tiny", "data=gone"], "no such file or folder: gone"),
        (["model=retnet-tinny", "data=stdlib"], "no model 'retnet-tinny'"),
        (["model=retnet-tiny", "data=stdlib", "learning_rte=1"], "did you mean 'learning_rate'?"),
    ],
)
def test_train_refuses_wrong_arguments(capsys, words, message):
    assert message in wrong_input(capsys, "train", *words)


def test_train_refuses_a_folder_without_text(capsys, tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    assert "1 binary file (image.png)" in wrong_input(capsys, "train", "model=retnet-tiny", f"data={tmp_path}")
