"""muP: does the best learning rate of a narrow model stay the best at other widths?

    python recipes/mup.py quick --out out/mup                      CPU, about 20 minutes of one core
    python recipes/mup.py full --data out/packed --out out/mup     one GPU, about 400 s
    python recipes/mup.py plot --from out/mup [--png mup.png]      tables and plot from saved rows

Two measurements of models of one depth and several widths, in the ordinary parametrization and under muP
(`retnet.models.mup`), whose base width is the narrowest:

1. Coordinate check: how far activations move in a few steps at one learning rate, by width. Under muP the distance is
   the same at every width; otherwise it grows.
2. Transfer: validation loss over learning rates on a grid of powers of two. The best rate at the base width costs, at
   another width, the difference from the loss at that width's own best rate.

Heads have equal widths, so wider models have more. At the base width the two parametrizations are one, and its models
are trained once. `--data` is a folder of `quality.py pack`; without it, the bytes of the standard library.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mixers_pictures import save_rows
from mixers_train import Run, precision, train
from quality_data import Corpus, batches, load, source_bytes
from torch import Tensor

from retnet import LanguageModel, ModelConfig
from retnet.models.mup import with_mup
from retnet.models.presets import FORMS, retnet_config
from retnet.ops.device import hardware
from retnet.plots.frame import facts, save
from retnet.plots.palette import look
from retnet.plots.panels import Panel, Scale, draw_panels

KINDS = ("ordinary", "muP")
MOVED_STEPS = 4  # of the coordinate check
MOST_RUNS = 8  # at a time on a GPU: the grid of one width
HEIGHT = 0.6  # nats above the lowest loss that the picture shows


@dataclass(frozen=True)
class Setting:
    """`form`: of the presets. A step trains on `batch` rows of `length` tokens. moved_rate: of the coordinate check."""

    form: str
    widths: tuple[int, ...]
    head_dim: int
    num_layers: int
    length: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    moved_rate: float
    valid_rows: int
    logit_scale: float = 1.0  # at the base width


def powers(low: int, high: int) -> tuple[float, ...]:
    return tuple(2.0**n for n in range(low, high + 1))


SETTINGS = {
    "quick": Setting("-conv", (64, 128, 256), 64, 2, 64, 8, 150, powers(-8, -3), 2**-7, 128),
    "full": Setting("-conv", (128, 256, 512, 768), 64, 4, 512, 32, 600, powers(-12, -5), 2**-7, 128),
}


def config_of(setting: Setting, kind: str, width: int, vocab_size: int) -> ModelConfig:
    form = FORMS[setting.form]
    heads = max(1, width // setting.head_dim)
    options = {"vocab_size": vocab_size, "logit_scale": setting.logit_scale}
    config = retnet_config(f"{kind} {width}", setting.num_layers, width, heads, form=form, **options)
    return with_mup(config, setting.widths[0]) if kind == "muP" else config


def next_token_loss(model: LanguageModel, rows: Tensor) -> Tensor:
    return model.loss(rows[:, :-1], rows[:, 1:])


def measure(setting: Setting, corpus: Corpus, device: torch.device, graphs: bool) -> Iterator[list[dict]]:
    """Rows of the coordinate check, then those of each width's grid of rates."""
    train_rows, valid = corpus.train.rows(setting.length), corpus.valid.spread_rows(setting.length, setting.valid_rows)
    yield [
        {"measured": "distance", "kind": kind, "width": width, "place": place, "value": value}
        for width in setting.widths
        for kind in KINDS
        for place, value in distances(config_of(setting, kind, width, corpus.vocab_size), setting, valid, device)
    ]
    for width in setting.widths:
        for kind in KINDS if width > setting.widths[0] else KINDS[:1]:
            config = config_of(setting, kind, width, corpus.vocab_size)
            for rates in _several(setting.rates, MOST_RUNS if device.type == "cuda" else 1):
                runs = [Run(kind, config, rate, next_token_loss, device, graphs) for rate in rates]
                rows = ((batch,) for batch in batches(train_rows, setting.batch))
                train(runs, rows, setting.steps)
                losses = [valid_loss(run.model, valid, setting.batch) for run in runs]
                yield [
                    {"measured": "loss", "kind": name, "width": width, "place": rate, "value": loss}
                    for rate, loss in zip(rates, losses, strict=True)
                    for name in ((kind,) if width > setting.widths[0] else KINDS)
                ]


def _several(rates: tuple[float, ...], most: int) -> Iterator[tuple[float, ...]]:
    for start in range(0, len(rates), most):
        yield rates[start : start + most]


def distances(config: ModelConfig, setting: Setting, rows: Tensor, device: torch.device) -> Iterator[tuple[str, float]]:
    """How far the residual stream after each layer, and the logits, move in a few steps on one batch: root mean square
    of the differences."""
    run = Run("", config, setting.moved_rate, next_token_loss, device, graphs=False)
    rows = rows[: setting.batch].long()
    before = activations(run.model, rows)
    for _ in range(MOVED_STEPS):
        run.step((rows,), setting.moved_rate)
    run.wait()
    for (place, old), new in zip(before.items(), activations(run.model, rows).values(), strict=True):
        yield place, (new - old).square().mean().sqrt().item()


@torch.no_grad()
def activations(model: LanguageModel, rows: Tensor) -> dict[str, Tensor]:
    """By place, from the embedding to the logits, in float32."""
    inner: list[Tensor] = []
    with precision(rows.device):
        hidden, _ = model.hidden(rows[:, :-1], inner=inner)
        found = {"embedding" if i == 0 else f"layer {i}": x.float() for i, x in enumerate(inner)}
        return {**found, "logits": model.logits(hidden).float()}


@torch.no_grad()
def valid_loss(model: LanguageModel, rows: Tensor, batch: int) -> float:
    """Nats per token; infinite for a run that diverged."""
    total = 0.0
    for part in rows.long().split(batch):
        with precision(rows.device):
            total += next_token_loss(model, part).item() * len(part)
    return total / len(rows) if math.isfinite(total) else math.inf


def growth(rows: Iterable[dict], kind: str, place: str) -> float:
    """The power of the width with which a distance grows, by least squares."""
    points = [
        (math.log(int(row["width"])), math.log(float(row["value"])))
        for row in rows
        if (row["measured"], row["kind"], row["place"]) == ("distance", kind, place)
    ]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def losses_of(rows: Iterable[dict], kind: str, width: int) -> dict[float, float]:
    return {
        float(row["place"]): float(row["value"])
        for row in rows
        if (row["measured"], row["kind"], int(row["width"])) == ("loss", kind, width)
    }


def best_rate(losses: dict[float, float]) -> str:
    """The rate of the lowest loss as a power of two, with a sign if it is the first or the last of the grid."""
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    sign = "at most " if best == rates[0] else "at least " if best == rates[-1] else ""
    return f"{sign}2^{math.log2(best):.0f}"


def tables(rows: list[dict]) -> str:
    """Markdown: the growth of distances, then per width the best rates and what the base width's rate costs."""
    widths = sorted({int(row["width"]) for row in rows})
    places = list(dict.fromkeys(row["place"] for row in rows if row["measured"] == "distance"))
    lines = [f"| power of the width | {' | '.join(places)} |", "|---|" + "---:|" * len(places)]
    for kind in KINDS:
        lines.append(f"| {kind} | {' | '.join(f'{growth(rows, kind, place):+.2f}' for place in places)} |")
    lines += ["", "| | width | best rate | loss there | loss at the base's best rate | cost |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for kind in KINDS:
        found = {width: losses_of(rows, kind, width) for width in widths}
        found = {width: losses for width, losses in found.items() if losses}
        usual = min(found[widths[0]], key=found[widths[0]].__getitem__) if widths[0] in found else math.nan
        for width, losses in found.items():
            lowest, there = min(losses.values()), losses.get(usual, math.nan)
            lines.append(
                f"| {kind} | {width} | {best_rate(losses)} | {lowest:.3f} | {there:.3f} | {there - lowest:.3f} |"
            )
    return "\n".join(lines)


def picture(rows: list[dict], path: Path, under: str) -> None:
    widths = sorted({int(row["width"]) for row in rows})
    rivals = ("attention", "mamba", "hybrid", "retention", "tri-mixer")
    looks = {f"width {width}": look(rivals[i % len(rivals)]) for i, width in enumerate(widths)}
    low = min(float(row["value"]) for row in rows if row["measured"] == "loss")
    panels = []
    for kind in KINDS:
        lines = {}
        for width in widths:
            points = sorted(losses_of(rows, kind, width).items())
            lines[f"width {width}"] = [(rate, loss) for rate, loss in points if loss < low + 2 * HEIGHT]
        loss = Scale("validation loss, nats per token", limits=(low - 0.1 * HEIGHT, low + HEIGHT))
        panels.append(Panel(kind, Scale("learning rate", lambda rate: f"{rate:.2g}", 2), loss, lines))
    save(draw_panels(panels, looks, "Learning rates by width", under), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[*SETTINGS, "plot"])
    parser.add_argument("--out", type=Path, default=Path("out/mup"))
    parser.add_argument("--data", type=Path, default=None, help="folder of `quality.py pack` (default: stdlib's bytes)")
    parser.add_argument("--form", choices=FORMS, default=None, help="of the presets (default: the setting's)")
    parser.add_argument("--steps", type=int, default=None, help="(default: the setting's)")
    parser.add_argument("--logit-scale", type=float, default=None, help="at the base width (default: 1)")
    for name, kind in (("widths", int), ("exponents", int)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=None, help="(default: the setting's)")
    parser.add_argument("--from", type=Path, default=None, dest="saved", help="folder to plot (default: --out)")
    parser.add_argument("--png", type=Path, default=None, help="the plot (default: mup.png in --out)")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    saved = (options.saved or options.out) / "mup.csv"
    if options.setting != "plot":
        setting = SETTINGS[options.setting]
        given = {"form": options.form, "steps": options.steps, "logit_scale": options.logit_scale}
        given |= {"widths": options.widths and tuple(options.widths)}
        given |= {"rates": options.exponents and tuple(2.0**n for n in sorted(options.exponents))}
        setting = replace(setting, **{name: value for name, value in given.items() if value is not None})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        corpus = source_bytes(device) if options.data is None else load(options.data, device)
        origin = {"form": "retnet" + setting.form, "layers": setting.num_layers, "steps": setting.steps}
        origin |= {"tokens": setting.steps * setting.batch * setting.length, "device": hardware(device)}
        origin |= {"torch": torch.__version__, "logit_scale": setting.logit_scale}
        rows, begin = [], time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        for found in measure(setting, corpus, device, graphs=not options.eager):
            rows += [row | origin for row in found]
            save_rows(rows, saved)  # an interrupted run keeps its rows
            last, seconds = found[-1], time.monotonic() - begin
            print(f"{seconds:5.0f} s  {last['kind']} {last['width']} {last['place']} {last['value']:.4f}", flush=True)
    with saved.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    print(tables(rows))
    under = facts(
        f"{first['form']}, {first['layers']} layers", f"{int(first['tokens']):,} tokens per run", "1 seed", "AdamW",
        first["device"], f"torch {first['torch']}",
    )  # fmt: skip
    picture(rows, options.png or options.out / "mup.png", under)


if __name__ == "__main__":
    main()
