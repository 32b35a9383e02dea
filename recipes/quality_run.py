"""Arms of `quality.py` run one after another in one process, each written to its file as it goes."""

import argparse
import gc
import math
import platform
import statistics
import subprocess
import time
import traceback
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from quality_data import batches, load, source_bytes
from quality_measure import FINAL, Sizes, mean_loss
from quality_rows import FINISHED, adopt, best_loss_at, claimed, is_finished, load_rows, save
from quality_stacks import SHAPES, stack
from quality_train import Arm, Blocks, train

from retnet.models.cost import parameter_counts

NEAR = 6  # arms of a queue among which the one with compiled blocks is chosen
FULL = {"sizes": Sizes(), "rows": 32, "steps": 480, "points": 8}
TINY = {
    "sizes": Sizes(
        length=32, tokens=256, valid_rows=16, curve_rows=8, longest=128, windows=4, book_tokens=5000, passage=8,
        gaps=(8, 16), repeats=4, context=48,
    ),
    "rows": 4,
    "steps": 20,
    "points": 4,
}  # fmt: skip


class Session:
    """One process on one device. begin: `time.monotonic()` from which the deadline counts."""

    def __init__(self, options: argparse.Namespace, begin: float):
        self.options, self.begin = options, begin
        setting = TINY if options.tiny else FULL
        self.shape_name = "tiny" if options.tiny else options.shape
        self.shape = SHAPES[self.shape_name]
        self.sizes: Sizes = setting["sizes"]
        self.rows_per_step, self.points = setting["rows"], setting["points"]
        self.steps = options.steps or setting["steps"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.blocks = Blocks(self.device.type == "cuda" and not options.eager)
        self.corpus = source_bytes(self.device) if options.tiny else load(options.data, self.device, options.tokens)
        if self.corpus.vocab_size > self.shape.vocab_size:
            raise ValueError(
                f"the tokens need a vocabulary of {self.corpus.vocab_size}; accepted: {self.shape.vocab_size}"
            )
        self.data = self.corpus.fingerprint()
        self.train_rows = self.corpus.train.rows(self.sizes.length)
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        adopt(self.out, options.done, self.data, self.shape_name)
        self.facts = facts(self.device, options.commit)
        self._seconds_per_step = 0.0
        print(f"{len(self.train_rows)} rows of {self.sizes.length} tokens, data {self.data}, {self.facts}", flush=True)

    def work_off(self, arms: list[tuple[Arm, bool]]) -> None:
        """Run the arms that are not finished and that no other process runs, about in their order.

        Among the next few, those of the stack that ran last come first: its blocks are compiled.
        """
        waiting, last = list(arms), None
        while waiting:
            near = waiting[:NEAR]
            arm, final = next((one for one in near if one[0].stack == last), near[0])
            waiting.remove((arm, final))
            if is_finished(self.out, arm):
                continue
            if self.left() < self._seconds_per_step * arm.steps:
                print(f"{arm.name} is left: {self.left():.0f} s remain", flush=True)
                continue
            with claimed(self.out, arm) as mine:
                if mine and not is_finished(self.out, arm):
                    self.run(arm, final)
                    last = arm.stack

    def left(self) -> float:
        """Seconds to the deadline."""
        return math.inf if self.options.deadline is None else self.begin + self.options.deadline - time.monotonic()

    def run(self, arm: Arm, final: bool) -> dict:
        """The arm's row. A failure is recorded in it, so that the next arm can run."""
        row = self._new_row(arm)
        begin = time.monotonic()
        try:
            self._run(arm, final, row)
        except Exception as error:
            traceback.print_exc()
            row |= {"status": "failed", "note": f"{type(error).__name__}: {error}"[:500]}
        row["wall_seconds"] = time.monotonic() - begin
        save(self.out, arm, row)
        if row["status"] in FINISHED and row["curve"]:
            self._seconds_per_step = row["wall_seconds"] / row["curve"][-1]["step"]
        shown = {name: row.get(name) for name in ("status", "perplexity", "tokens_per_second", "note")}
        print(f"{arm.name}: {shown}, {row['wall_seconds']:.0f} s in all", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def _new_row(self, arm: Arm) -> dict:
        named = {"arm": arm.name} | {
            name: getattr(arm, name) for name in ("stack", "optimizer", "rate", "seed", "steps")
        }
        sizes = {
            "shape": self.shape_name,
            "length": self.sizes.length,
            "rows_per_step": self.rows_per_step,
            "train_rows": len(self.train_rows),
        }
        return named | sizes | self.facts | {"data": self.data, "status": "running", "note": "", "curve": []}

    def _run(self, arm: Arm, final: bool, row: dict) -> None:
        config = replace(stack(arm.stack, self.shape), seed=arm.seed)
        row["parameters"] = parameter_counts(config)["total"]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def report(model, step: int, spent: float, loss: float) -> bool:
            valid = mean_loss(model, self.corpus.valid, self.sizes, self.sizes.curve_rows)
            tokens = step * self.rows_per_step * self.sizes.length
            row["curve"].append({"step": step, "tokens": tokens, "seconds": spent, "train": loss, "valid": valid})
            row["status"], row["note"] = self._verdict(arm, row)
            save(self.out, arm, row)
            print(f"{arm.name} {step}: train {loss:.4f}, valid {valid:.4f}, {spent:.0f} s", flush=True)
            return row["status"] == "running"

        every = max(1, arm.steps // max(self.points, self.points * arm.steps // FULL["steps"]))
        rows = batches(self.train_rows, self.rows_per_step)
        model = train(arm, config, rows, self.blocks, self.device, every, report)
        row["tokens_per_second"] = steady_rate(row["curve"])
        if self.device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        if row["status"] != "running":
            return
        row["valid_loss"] = mean_loss(model, self.corpus.valid, self.sizes, self.sizes.valid_rows)
        row["perplexity"] = math.exp(row["valid_loss"])
        save(self.out, arm, row)
        if final:
            row["final"], row["errors"] = {}, {}
            for name, measure in FINAL.items():
                try:
                    row["final"][name] = measure(model, self.corpus, self.sizes)
                except Exception as error:  # the trained weights serve the other measurements
                    traceback.print_exc()
                    row["errors"][name] = f"{type(error).__name__}: {error}"[:500]
                save(self.out, arm, row)
        row["status"] = "done"

    def _verdict(self, arm: Arm, row: dict) -> tuple[str, str]:
        """(status, note) at the last point of the curve."""
        step, valid = row["curve"][-1]["step"], row["curve"][-1]["valid"]
        if not math.isfinite(row["curve"][-1]["train"] + valid):
            return "abandoned", f"the loss is not finite at step {step}"
        if step < arm.steps and self.left() < 0:
            return "stopped", f"at the deadline, after step {step} of {arm.steps}"
        best = best_loss_at(load_rows([self.out]), row, step) if self.options.abandon is not None else None
        if best is not None and arm.steps / 2 <= step < arm.steps and valid > best + self.options.abandon:
            return "abandoned", f"at step {step}: {valid:.3f} nats, the best has {best:.3f}"
        return "running", ""


def steady_rate(curve: list[dict]) -> float:
    """Tokens per second of training: the median over the intervals between points."""
    ends = [(0, 0.0), *((point["tokens"], point["seconds"]) for point in curve)]
    return statistics.median((b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(ends))


def facts(device: torch.device, commit: str | None) -> dict:
    """Commit, versions and device."""
    if commit is None:
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        try:
            commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"commit": commit, "versions": versions, "device": name}
