"""Benchmarks run on a CPU at small sizes; those that need a GPU say so."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retnet.models.directory import save_model
from tests.paths import ROOT
from tests.small_models import BYTES, MTP, small_model
from tests.torchrun import torchrun

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
GPU_ONLY = (
    "bench_convolution", "bench_decode", "bench_figure6", "bench_float8", "bench_gated", "bench_long_rows",
    "bench_retention", "bench_train",
)  # fmt: skip


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_the_benchmark_of_split_models_finds_them_equal_to_whole_ones(device):
    size, prompt = ["--size", 2, 256, 4, "--dtype", "float32", "--device", device], ["--prompt", 40, "--most", 70]
    done = torchrun(2, BENCHMARKS / "bench_tensor_parallel.py", *size, *prompt, "--seconds", 0.1, "--train")
    assert done.returncode == 0, done.stderr
    apart, rounding = map(float, re.findall(r"logits differ by (\S+) of .* \(by (\S+) between", done.stdout)[0])
    gradients = float(re.findall(r"gradients differ by (\S+) of", done.stdout)[0])
    assert apart < 10 * rounding
    assert gradients < (1e-5 if device == "cpu" else 1e-2)
    if device == "cpu":
        assert "the first 33 of 33 greedy tokens are equal" in done.stdout


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_benchmark_of_speculation_finds_the_tokens_of_plain_decoding(tmp_path):
    save_model(small_model(mtp=MTP, **BYTES), tmp_path / "model")
    (tmp_path / "text.txt").write_text("abc def ghi " * 60)
    words = ["--tokens", 12, "--prompt", 20, "--prompts", 2, "--draft-tokens", 3]
    done = run("bench_speculation", tmp_path / "model", tmp_path / "text.txt", *words)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [line[1] for line in lines] == ["none", "3, context", "3, mtp"] * 2
    assert all(float(line[3]) >= 1 and float(line[4]) > 0 for line in lines)


def test_the_table_of_converted_models_has_a_row_of_every_class_with_small_differences():
    done = run("converter_parity")
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    classes = " ".join(line[1] for line in lines)
    for word in ("MiniMax", "Jamba", "Bamba", "FalconH1", "Zamba2", "Mamba2", "Llama", "Qwen3"):
        assert f"`{word}ForCausalLM`" in classes
    named = " ".join(line[0] for line in lines)
    assert all(word in named for word in ("bailing_moe_linear", "minicpm_sala", "FLA's SimpleGatedLinearAttention"))
    for _, _, largest, *cells in lines:
        bounds = (1e-5, 1e-5, 1e-10, 1e-10)
        assert all(float(cell) <= bound * float(largest) for cell, bound in zip(cells, bounds, strict=True))


def test_the_generation_benchmark_writes_rows_and_plots_them(tmp_path):
    file, picture = tmp_path / "points.csv", tmp_path / "picture.png"
    words = ["--sections", "position,batch,first,prefix,restore", "--positions", 8, "--batch", 1, "--prompts", 16]
    words += ["--context", 16, "--seconds", 0.01, "--device", "cpu", "--csv", file]
    done = run("bench_generate", "--model", "retnet-tiny", *words)
    assert done.returncode == 0, done.stderr
    measured = {(row["what"], row["implementation"]) for row in rows(file)}
    assert {what for what, _ in measured} == {"step", "first token", "prefix hit", "restore"}
    assert ("step", "deferred 32") in measured
    assert all(0 < float(row["milliseconds"]) < 60_000 for row in rows(file))
    assert all(row["torch"] == torch.__version__ and row["command"] for row in rows(file))
    assert run("bench_generate", "--csv", file, "--plot", picture).returncode == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_benchmark_of_sessions_continues_them_from_disk_and_from_memory(tmp_path):
    file = tmp_path / "points.csv"
    done = run("bench_sessions", "--model", "retnet-tiny", "--context", 40, "--repeats", 1, "--csv", file)
    assert done.returncode == 0, done.stderr
    assert {row["what"] for row in rows(file)} == {"whole prompt", "from disk", "from memory", "message alone"}


def test_the_benchmark_of_a_server_loads_it_beside_its_engine_and_sheds_what_is_too_much(tmp_path):
    file = tmp_path / "points.csv"
    words = ["--streams", 2, "--slots", 1, "--prompt", 4, "--tokens", 8, "--seconds", 1, "--clients", 2]
    done = run("bench_serve", "--model", "retnet-tiny", *words, "--overload", 6, "--csv", file)
    assert done.returncode == 0, done.stderr
    measured = {(row["implementation"], row["what"]) for row in rows(file)}
    assert {("engine", "token"), ("http", "token"), ("http", "first token p99"), ("http", "event loop")} <= measured
    assert any("refused" in row["note"] for row in rows(file))


def test_the_loss_benchmark_writes_a_row_per_implementation(tmp_path):
    file = tmp_path / "points.csv"
    done = run("bench_loss", "--tokens", 64, "--width", 32, "--vocab", 300, "--dtype", "float32", "--csv", file)
    assert done.returncode == 0, done.stderr
    assert {"plain", "ours"} <= {row["implementation"] for row in rows(file)}


def test_the_benchmark_of_long_rows_names_the_level_of_every_row(tmp_path):
    file = tmp_path / "points.csv"
    done = run("bench_long_rows", "--tiny", "--eager", "--steps", 1, "--csv", file)
    assert done.returncode == 0, done.stderr
    found = {row["implementation"]: row for row in rows(file)}
    assert list(found) == ["none", "medium", "layer", "layer+offload", "light"]
    assert all(f"recompute={level}" in row["note"] for level, row in found.items())
    assert all(0 < float(row["milliseconds"]) < 60_000 for row in found.values())
    assert done.stdout.count("of the rate of T=256") == 4


def test_a_profile_lists_operators():
    done = run("profile_step", "--model", "retnet-tiny", "--steps", 1, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "operators" in done.stdout
    assert "aten::" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", GPU_ONLY)
def test_a_gpu_benchmark_without_a_gpu_ends_with_a_message(script):
    done = run(script)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "this benchmark measures a GPU, and PyTorch finds none; accepted: a machine with CUDA or ROCm"
    )


def test_the_benchmark_of_minimax_converts_fills_caches_and_finds_equal_logits(tmp_path):
    file = tmp_path / "rows.csv"
    done = run("bench_minimax", "--tiny", "--steps", 6, "--device", "cpu", "--folder", tmp_path, "--csv", file)
    assert done.returncode == 0, done.stderr
    steps = {row["implementation"]: row for row in rows(file) if row["what"] == "step"}
    assert steps.keys() == {"ours, model", "ours, engine", "transformers"}
    difference, ours, theirs = re.findall(
        r"logits differ from ours by (\S+), the best token is (\d+) and (\d+)", steps["transformers"]["note"]
    )[0]
    assert float(difference) < 1e-5
    assert ours == theirs


@pytest.mark.parametrize("script", sorted(file.stem for file in BENCHMARKS.glob("bench_*.py")))
def test_every_benchmark_has_help(script):
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "python benchmarks/" in done.stdout or "--csv" in done.stdout


def on_two_processes(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return torchrun(2, BENCHMARKS / f"{script}.py", "--tiny", *words)


def test_the_check_of_context_parallelism_passes_and_sees_broken_exchanges():
    done = on_two_processes("check_context_parallel", "--no-compile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fails, as it must") == 6
    assert "wrong: none" in done.stdout


def test_the_benchmark_of_exchanges_times_three_forms(tmp_path):
    done = on_two_processes("bench_context_parallel", "--csv", tmp_path / "rows.csv")
    assert done.returncode == 0, done.stderr
    names = {row["implementation"].split(",")[0] for row in rows(tmp_path / "rows.csv")}
    assert {"all-gather", "ring", "all-to-all", "local", "attention"} <= names


def test_the_benchmark_of_long_training_compares_shared_rows_with_rows_alone(tmp_path):
    done = on_two_processes("bench_long_training", "--cases", "hybrid:128:light", "--csv", tmp_path / "rows.csv")
    assert done.returncode == 0, done.stderr
    alone, shared = rows(tmp_path / "rows.csv")
    assert (alone["implementation"], shared["implementation"]) == ("alone", "shared")
    assert "recompute light" in shared["note"]
    assert "of alone" in shared["note"]
