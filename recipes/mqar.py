"""Multi-query associative recall of stacks with equal parameters: accuracy against number of pairs.

    python recipes/mqar.py tiny --out out/mqar            CPU, about ten minutes
    python recipes/mqar.py full --out out/mqar            one GPU, about 4 minutes
    python recipes/mqar.py conv --out out/mqar            short convolutions, 8 to 256 pairs; one GPU
    python recipes/mqar.py plot --out out/mqar            plot and table from saved rows

    python recipes/mqar.py conv --widths 128 --seeds 0 --out out/mqar-128      one part; several run side by side
    python recipes/mqar.py plot --from out/mqar-64 out/mqar-128 --out out/mqar    parts together

Each stack (`mixers_stacks`) is trained from every seed at every learning rate, on one stream of fresh sequences
(`mqar_task`). The numbers of pairs take turns, shortest sequences first. The results are those of the best learning
rate of each stack at each width, as in the paper, with the range over seeds. The width sets the state size: 2 width^2 /
heads floats per recurrent layer.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from mixers_pictures import LOOKS
from mixers_stacks import PATTERNS, WITHOUT_CONVOLUTION, Size, equal_stacks
from mixers_train import Batch, Run, precision, train
from mqar_task import Recall
from torch import Tensor

from retnet import LanguageModel
from retnet.models.cost import model_cost
from retnet.models.loss import linear_cross_entropy
from retnet.ops.device import hardware
from retnet.plots.frame import facts, save
from retnet.plots.panels import Panel, Scale, draw_panels
from retnet.system.machine import source_commit
from retnet.system.sizes import format_bytes

TEST_SEED = 2**31
REPORT_STEPS = 300  # a multiple of the numbers of tasks, so that every line covers all alike


@dataclass(frozen=True)
class Setting:
    """tasks: (length, pairs), trained in turn and tested; batch: sequences per step of the shortest task; tests:
    sequences per test. tokens: per step at most, which gives longer sequences smaller batches."""

    tasks: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    tests: int
    vocab_size: int = 8192
    heads: int = 4
    attention_heads: int = 1
    num_layers: int = 3
    stacks: tuple[str, ...] = WITHOUT_CONVOLUTION
    tokens: int | None = None

    def sequences(self, length: int) -> int:
        """Sequences of this length per step."""
        return self.batch if self.tokens is None else max(1, min(self.batch, self.tokens // length))

    def size(self, width: int) -> Size:
        return Size(
            width,
            self.heads,
            self.attention_heads,
            self.num_layers,
            self.vocab_size,
            feed_forward=2 * width,
            init="paper",
        )


SETTINGS = {
    "tiny": Setting(((32, 2), (32, 4), (32, 8)), (64,), (3e-3,), (0,), 1500, 64, 256, vocab_size=64),
    "full": Setting(
        ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64)), (64, 128), (1e-3, 3e-3), (0, 1), 3000, 128, 512
    ),
    "conv": Setting(
        ((64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)),
        (64, 128, 256),
        (1e-3, 3e-3),
        (0, 1, 2),
        3000,
        128,
        256,
        num_layers=4,
        tokens=16384,
        stacks=("attention", "RetNet", "RetNet + conv", "gated RetNet + conv", "R R R A + conv"),
    ),
}


def recall_loss(model: LanguageModel, ids: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Mean loss, in nats, of the queried values."""
    return linear_cross_entropy(_asked(model, ids, places), model.head.weight, values)


def _asked(model: LanguageModel, ids: Tensor, places: Tensor) -> Tensor:
    """Hidden states [B, P, D] at the queries."""
    hidden, _ = model.hidden(ids)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


@torch.no_grad()
def accuracy(model: LanguageModel, task: Recall, tests: int, device: torch.device) -> float:
    """Share of queries whose value gets the highest logit, on test sequences."""
    generator = torch.Generator(device).manual_seed(TEST_SEED)
    right = asked = 0
    while asked < tests * task.pairs:
        ids, places, values = task.batch(min(128, tests), generator)
        with precision(device):
            guess = model.logits(_asked(model, ids, places)).argmax(-1)
        right, asked = right + (guess == values).sum().item(), asked + values.numel()
    return right / asked


def batches(setting: Setting, seed: int, device: torch.device) -> Iterator[Batch]:
    generator = torch.Generator(device).manual_seed(seed)
    tasks = [Recall(length, pairs, setting.vocab_size) for length, pairs in setting.tasks]
    while True:
        for task in tasks:
            yield task.batch(setting.sequences(task.length), generator)


def measure(setting: Setting, device: torch.device, graphs: bool) -> Iterator[list[dict]]:
    """Rows per seed and width, whose runs train at once: one row per stack, learning rate and number of pairs."""
    for seed in setting.seeds:
        for width in setting.widths:
            begin = time.perf_counter()
            configs = equal_stacks(setting.size(width), setting.stacks, seed)
            runs = [
                Run(name, config, rate, recall_loss, device, graphs)
                for rate in setting.rates
                for name, config in configs.items()
            ]
            train(runs, batches(setting, seed, device), setting.steps, partial(progress, runs, begin))
            yield [row for run in runs for row in tested(run, setting, width, seed)]
            print(f"width {width}, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)


def progress(runs: list[Run], begin: float, step: int) -> None:
    """One line per `REPORT_STEPS` steps: the losses of all runs since the last line."""
    if (step + 1) % REPORT_STEPS == 0:
        losses = ", ".join(
            f"{run.name} {run.peak:g}: {torch.stack(run.losses[-REPORT_STEPS:]).mean().item():.3f}" for run in runs
        )
        print(f"step {step + 1}, {time.perf_counter() - begin:.0f} s: {losses}", flush=True)


def tested(run: Run, setting: Setting, width: int, seed: int) -> list[dict]:
    longest = max(length for length, _ in setting.tasks)
    common = {
        "stack": run.name,
        "width": width,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "state_bytes": model_cost(run.config, longest).state_bytes,
        "rate": run.peak,
        "seed": seed,
        "final_loss": round(torch.stack(run.losses[-20:]).mean().item(), 4),
        "device": hardware(run.device),
        "commit": source_commit(),
    }
    return [
        common
        | {
            "length": length,
            "pairs": pairs,
            "accuracy": accuracy(run.model, Recall(length, pairs, setting.vocab_size), setting.tests, run.device),
        }
        for length, pairs in setting.tasks
    ]


def read(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def best(rows: list[dict]) -> dict[tuple[str, int], dict[int, list[float]]]:
    """(stack, width) -> pairs -> accuracies of all seeds, at the learning rate with the best mean accuracy."""
    groups: dict[tuple[str, int], dict[float, dict[int, list[float]]]] = {}
    for row in rows:
        by_rate = groups.setdefault((row["stack"], int(row["width"])), {})
        by_rate.setdefault(float(row["rate"]), {}).setdefault(int(row["pairs"]), []).append(float(row["accuracy"]))
    return {
        key: max(by_rate.values(), key=lambda pairs: sum(map(statistics.mean, pairs.values())))
        for key, by_rate in groups.items()
    }


def table(rows: list[dict]) -> str:
    """Markdown: mean accuracy over seeds in percent."""
    found, pairs = best(rows), sorted({int(row["pairs"]) for row in rows})
    facts = {(row["stack"], int(row["width"])): (int(row["parameters"]), int(row["state_bytes"])) for row in rows}
    lines = [
        f"| stack | width | parameters | state | {' | '.join(f'{p} pairs' for p in pairs)} |",
        "|---|---:|---:|---:|" + "---:|" * len(pairs),
    ]
    for (name, width), accuracies in found.items():
        parameters, state = facts[name, width]
        cells = " | ".join(f"{100 * statistics.mean(accuracies[p]):.1f}" for p in pairs)
        lines.append(f"| {name} | {width} | {parameters} | {format_bytes(state)} | {cells} |")
    return "\n".join(lines)


def origin(rows: list[dict]) -> tuple[str, str]:
    """The devices and the commits of rows, for a caption; empty where rows do not say."""
    devices, commits = (
        " and ".join(dict.fromkeys(filter(None, (r.get(key) for r in rows)))) for key in ("device", "commit")
    )
    return devices, f"commit {commits}" if commits else ""


def picture(rows: list[dict], path: Path) -> None:
    """One panel per width. Lines are means over seeds, bands their range."""
    found, panels = best(rows), []
    for width in sorted({int(row["width"]) for row in rows}):
        states = (row for row in rows if int(row["width"]) == width and "RetNet" in row["stack"])
        state = next((f", state {format_bytes(int(row['state_bytes']))}" for row in states), "")
        lines = {
            name: [
                (pairs, 100 * statistics.mean(seen), 100 * min(seen), 100 * max(seen))
                for pairs, seen in sorted(accuracies.items())
            ]
            for (name, of), accuracies in found.items()
            if of == width
        }
        pairs, accuracy = Scale("pairs to recall", log=2), Scale("queries answered, %", limits=(-3, 103))
        panels.append(Panel(f"Width {width}{state}", pairs, accuracy, lines))
    seeds = len({row["seed"] for row in rows})
    under = facts(
        "stacks of equal parameters at each width",
        f"mean and range of {seeds} seeds" if seeds > 1 else "1 seed",
        "state of RetNet in float32",
        *origin(rows),
    )
    save(draw_panels(panels, LOOKS, "Multi-query associative recall", under), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[*SETTINGS, "plot"])
    parser.add_argument("--out", type=Path, default=Path("out/mqar"))
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the setting's)")
    parser.add_argument("--stacks", nargs="+", choices=PATTERNS, default=None)
    for name, kind in (("widths", int), ("rates", float), ("seeds", int)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=None, help="(default: the setting's)")
    parser.add_argument("--from", type=Path, nargs="+", default=None, dest="parts", help="folders to plot together")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    rows_path = options.out / "mqar.csv"
    if options.setting == "plot":
        rows = [row for folder in options.parts or [options.out] for row in read(folder / "mqar.csv")]
    else:
        setting = SETTINGS[options.setting]
        given = {name: getattr(options, name) for name in ("stacks", "widths", "rates", "seeds")}
        chosen = {name: tuple(values) for name, values in given.items() if values is not None}
        setting = replace(setting, steps=options.steps or setting.steps, **chosen)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = []
        options.out.mkdir(parents=True, exist_ok=True)
        for found in measure(setting, device, graphs=not options.eager):
            rows += found
            with rows_path.open("w", newline="") as file:  # an interrupted run keeps its rows
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    print(table(rows))
    picture(rows, options.out / "mqar.png")


if __name__ == "__main__":
    main()
