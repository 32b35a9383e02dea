"""Comparison of mixers in language models with equal parameters, trained on the same bytes.

    python recipes/mixers.py tiny --out out/mixers        CPU, minutes
    python recipes/mixers.py full --out out/mixers        one GPU, about 3 minutes
    python recipes/mixers.py plot --out out/mixers [--recall out/mqar/mqar.csv]     plot and table from saved results

Three questions. How fast does each model learn (validation loss against tokens)? How much does it gain from context
(loss by position, up to four times the training length)? How large is its state (bytes against context length)? With
`--recall`, the table also has the accuracies of `mqar.py`.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from mixers_pictures import LOOKS, save_rows
from mixers_stacks import Size, equal_stacks
from mixers_train import Batch, Run, precision, train
from mqar import best
from torch import Tensor

from retnet import LanguageModel
from retnet.data import DOCUMENT_START, Document, find_documents, split_documents
from retnet.models.cost import model_cost, parameter_counts
from retnet.ops.device import hardware
from retnet.plots.frame import facts, save
from retnet.plots.numbers import bytes_of, short, tokens
from retnet.plots.panels import Panel, Scale, draw_panels
from retnet.system.sizes import format_bytes

STRETCH = 4  # longest tested context / training length
CONTEXTS = tuple(2**n for n in range(7, 18))  # context lengths in the plot of state sizes
SERVED = 32768  # context length of the costs in the table


@dataclass(frozen=True)
class Setting:
    """A step trains on `batch` sequences of `length` tokens. A model is scored `points` times, on `tests` windows."""

    size: Size
    length: int
    batch: int
    steps: int
    rate: float
    tests: int
    points: int


SETTINGS = {
    "tiny": Setting(Size(64, num_layers=3, feed_forward=128), 128, 8, 240, 3e-3, 16, 8),
    "full": Setting(Size(), 1024, 64, 1500, 2e-3, 64, 15),
}


def tokens_of(documents: tuple[Document, ...], device: torch.device) -> Tensor:
    """All documents as one sequence of byte tokens, each after a document start."""
    parts = []
    for document in documents:
        parts += [torch.tensor([DOCUMENT_START], dtype=torch.int16)]
        parts += [torch.frombuffer(bytearray(document.read()), dtype=torch.uint8).to(torch.int16)]
    return torch.cat(parts).to(device)


def windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """[len(starts), length] token ids."""
    return tokens[starts[:, None] + torch.arange(length, device=tokens.device)].long()


def batches(tokens: Tensor, setting: Setting, seed: int) -> Iterator[Batch]:
    generator = torch.Generator(tokens.device).manual_seed(seed)
    last = len(tokens) - setting.length - 1
    while True:
        starts = torch.randint(last, (setting.batch,), generator=generator, device=tokens.device)
        yield (windows(tokens, starts, setting.length + 1),)


def next_byte_loss(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.loss(ids[:, :-1], ids[:, 1:])


@torch.no_grad()
def bits_by_position(model: LanguageModel, tokens: Tensor, tests: int, length: int) -> Tensor:
    """Bits per byte at each position, [length]: the mean over `tests` windows spread evenly over the text."""
    starts = torch.linspace(0, len(tokens) - length - 2, tests, device=tokens.device).long()
    total = torch.zeros(length, dtype=torch.float64, device=tokens.device)
    for part in starts.split(8):
        ids = windows(tokens, part, length + 1)
        with precision(tokens.device):
            logits = model(ids[:, :-1]).logits
        total += F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none").double().sum(0)
    return total.cpu() / (tests * math.log(2))


def measure(setting: Setting, source: str, device: torch.device, graphs: bool) -> dict:
    """Results for the plot and the table, as plain data."""
    split = split_documents(find_documents(source))
    train_tokens, valid_tokens = tokens_of(split.train, device), tokens_of(split.valid, device)
    configs = equal_stacks(setting.size)
    runs = [Run(name, config, setting.rate, next_byte_loss, device, graphs) for name, config in configs.items()]
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in configs}
    begin, every = time.perf_counter(), max(1, setting.steps // setting.points)

    def report(step: int) -> None:
        if (step + 1) % every:
            return
        for run in runs:
            run.wait()
            bits = bits_by_position(run.model, valid_tokens, setting.tests, setting.length).mean().item()
            curves[run.name].append(((step + 1) * setting.batch * setting.length, bits))
        scores = ", ".join(f"{name} {points[-1][1]:.3f}" for name, points in curves.items())
        print(f"step {step + 1}, {time.perf_counter() - begin:.0f} s, bits per byte: {scores}", flush=True)

    train(runs, batches(train_tokens, setting, 0), setting.steps, report)
    longest = STRETCH * setting.length
    positions = {run.name: bits_by_position(run.model, valid_tokens, setting.tests, longest) for run in runs}
    return {
        "data": source,
        "device": hardware(device),
        "train_bytes": len(train_tokens),
        "length": setting.length,
        "tokens": setting.steps * setting.batch * setting.length,
        "curves": curves,
        "positions": {name: bucketed(bits) for name, bits in positions.items()},
        "parameters": {name: parameter_counts(config)["total"] for name, config in configs.items()},
        "state_bytes": {name: [model_cost(c, T).state_bytes for T in CONTEXTS] for name, c in configs.items()},
        "served_bytes": {name: model_cost(config, SERVED).state_bytes for name, config in configs.items()},
        "served_flops": {name: model_cost(config, SERVED).decode_flops for name, config in configs.items()},
    }


def bucketed(bits: Tensor) -> list[tuple[int, float]]:
    """(last position, mean) of positions 1-16, 17-32, 33-64, ...: the loss with a context of that length."""
    edges = [0, *(2**n for n in range(4, int(math.log2(len(bits))) + 1))]
    return [(high, bits[low:high].mean().item()) for low, high in pairwise(edges)]


def summary(found: dict, recall: list[dict]) -> list[dict]:
    """One row per stack: the results of the table, as `mixers_pictures.py` draws them."""
    length, recalled = found["length"], {}
    for (name, width), accuracies in best(recall).items():
        recalled.setdefault(name, {})[width] = accuracies
    rows = []
    for name, count in found["parameters"].items():
        places = dict(map(tuple, found["positions"][name]))
        seen, pairs = [], ""
        if widest := recalled.get(name, {}):
            accuracies = widest[max(widest)]
            pairs = max(accuracies)
            seen = accuracies[pairs]
        rows.append(
            {
                "stack": name,
                "parameters": count,
                "length": length,
                "bits_per_byte": found["curves"][name][-1][1],
                "bits_per_byte_at_length": places[length],
                "stretched": STRETCH * length,
                "bits_per_byte_stretched": places[STRETCH * length],
                "pairs": pairs,
                "recalled_percent": 100 * sum(seen) / len(seen) if seen else "",
                "context": SERVED,
                "state_bytes": found["served_bytes"][name],
                "decode_mflop": found["served_flops"][name] / 1e6,
                "device": found.get("device", ""),
            }
        )
    return rows


def table(found: dict, recall: list[dict]) -> str:
    """Markdown, one row per stack."""
    length = found["length"]
    lines = [
        f"| stack | parameters | bits per byte, {length} tokens | at position {length} | at {STRETCH * length} "
        f"| recall of most pairs, % | state at {SERVED} tokens | decode MFLOP per token at {SERVED} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in summary(found, recall):
        exact = f"{row['recalled_percent']:.0f} ({row['pairs']} pairs)" if row["pairs"] else ""
        lines.append(
            f"| {row['stack']} | {row['parameters']} | {row['bits_per_byte']:.3f} "
            f"| {row['bits_per_byte_at_length']:.3f} | {row['bits_per_byte_stretched']:.3f} | {exact} "
            f"| {format_bytes(row['state_bytes'])} | {row['decode_mflop']:.2f} |"
        )
    return "\n".join(lines)


def picture(found: dict, path: Path) -> None:
    state = {name: list(zip(CONTEXTS, line, strict=True)) for name, line in found["state_bytes"].items()}
    # The first points are far above the differences of interest.
    late = sorted(bits for line in found["curves"].values() for _, bits in line[1:])
    lowest, highest = (late[0], late[-1]) if late else (0.0, 8.0)
    contexts = Scale("context length, tokens", tokens, 2)
    panels = [
        Panel(
            "Validation loss", Scale("tokens of training", short),
            Scale("bits per byte", limits=(lowest - 0.05, highest + 0.1)), found["curves"], markers=False,
        ),
        Panel(
            "Loss by position", contexts, Scale("bits per byte", limits=(lowest - 0.15, max(2.3, lowest + 0.5))),
            found["positions"], limit=(found["length"], "training length"),
        ),
        Panel("State size", contexts, Scale("bytes per sequence", bytes_of, 2), state, markers=False),
    ]  # fmt: skip
    count = sum(found["parameters"].values()) / len(found["parameters"])
    under = facts(
        f"{short(count)} parameters each", f"{short(found['tokens'])} bytes of training, {found['data']}",
        found.get("device"), "state in float32",
    )  # fmt: skip
    save(draw_panels(panels, LOOKS, "Language models that differ in their mixers", under), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[*SETTINGS, "plot"])
    parser.add_argument("--data", default="stdlib", help="as for `retnet train`")
    parser.add_argument("--out", type=Path, default=Path("out/mixers"))
    parser.add_argument("--recall", type=Path, default=None, help="mqar.csv of mqar.py, for the table")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the setting's)")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    figures = options.out / "mixers.json"
    if options.setting == "plot":
        found = json.loads(figures.read_text())
    else:
        setting = SETTINGS[options.setting]
        setting = replace(setting, steps=options.steps or setting.steps)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = measure(setting, options.data, device, graphs=not options.eager)
        options.out.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(found))
    recall = []
    if options.recall:
        with options.recall.open() as file:
            recall = list(csv.DictReader(file))
    print(table(found, recall))
    save_rows(summary(found, recall), options.out / "mixers.csv")
    picture(found, options.out / "mixers.png")


if __name__ == "__main__":
    main()
