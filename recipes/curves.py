"""Plot of several training runs: validation loss against tokens.

    python recipes/curves.py out/retnet-125m_enwiki2015_h200 out/llama-125m_enwiki2015_h200 --png out/wikipedia.png

The arguments are folders that `retnet train` wrote. The legend has the first part of their names.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def points(folder: Path) -> list[tuple[float, float]]:
    """(millions of tokens, validation bits per byte), from the training.json of a run."""
    run = json.loads((folder / "training.json").read_text())
    tokens_per_step = run["summary"]["tokens"] / run["summary"]["steps"]
    found = {entry["step"]: entry["eval_bits_per_byte"] for entry in run["log"] if "eval_bits_per_byte" in entry}
    return [(step * tokens_per_step / 1e6, bits) for step, bits in sorted(found.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that `retnet train` wrote")
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for folder, marker in zip(options.runs, "osDv^P" * len(options.runs)):
        if not (line := points(folder)):
            parser.error(f"{folder / 'training.json'} has no validation loss; set eval_strategy and eval_steps")
        axes.plot(*zip(*line), marker=marker, markersize=4, label=folder.name.split("_")[0])
    axes.set(xlabel="million tokens", ylabel="validation loss, bits per byte")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    options.png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.png, dpi=150)


if __name__ == "__main__":
    main()
