"""State tuning beside LoRA r=8: the style of one author, and which author wrote an excerpt (`state_tuning_tasks`).

    python recipes/state_tuning.py base --books books.tar.xz --out out/state-tuning       a base model; CPU, 10 minutes
    python recipes/state_tuning.py run --books books.tar.xz --out out/state-tuning        both tasks and methods
    python recipes/state_tuning.py run --model MODEL --steps 400 ...                      a trained model of your own
    python recipes/state_tuning.py table --out out/state-tuning                           the tables again

The base model reads bytes and has never seen the authors of the tasks. Both methods get the same batches and as many
steps. Each takes the learning rate, among those of `RATES`, with the best validation; the table shows its test.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from state_tuning_tasks import Examples, authors, base_texts, read_books, style
from torch import Tensor, nn

import retnet
from retnet.data.tokenizer import Tokenizer
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.directory import save_model
from retnet.models.fingerprint import fingerprint
from retnet.models.initial_state import LearnedState
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops.device import hardware
from retnet.system.machine import source_commit

RATES = {"state": (0.03, 0.1, 1.0), "lora": (3e-3, 1e-2)}
TASKS: dict[str, Callable[..., dict[str, Examples]]] = {"style": style, "author": authors}
METHODS = ["none", *RATES]
SPANS = ((0, 15), (16, 63), (64, 127), (128, 255), (256, 511), (512, 1023))  # positions
ROWS = "rows.jsonl"
WIDTH = 128


@dataclass(frozen=True)
class Setting:
    """length: tokens per example. counts: examples of training, validation and test. steps, batch: of both methods."""

    length: int = 256
    counts: tuple[int, int, int] = (1500, 80, 240)
    steps: int = 80
    batch: int = 8
    rank: int = 8


# The letters of `author` are one label per example, so there are more examples, and shorter ones.
SETTINGS = {"style": Setting(), "author": Setting(length=128, counts=(6000, 200, 400), steps=120, batch=32)}


@dataclass(frozen=True)
class Row:
    """One method at one rate on one task. loss: nats per label; spans: loss by position (style). accuracy: of author.

    parameters: that are trained. tokens: further tokens per request. seconds: of training."""

    task: str
    method: str
    rate: float
    parameters: int
    seconds: float
    valid: float
    test: float
    accuracy: float | None
    spans: tuple[float, ...]
    hardware: str
    commit: str


class Method:
    """A way to adapt a model: what is trained, and the state that a batch starts from."""

    def __init__(self, name: str, model: LanguageModel, rank: int):
        self.name, self.model = name, copy.deepcopy(model).requires_grad_(False)
        self.learned: LearnedState | None = None
        self.trained: list[nn.Parameter] = []
        if name == "state":
            self.learned = LearnedState(self.model)
            self.trained = list(self.learned.parameters())
        elif name == "lora":
            self.trained = add_lora(self.model, rank)

    def start(self, count: int) -> ModelState | None:
        return None if self.learned is None else self.learned(self.model, count)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden, _ = self.model.hidden(ids, self.start(len(ids)))
        return self.model.mean_nats(hidden, labels)

    def train(self, examples: Examples, setting: Setting, rate: float) -> float:
        """Train with AdamW, the rate falling to 0; the seconds that it took."""
        optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
        generator, begin = torch.Generator().manual_seed(0), time.perf_counter()
        device = self.model.embedding.weight.device
        for step in range(setting.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / setting.steps)
            ids, labels = examples.batch(setting.batch, generator)
            self.loss(ids.to(device), labels.to(device)).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - begin

    @torch.no_grad()
    def scores(self, examples: Examples) -> tuple[float, float | None, tuple[float, ...]]:
        """The loss, the accuracy where there are answers to choose among, and the loss by position."""
        device, kept_nats, right = self.model.embedding.weight.device, [], 0
        for ids, labels in zip(examples.ids.split(16), examples.labels.split(16), strict=True):
            hidden, _ = self.model.hidden(ids.to(device), self.start(len(ids)))
            logits = self.model.logits(hidden).float().cpu()
            kept_nats.append(F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"))
            if examples.answers:
                chosen = logits[:, -2, list(examples.answers)].argmax(-1)
                right += int((torch.tensor(examples.answers)[chosen] == labels[:, -2]).sum())
        nats, targets = torch.cat(kept_nats), examples.labels != -100
        mean = float(nats.double().sum() / targets.sum())
        if examples.answers:
            return mean, right / len(examples.ids), ()
        return mean, None, tuple(float(nats[:, a : b + 1].mean()) for a, b in SPANS if b < nats.shape[1] + 1)


def add_lora(model: LanguageModel, rank: int) -> list[nn.Parameter]:
    """LoRA on all projections of mixers and feed-forwards, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("decay_proj")
    }
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names)), model)
    return [x for name, x in model.named_parameters() if "lora_" in name]


def base_config() -> ModelConfig:
    """A byte model of 1.1 million parameters: gated retention with a short convolution."""
    retention = RetentionConfig(4, WIDTH, 2 * WIDTH, decay="gated", gated_start="paper", conv_width=4)
    block = BlockConfig(retention, FeedForwardConfig(2 * WIDTH, gated=True, activation="swish"), norm="rms")
    return ModelConfig(vocab_size=257, bos_token_id=256, d_model=WIDTH, layers=(block,) * 4, name="state-tuning-base")


def base(books: dict[str, str], out: Path, minutes: float) -> None:
    """Train the base model through `retnet train`."""
    from rich.console import Console

    from retnet.train.recipe import load_recipe
    from retnet.train.run import train

    texts, fresh = out / "texts", out / "fresh"
    texts.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(base_texts(books)):
        (texts / f"{number:02}.txt").write_text(text, encoding="utf-8")
    save_model(LanguageModel(base_config()), fresh)
    settings = {
        "model": fresh, "data": texts, "output_dir": out / "base", "length": 256, "per_device_train_batch_size": 16,
        "optim": "muon", "learning_rate": 1e-2, "max_minutes": minutes, "num_train_epochs": 3, "valid_rows": 100,
        "lr_scheduler_type": "linear", "logging_steps": 50, "num_samples": 1, "save_strategy": "no", "force": True,
    }  # fmt: skip
    train(load_recipe(None, [f"{key}={value}" for key, value in settings.items()]), Console())


def run(
    model: LanguageModel,
    tokenizer: Tokenizer,
    books: dict[str, str],
    out: Path,
    *,
    tasks: Sequence[str],
    methods: Sequence[str],
    changes: dict[str, int],
) -> None:
    """Every rate of the tasks and methods; rows are added to those of `out`. changes: of the settings."""
    out.mkdir(parents=True, exist_ok=True)
    facts = hardware(model.embedding.weight.device), source_commit() or "unknown"
    for task in tasks:
        setting = replace(SETTINGS[task], **changes)
        parts = TASKS[task](books, tokenizer, setting.length, setting.counts)
        for name in methods:
            for rate in RATES.get(name, (0.0,)):
                method = Method(name, model, setting.rank)
                seconds = method.train(parts["train"], setting, rate) if method.trained else 0.0
                valid, *_ = method.scores(parts["valid"])
                test, accuracy, spans = method.scores(parts["test"])
                count = sum(x.numel() for x in method.trained)
                row = Row(task, name, rate, count, round(seconds, 1), valid, test, accuracy, spans, *facts)
                with (out / ROWS).open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                print(f"{task} {name} {rate:g}: validation {valid:.4f}, test {test:.4f}, {accuracy}", flush=True)
                if name == "state":
                    assert method.learned is not None
                    snapshot = method.learned.snapshot(model, tokenizer.document_start, fingerprint(model))
                    snapshot.save(out / f"{task}-{rate:g}.safetensors")


def table(out: Path) -> str:
    """The rows of the best rates, in Markdown."""
    rows = [json.loads(line) for line in (out / ROWS).read_text().splitlines()]
    lines = ["| task | method | trained values | rate | seconds | test loss | accuracy | loss by position |",
             "|---|---|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for task in TASKS:
        for name in METHODS:
            found = [row for row in rows if (row["task"], row["method"]) == (task, name)]
            if not found:
                continue
            best = min(found, key=lambda row: row["valid"])
            accuracy = "" if best["accuracy"] is None else f"{best['accuracy']:.1%}"
            spans = ", ".join(f"{a}-{b} {x:.3f}" for (a, b), x in zip(SPANS, best["spans"]))
            lines.append(
                f"| {task} | {name} | {best['parameters']:,} | {best['rate']:g} | {best['seconds']:.0f} | "
                f"{best['test']:.4f} | {accuracy} | {spans} |"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["base", "run", "table"])
    parser.add_argument("--books", type=Path, help="books.tar.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a saved directory in place of the base model")
    parser.add_argument("--minutes", type=float, default=10.0, help="training of the base model")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    for name in ("steps", "length", "batch"):
        parser.add_argument(f"--{name}", type=int, help=f"in place of the task's own {name}")
    options = parser.parse_args(words)
    if options.part != "table":
        if options.books is None:
            parser.error("--books is missing; accepted: the path of books.tar.xz")
        books = read_books(options.books)
        if options.part == "base":
            base(books, options.out, options.minutes)
            return
        name = options.model or str(options.out / "base")
        given = {key: getattr(options, key) for key in ("steps", "length", "batch")}
        changes = {key: value for key, value in given.items() if value is not None}
        model, tokenizer = retnet.load(name), retnet.load_tokenizer(name)
        run(model, tokenizer, books, options.out, tasks=options.tasks, methods=options.methods, changes=changes)
    print(table(options.out))


if __name__ == "__main__":
    main()
