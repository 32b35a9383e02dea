"""Time that training stands still for a checkpoint, in seconds: whole, sharded, and sharded in the background.

    python benchmarks/bench_checkpoints.py [--model retnet-125m] [--saves 3] [--steps 6] [--only FORM ...]

Every form trains the same small batches of bytes with AdamW in one process, in turn, and saves every `--steps` steps.
"stands still" is the time inside the save and, in the background, inside the wait for the one before. "step" is the
median time of steps without a save in progress, "step, writing" of those with one.
"""

import argparse
import io
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from retnet.models.directory import save_model
from retnet.models.lm import LanguageModel
from retnet.ops.device import hardware
from retnet.stack.resolve import resolve_config
from retnet.system.sizes import format_bytes
from retnet.train import run
from retnet.train.recipe import load_recipe
from retnet.train.sharded_trainer import FORMS
from retnet.train.trainer import PackedTrainer


class Timed(PackedTrainer):
    """Records how long saves and steps take."""

    saves: list[float]
    steps: list[tuple[bool, float]]  # whether a save was in progress, seconds
    began: float | None

    def _save_checkpoint(self, *args, **kwargs):
        begin = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        Timed.saves.append(time.perf_counter() - begin)
        Timed.began = None  # the step that follows is timed from its begin

    def training_step(self, *args, **kwargs):
        writing = self.saver is not None and self.saver.pending
        if Timed.began is not None:
            Timed.steps.append((writing, time.perf_counter() - Timed.began))
        Timed.began = time.perf_counter()
        return super().training_step(*args, **kwargs)


def bytes_model(name: str, folder: Path) -> int:
    """Save the preset, with its own size of vocabulary, as a reader of bytes. Returns the number of parameters."""
    model = LanguageModel(replace(resolve_config(name), bos_token_id=256, eos_token_id=None))
    save_model(model, folder)
    return sum(p.numel() for p in model.parameters())


def timed_run(form: str, model: Path, folder: Path, saves: int, steps: int) -> None:
    Timed.saves, Timed.steps, Timed.began = [], [], None
    settings = {
        "model": model, "data": "stdlib", "output_dir": folder / form, "checkpoints": form, "length": 32,
        "per_device_train_batch_size": 1, "max_steps": saves * steps, "save_steps": steps, "save_total_limit": 1,
        "num_samples": 0, "do_eval": False, "valid_rows": 1,
    }  # fmt: skip
    run.train(load_recipe(None, [f"{key}={value}" for key, value in settings.items()]), Console(file=io.StringIO()))
    checkpoint = next((folder / form).glob("checkpoint-*"))
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    alone, writing = ([seconds for is_writing, seconds in Timed.steps if is_writing == w] for w in (False, True))
    print(
        f"{form:>8}  stands still {statistics.median(Timed.saves):6.2f} s (median of {len(Timed.saves)}: "
        f"{', '.join(f'{x:.2f}' for x in Timed.saves)}); step {statistics.median(alone):.2f} s"
        + (f", step, writing {statistics.median(writing):.2f} s ({len(writing)} steps)" if writing else "")
        + f"; {format_bytes(size, 3)} on disk",
        flush=True,
    )
    shutil.rmtree(folder / form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="retnet-125m", help="a preset or a stack file")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="from save to save")
    parser.add_argument("--only", nargs="+", default=FORMS, choices=FORMS)
    options = parser.parse_args()
    run.PackedTrainer = Timed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        count = bytes_model(options.model, Path(folder) / "model")
        print(
            f"{options.model}, {count / 1e6:.1f}M parameters, AdamW in float32, {hardware(device)}, "
            f"torch {torch.__version__}"
        )
        for form in options.only:
            timed_run(form, Path(folder) / "model", Path(folder), options.saves, options.steps)


if __name__ == "__main__":
    main()
