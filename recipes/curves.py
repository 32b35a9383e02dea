"""Plots of several training runs: validation loss against tokens, or perplexity against the learning rate.

    python recipes/curves.py out/retnet-125m_enwiki2015_h200 out/llama-125m_enwiki2015_h200 --png out/curves.png
    python recipes/curves.py --rates recipes/results/wikipedia_125m.csv --png docs/pictures/wikipedia.png

The arguments are folders that `retnet train` wrote. The legend has the first part of their names. Rates are rows of a
CSV file: model, learning_rate, perplexity, and what the caption says.
"""

import argparse
import csv
import json
from pathlib import Path

from retnet.plots.frame import facts, save
from retnet.plots.numbers import short
from retnet.plots.palette import Look, look
from retnet.plots.panels import Panel, Scale, draw_panels

KINDS = {"llama": "attention", "hybrid": "hybrid", "gated": "gated retention", "mamba": "mamba"}


def points(folder: Path) -> list[tuple[float, float]]:
    """(tokens, validation bits per byte), from the training.json of a run."""
    run = json.loads((folder / "training.json").read_text())
    tokens_per_step = run["summary"]["tokens"] / run["summary"]["steps"]
    found = {entry["step"]: entry["eval_bits_per_byte"] for entry in run["log"] if "eval_bits_per_byte" in entry}
    return [(step * tokens_per_step, bits) for step, bits in sorted(found.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders that `retnet train` wrote")
    parser.add_argument("--rates", type=Path, metavar="CSV", help="plot perplexity against the rates of these rows")
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    if bool(options.runs) == bool(options.rates):
        parser.error("give folders of runs, or --rates with a CSV file")
    if options.rates:
        with options.rates.open(newline="") as file:
            by_rate(list(csv.DictReader(file)), options.png)
        return
    lines = {}
    for folder in options.runs:
        if not (line := points(folder)):
            parser.error(f"{folder / 'training.json'} has no validation loss; set eval_strategy and eval_steps")
        lines[folder.name.split("_")[0]] = line
    panel = Panel("", Scale("tokens of training", short), Scale("validation loss, bits per byte"), lines)
    data = " and ".join(dict.fromkeys(folder.name.split("_")[1] for folder in options.runs if "_" in folder.name))
    save(draw_panels([panel], looks(list(lines)), "Validation loss by model", facts(data)), options.png)


def by_rate(rows: list[dict], path: Path) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["model"], []).append((float(row["learning_rate"]), float(row["perplexity"])))
    panel = Panel("", Scale("learning rate", log=10), Scale("validation perplexity per token"), lines)
    under = facts(*(rows[0].get(key) for key in ("data", "tokens", "device", "versions", "date")))
    save(draw_panels([panel], looks(list(lines)), "Perplexity by learning rate", under), path)


def looks(models: list[str]) -> dict[str, Look]:
    """The look of each model by its name: models of one kind are variants."""
    found: dict[str, Look] = {}
    counts: dict[str, int] = {}
    for model in models:
        rival = next((rival for word, rival in KINDS.items() if word in model), "retention")
        found[model] = look(rival, counts.get(rival, 0))
        counts[rival] = counts.get(rival, 0) + 1
    return found


if __name__ == "__main__":
    main()
