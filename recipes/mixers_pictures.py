"""Looks of the stacks that the mixer recipes compare, and a plot of their quality against the size of their state.

    python recipes/mixers_pictures.py recipes/results/mixers/mixers.csv --png docs/pictures/mixers.png

The rows are those that `mixers.py` writes. A look is the colour of a stack's mixers, dashed with a short convolution.
"""

import argparse
import csv
import statistics
from pathlib import Path

from mixers_stacks import PATTERNS

from retnet.plots.frame import facts, save
from retnet.plots.numbers import bytes_of, short, tokens
from retnet.plots.palette import Look, look
from retnet.plots.panels import Panel, Scale, draw_panels

LOOKS: dict[str, Look] = {
    "attention": look("attention"),
    "RetNet": look("retention"),
    "RetNet + conv": look("retention", 1),
    "gated RetNet": look("gated retention"),
    "gated RetNet + conv": look("gated retention", 1),
    "Mamba-2": look("mamba"),
    "RetNet + attention": look("hybrid"),
    "R R R A + conv": look("hybrid", 1),
    "tri-mixer": look("tri-mixer"),
}
if set(LOOKS) != set(PATTERNS):
    raise AssertionError(f"stacks and looks differ: {sorted(set(LOOKS) ^ set(PATTERNS))}")
SHOWN = 1.5  # highest loss that a panel shows / median loss; higher ones are written into its title


def save_rows(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def trade_offs(rows: list[dict], path: Path) -> None:
    """Loss at and beyond the training length, and exact recall, against the bytes of a sequence's state."""
    first = rows[0]
    state = Scale(f"state after {tokens(float(first['context']))} tokens", bytes_of, 2)

    def losses(title: str, key: str) -> Panel:
        values = {row["stack"]: float(row[key]) for row in rows if row[key] != ""}
        most = SHOWN * statistics.median(values.values())
        outside = [f"{name} {value:.2f}" for name, value in values.items() if value > most]
        shown = {row["stack"]: [(float(row["state_bytes"]), values[row["stack"]])]
                 for row in rows if values.get(row["stack"], most + 1) <= most}  # fmt: skip
        above = f"\n(above: {', '.join(outside)})" if outside else "\n"
        return Panel(title + above, state, Scale("bits per byte"), shown)

    recalled = {row["stack"]: [(float(row["state_bytes"]), float(row["recalled_percent"]))]
                for row in rows if row["recalled_percent"] != ""}  # fmt: skip
    pairs = next((row["pairs"] for row in rows if row["pairs"] != ""), "")
    panels = [
        losses(f"Rows of {int(first['length']):,} bytes", "bits_per_byte"),
        losses(f"After {int(first['stretched']):,} bytes", "bits_per_byte_stretched"),
        Panel(f"Recall of {pairs} pairs\n", state, Scale("queries answered, %", limits=(-5, 105)), recalled),
    ]
    count = statistics.mean(float(row["parameters"]) for row in rows)
    under = facts(f"{short(count)} parameters each", *(first.get(key) for key in ("device", "data", "date", "origin")))
    save(draw_panels(panels, LOOKS, "Mixers in language models: quality and state", under), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="mixers.csv of `mixers.py`")
    parser.add_argument("--png", type=Path, required=True)
    options = parser.parse_args()
    with options.csv.open(newline="") as file:
        trade_offs(list(csv.DictReader(file)), options.png)


if __name__ == "__main__":
    main()
