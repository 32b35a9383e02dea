"""Distillation at 125 million parameters: a Llama-style teacher, hybrids made from it, and the controls.

    python recipes/distil_125m.py --data out/packed                          one H200: teacher 430 s, then the arms
    python recipes/distil_125m.py --data out/packed --deadline 560           in several calls: none is repeated
    python recipes/distil_125m.py table out/distil_125m                      Markdown
    python recipes/distil_125m.py --tiny --teacher-steps 20                  a trial on a CPU, seconds

The teacher is `llama:muon:4e-3` of `quality.py` on 172 million tokens. Every arm then reads a share of as many tokens
(10% by default, all its stages counted), in another order. An arm is
`kind:optimizer:rate[:rate of layers[:share[:cross-entropy]]]`:

    distil     retention in three layers of four: layers aligned for a share of the tokens (0.4), then KL on the logits,
               with a weight of cross-entropy (0.5)
    chosen     the same, with as many attention layers in the places where they lower the loss most
    copied     the start of `distil`, trained with cross-entropy alone
    scratch    the same hybrid from random weights
    further    the teacher itself, trained with cross-entropy

Measured for the teacher and each arm: perplexity, recall of repeated passages of books, the state of a stream after
8,192 tokens in bfloat16, milliseconds per token of one stream. Rows are written to a file as they come.
"""

import argparse
import copy
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mixers_train import precision
from quality_data import batches, load, source_bytes
from quality_measure import decoding, mean_loss, measuring, recall
from quality_run import FULL, TINY, facts
from quality_stacks import SHAPES, stack
from quality_train import CLIP, Arm, Blocks, learning_rate, optimizer_of, train
from torch import Tensor, nn

from retnet import LanguageModel, ModelConfig
from retnet.models.directory import load_model, save_model
from retnet.train.distil.choice import choose_attention
from retnet.train.distil.fit import fit_outputs_, layer_errors, mixer_of_layer, scale_heads_to_
from retnet.train.distil.from_stack import all_retention
from retnet.train.distil.objectives import layers_loss, logits_loss
from retnet.train.distil.student import converted_layers, make_student, student_config

KINDS = ("distil", "chosen", "copied", "scratch", "further")
EVERY = 4  # one layer of attention in so many
ALIGN_SHARE, CROSS_ENTROPY = 0.4, 0.5
TEACHER = "llama:muon:4e-3:0"
DEFAULT_ARMS = (
    "distil:adamw:1e-3:2e-3", "chosen:adamw:1e-3:2e-3", "distil:adamw:1e-3:2e-3:0.4:0", "further:adamw:3e-4",
    "copied:adamw:1e-3", "scratch:muon:4e-3",
)  # fmt: skip
FIT_ROWS, CHOICE_ROWS = 16, 32  # of training data
Loss = Callable[[Tensor, Tensor], Tensor]  # (ids [B, T], targets [B, T]) -> mean


@dataclass(frozen=True)
class Trial:
    """An arm: its kind, its optimizer, the peak rate of its last stage, the rate and the share of aligning, and the
    weight of cross-entropy.
    """

    name: str
    kind: str
    optimizer: str
    rate: float
    align_rate: float
    align_share: float
    cross_entropy: float

    @classmethod
    def parse(cls, name: str) -> "Trial":
        """The arm of a name. Raises ValueError for any other text."""
        parts = name.split(":")
        accepted = f"kind:optimizer:rate[:rate of layers[:share[:cross-entropy]]], kind one of {', '.join(KINDS)}"
        try:
            kind, optimizer, rate = parts[0], parts[1], float(parts[2])
            align_rate = float(parts[3]) if len(parts) > 3 else 2 * rate
            share = float(parts[4]) if len(parts) > 4 else ALIGN_SHARE
            labels = float(parts[5]) if len(parts) > 5 else CROSS_ENTROPY
        except (IndexError, ValueError):
            raise ValueError(f"arm is {name!r}; accepted: {accepted}") from None
        is_rate = 0 < rate < math.inf and 0 < align_rate < math.inf
        if (
            kind not in KINDS
            or optimizer not in ("adamw", "muon")
            or len(parts) > 6
            or not is_rate
            or not 0 < share < 1
            or not 0 <= labels < 1
        ):
            raise ValueError(f"arm is {name!r}; accepted: {accepted}")
        return cls(name, kind, optimizer, rate, align_rate, share, labels)


class Session:
    """The data, the teacher and the files of one call. begin: `time.monotonic()` from which the deadline counts."""

    def __init__(self, options: argparse.Namespace, begin: float):
        self.options, self.begin = options, begin
        setting = TINY if options.tiny else FULL
        self.sizes, self.rows_per_step = setting["sizes"], setting["rows"]
        self.shape = SHAPES["tiny" if options.tiny else options.shape]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.blocks = Blocks(self.device.type == "cuda" and not options.eager)
        self.corpus = source_bytes(self.device) if options.tiny else load(options.data, self.device)
        self.rows = self.corpus.train.rows(self.sizes.length)
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.steps = max(2, round(options.share * options.teacher_steps))
        self.facts = facts(self.device, options.commit) | {"data": self.corpus.fingerprint()}

    def left(self) -> float:
        """Seconds to the deadline."""
        return math.inf if self.options.deadline is None else self.begin + self.options.deadline - time.monotonic()

    def batches(self, seed: int) -> Iterator[Tensor]:
        return batches(self.rows, self.rows_per_step, seed)

    def done(self) -> dict[str, dict]:
        """The rows that are finished, by name."""
        rows = [json.loads(file.read_text()) for file in sorted(self.out.glob("*.json"))]
        return {row["name"]: row for row in rows if row["teacher_steps"] == self.options.teacher_steps}

    def save(self, row: dict) -> None:
        name = row["name"].replace(":", "_")
        (self.out / f"{name}.json").write_text(json.dumps(row))

    def new_row(self, name: str, steps: int) -> dict:
        tokens = steps * self.rows_per_step * self.sizes.length
        return {
            "name": name,
            "teacher_steps": self.options.teacher_steps,
            "steps": steps,
            "tokens": tokens,
            **self.facts,
        }

    def measured(self, model: LanguageModel) -> dict:
        """Losses, recall, state and decoding of a model."""
        valid = mean_loss(model, self.corpus.valid, self.sizes, self.sizes.valid_rows)
        return {
            "valid_loss": valid,
            "perplexity": math.exp(valid),
            "test_loss": mean_loss(model, self.corpus.test, self.sizes, self.sizes.valid_rows),
            "recall": recall(model, self.corpus.books, self.sizes),
            "decode": decoding(model, self.sizes),
        }

    # The teacher

    def teacher(self) -> LanguageModel:
        """The teacher: read from the output folder, or trained and saved there."""
        folder, name = self.out / f"teacher-{self.options.teacher_steps}", f"teacher:{self.options.teacher_steps}"
        if not (folder / "config.json").is_file():
            arm = Arm.parse(TEACHER, self.options.teacher_steps)
            config = replace(stack(arm.stack, self.shape), seed=arm.seed)
            row = self.new_row(name, arm.steps)

            def report(model: LanguageModel, step: int, spent: float, loss: float) -> bool:
                print(f"teacher {step}: train {loss:.4f}, {spent:.0f} s", flush=True)
                row["seconds"] = spent
                return True

            every = max(1, arm.steps // 8)
            model = train(arm, config, self.batches(0), self.blocks, self.device, every, report)
            save_model(model, folder)
            self.save(row | self.measured(model))
            self.show(name)
        return load_model(folder, device=self.device).requires_grad_(False)

    # Arms

    def work_off(self, names: list[str]) -> None:
        """Run the arms that are not finished, as long as the deadline allows one more."""
        trials = [Trial.parse(name) for name in names]
        teacher = self.teacher()
        longest = 0.0
        for trial in trials:
            if trial.name in self.done():
                continue
            if self.left() < 1.2 * longest:
                print(f"{trial.name} is left: {self.left():.0f} s remain", flush=True)
                continue
            begin = time.monotonic()
            self.run(trial, teacher)
            longest = max(longest, time.monotonic() - begin)
            gc.collect()

    def run(self, trial: Trial, teacher: LanguageModel) -> None:
        row, begin = self.new_row(trial.name, self.steps), time.monotonic()
        if trial.kind == "further":
            model = copy.deepcopy(teacher).requires_grad_(True)
            row["seconds"] = self.fit(model, trial, trial.rate, self.steps, cross_entropy_of(model), seed=1)
        elif trial.kind == "scratch":
            with self.device:
                model = LanguageModel(replace(self.hybrid(teacher.config), init="normal", seed=0))
            row["seconds"] = self.fit(model, trial, trial.rate, self.steps, cross_entropy_of(model), seed=1)
        else:
            model = self.distilled(trial, teacher, row)
        row["wall_seconds"] = time.monotonic() - begin
        self.save(row | self.measured(model))
        self.show(trial.name)

    def hybrid(self, teacher: ModelConfig, everywhere: bool = False) -> ModelConfig:
        """The student's configuration: the last layer of every four keeps attention; none with `everywhere`."""
        kept = [not everywhere and i % EVERY == EVERY - 1 for i in range(len(teacher.layers))]
        mixers = [None if keep else mixer for keep, mixer in zip(kept, all_retention(teacher), strict=True)]
        return student_config(teacher, mixers)

    def distilled(self, trial: Trial, teacher: LanguageModel, row: dict) -> LanguageModel:
        config = self.hybrid(teacher.config, everywhere=trial.kind == "chosen")
        layers = converted_layers(teacher.config, config)
        student = copy.deepcopy(make_student(teacher, config))
        rows = self.corpus.train.spread_rows(self.sizes.length, FIT_ROWS)
        samples = [(part[None, :-1].long(), part[1:].long(), torch.tensor([0, len(part) - 1])) for part in rows]
        samples = [(ids, targets, bounds.to(self.device)) for ids, targets, bounds in samples]
        with measuring(teacher):
            scale_heads_to_(student, teacher, layers, samples)
            fit_outputs_(student, teacher, layers, samples)
            row["start_errors"] = list(layer_errors(student, teacher, layers, samples).values())
        row["start_loss"] = mean_loss(student, self.corpus.valid, self.sizes, self.sizes.curve_rows)
        student.requires_grad_(True)
        if trial.kind == "copied":
            row["seconds"] = self.fit(student, trial, trial.rate, self.steps, cross_entropy_of(student), seed=1)
            return student
        align = max(1, round(trial.align_share * self.steps))
        student.requires_grad_(False)
        for i in layers:
            mixer_of_layer(student, i).requires_grad_(True)
        spent = self.fit(
            student, trial, trial.align_rate, align,
            lambda ids, targets: layers_loss(student, teacher, layers, ids), seed=1, compiled=layers,
        )  # fmt: skip
        with measuring(teacher):
            row["aligned_errors"] = list(layer_errors(student, teacher, layers, samples).values())
            if trial.kind == "chosen":
                student, row["chosen"] = self.with_chosen(student, teacher, layers, samples)
        row["aligned_loss"] = mean_loss(student, self.corpus.valid, self.sizes, self.sizes.curve_rows)
        student.requires_grad_(True)
        row["seconds"] = spent + self.fit(
            student, trial, trial.rate, self.steps - align,
            lambda ids, targets: logits_loss(student, teacher, ids, targets, cross_entropy=trial.cross_entropy), seed=2,
        )  # fmt: skip
        return student

    def with_chosen(self, student: LanguageModel, teacher: LanguageModel, layers: list[int], samples: list) -> Any:
        """The student with attention where it lowers the loss most, and the layers with the losses that led there."""
        count = max(1, len(teacher.layers) // EVERY)
        choice = choose_attention(student, teacher, layers, count, samples[:CHOICE_ROWS])
        mixers = [None if i in choice.kept else m for i, m in enumerate(all_retention(teacher.config))]
        weights = student.state_dict()
        for i in choice.kept:
            own = f"layers.{i}.mixer."
            weights = {name: x for name, x in weights.items() if not name.startswith(own)}
            weights |= {own + name: x for name, x in mixer_of_layer(teacher, i).state_dict().items()}
        with self.device:
            chosen = LanguageModel(student_config(teacher.config, mixers))
        chosen.load_state_dict(weights)
        return chosen, {"kept": choice.kept, "losses": choice.losses}

    def fit(
        self, model: LanguageModel, trial: Trial, rate: float, steps: int, loss: Loss, *, seed: int,
        compiled: list[int] | None = None,
    ) -> float:  # fmt: skip
        """Train with a loss. Returns the seconds of the steps. compiled: the layers whose mixers are compiled alone."""
        model.train()
        if compiled is None:
            self.blocks.compile(model)
        elif self.blocks.wanted:
            for i in compiled:
                mixer_of_layer(model, i).compile(dynamic=False)
        optimizer = optimizer_of(model, trial.optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        rows = self.batches(seed)
        first = next(rows)
        self.backward(loss, first)  # compiles; its gradients are not used
        model.zero_grad(set_to_none=True)
        rows, begin, last = chain([first], rows), self.now(), torch.zeros(())
        for step in range(steps):
            last = self.backward(loss, next(rows))
            nn.utils.clip_grad_norm_(trained, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, rate)
            optimizer.step()
            model.zero_grad(set_to_none=True)
        spent = self.now() - begin
        print(f"{trial.name}: {steps} steps, last loss {last.item():.4f}, {spent:.0f} s", flush=True)
        return spent

    def backward(self, loss: Loss, ids: Tensor) -> Tensor:
        with precision(self.device):
            value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        return value.detach()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def show(self, name: str) -> None:
        row = self.done()[name]
        print(f"{name}: perplexity {row['perplexity']:.3f}, {row.get('seconds', 0):.0f} s", flush=True)


def cross_entropy_of(model: LanguageModel) -> Loss:
    return model.loss


def table(folder: Path) -> str:
    """The rows of a folder as Markdown, beside the teacher of as many steps."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    teachers = {row["teacher_steps"]: row for row in rows if row["name"].startswith("teacher")}
    gaps = [one["gap"] for one in rows[0]["recall"]] if rows else []
    lines = [
        "| arm | tokens | perplexity | times the teacher's | "
        + "".join(f"repeat after {gap:,}, nats | " for gap in gaps[:2])
        + "state of a stream | ms per token |",
        "|---|" + "---:|" * (5 + len(gaps[:2])),
    ]
    for row in sorted(rows, key=lambda row: (not row["name"].startswith("teacher"), row["perplexity"])):
        teacher = teachers.get(row["teacher_steps"], row)
        decode, ratio = row["decode"], row["perplexity"] / teacher["perplexity"]
        state = f"{decode['state_bytes'] / 2**20:.2f} MiB"
        repeats = "".join(f"{one['again'] - one['first']:+.2f} | " for one in row["recall"][:2])
        lines.append(
            f"| `{row['name']}` | {row['tokens'] / 1e6:.1f}M | {row['perplexity']:.2f} "
            f"| {ratio:.3f} | {repeats}{state} | {decode['milliseconds_per_token']:.2f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    begin, words = time.monotonic(), sys.argv[1:] if words is None else words
    if words[:1] == ["table"]:
        print(table(Path(words[1])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=list(DEFAULT_ARMS), metavar="ARM")
    parser.add_argument("--data", type=Path, default=Path("out/packed"), help="a folder that `quality.py pack` wrote")
    parser.add_argument("--out", type=Path, default=Path("out/distil_125m"))
    parser.add_argument("--teacher-steps", type=int, default=2624, help="of 65,536 tokens (default: 2624)")
    parser.add_argument("--share", type=float, default=0.1, help="of the teacher's tokens, per arm (default: 0.1)")
    parser.add_argument("--deadline", type=float, default=None, help="seconds from now at which to have ended")
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--eager", action="store_true", help="do not compile blocks")
    parser.add_argument("--tiny", action="store_true", help="width 64, four layers, bytes: a trial on a CPU")
    parser.add_argument("--commit", default=None, help="recorded in the rows (default: git's)")
    options = parser.parse_args(words)
    if not options.tiny and not options.data.is_dir():
        parser.error(f"{options.data} is no folder; accepted: one that `python recipes/quality.py pack` wrote")
    try:
        Session(options, begin).work_off(options.arms)
    except ValueError as error:
        parser.error(str(error))
    print(table(options.out))


if __name__ == "__main__":
    main()
