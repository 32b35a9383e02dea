"""Training runs that a signal ends at random moments, resumed, and compared with an undisturbed run.

    python dev/interrupt.py [COUNT] [SEED]

Every run gets SIGTERM, SIGINT or SIGKILL at a random moment between its first step and its end, and is resumed with
`resume_from_checkpoint=auto`. Weights, losses and validations must be those of the undisturbed run, bit for bit. After
SIGTERM or SIGINT the exit code must be that of the signal (0 if the run was over), and a checkpoint must be there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from retnet.cli import main as command_line
from retnet.models.directory import save_model
from retnet.models.lm import LanguageModel
from retnet.models.presets import retnet_config
from retnet.train import run as _run  # noqa: F401 (imported once, before processes are forked)

COMMON = {
    "length": 48, "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
    "valid_fraction": 0.2, "num_samples": 1, "save_steps": 3, "resume_from_checkpoint": "auto",
}  # fmt: skip
VARIANTS = [
    {"eval_strategy": "steps", "eval_steps": 4},
    {"save_strategy": "no", "carry_state": True},
    {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau",
     "lr_scheduler_kwargs": "{patience: 0, factor: 0.5, mode: max}"},
    {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1},
    {"eval_strategy": "epoch", "gradient_accumulation_steps": 2, "length": 480},
]  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


def start(words: list[str], log: Path) -> tuple[int, int]:
    """Fork a run. Returns its process id, and a pipe of what it prints."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.dup2(write, 1)
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.close(read)
    code = 0
    try:
        command_line(["train", *words])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        code = 99
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 98
    os._exit(code)


def run(words: list[str], log: Path, number: int | None = None, delay: float = 0.0) -> tuple[int, float]:
    """One run, signalled `delay` seconds after its first step. Returns its exit code and the seconds from there on."""
    child, read = start(words, log)
    with open(read, "rb") as printed:
        for line in printed:
            if b"step " in line or b"resuming" in line:
                break
        began = time.monotonic()
        if number is not None:
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        printed.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def outcome(output: Path) -> tuple[bytes, dict[int, float], list[tuple[int, float]]]:
    """Weights, losses by step, and validations of a finished run."""
    log = json.loads((output / "training.json").read_text())["log"]
    validations = {(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry}
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    return (output / "model.safetensors").read_bytes(), losses, sorted(validations)


def main(count: int, seed: int) -> int:
    chosen = random.Random(seed)
    torch.set_num_threads(1)
    failures, ends = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = root / "texts"
        texts.mkdir()
        for i in range(20):
            (texts / f"{i}.txt").write_text(" ".join(str(chosen.randrange(1000)) for _ in range(150)))
        config = retnet_config("small", 2, 32, 2, vocab_size=257, bos_token_id=256)
        config = replace(config, layers=tuple(replace(layer, dropout=0.1) for layer in config.layers))
        save_model(LanguageModel(config), root / "model")

        def words(variant: dict, output: Path) -> list[str]:
            settings = COMMON | variant | {"model": root / "model", "data": texts, "output_dir": output}
            return [f"{key}={value}" for key, value in settings.items()]

        wanted = []
        for number, variant in enumerate(VARIANTS):
            code, seconds = run(words(variant, root / f"whole-{number}"), root / "log")
            assert code == 0, (root / "log").read_text()
            wanted.append((outcome(root / f"whole-{number}"), seconds))
        for trial in range(count):
            number, kind = chosen.choice(SIGNALS), chosen.randrange(len(VARIANTS))
            whole, seconds = wanted[kind]
            output, delay = root / f"trial-{trial}", chosen.uniform(0, seconds)
            code, _ = run(words(VARIANTS[kind], output), root / "log", number, delay)
            problem = None
            if code not in (0, -number if number == signal.SIGKILL else 128 + number):
                problem = f"exit code {code}"
            elif code > 0 and not list(output.glob("checkpoint-*")):
                problem = "no checkpoint"
            ends[code] = ends.get(code, 0) + 1
            if code:
                code, _ = run(words(VARIANTS[kind], output), root / "log")
                if code:
                    problem = f"resumed with exit code {code}"
            if problem is None and outcome(output) != whole:
                parts = zip(("weights", "losses", "validations"), outcome(output), whole, strict=True)
                problem = "other " + ", ".join(name for name, one, other in parts if one != other)
            if problem is not None:
                failures += 1
                print(
                    f"trial {trial}: {signal.Signals(number).name} after {delay:.2f} s of {VARIANTS[kind]}: {problem}"
                )
        print(f"{count} runs, exit codes {ends}, {failures} failures")
        if failures:
            print((root / "log").read_text()[-2000:])
    return failures


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    sys.exit(min(1, main(*(arguments + [50, 0][len(arguments) :]))))
