"""Speedrun: the shortest training, in seconds on one GPU, to a fixed validation loss.

    python recipes/speedrun.py --data out/packed                                   our entry, one H200, about 10 minutes
    python recipes/speedrun.py gated-conv+sigmoid:muon:4e-3:0:2400 --data out/packed          another entry
    python recipes/speedrun.py retnet:muon:4e-3:0:40 --tiny --target 5             a trial on a CPU, seconds

The loss to reach is that of the Transformer: `llama:muon:4e-3` of `quality.py` after 172 million tokens, 124 million
parameters, the mean over its seeds. Data, rows, precision and the loss are those of `quality.py`: whoever enters may
change the stack, the optimizer, its rates and the number of steps, and trains on the same tokens in the same order.

The clock counts training alone. It starts after the blocks are compiled and stops for each validation, which reads 256
rows of 2,048 tokens. The schedule ends at the entry's last step; the run ends at the first validation at or below the
target. The exit code is 1 if no validation was.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from quality_data import batches
from quality_measure import mean_loss
from quality_run import Session
from quality_stacks import SHAPES, stack
from quality_train import Arm, train

from retnet.models.cost import parameter_counts

TARGET = 3.4351  # nats per token: the mean of the finished rows of RIVAL in results/quality_125m.jsonl
RIVAL = ("llama", "muon", 4e-3, 2624)  # stack, optimizer, rate, steps
ENTRY = "hybrid+sigmoid+narrow:muon:4e-3:0:2450"
LATE = 0.8  # of the steps, before which nothing is validated
VALIDATIONS = 40  # evenly spread over the rest


def rival_losses(file: Path) -> list[float]:
    """The validation losses that the target is the mean of, one per seed."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    same = [row for row in rows if (row["stack"], row["optimizer"], row["rate"], row["steps"]) == RIVAL]
    return [row["valid_loss"] for row in same if row["status"] == "done" and row["shape"] == "125m"]


def race(session: Session, arm: Arm, target: float) -> dict:
    """Train until the target or the last step: the entry's row."""
    config = replace(stack(arm.stack, session.shape), seed=arm.seed)
    every = max(1, round((1 - LATE) * arm.steps / VALIDATIONS))
    row = {"entry": arm.name, "target": target, "reached": False, "parameters": parameter_counts(config)["total"]}
    row |= session.facts | {"data": session.data, "curve": []}

    def report(model, step: int, spent: float, loss: float) -> bool:
        if step < LATE * arm.steps:
            return True
        valid = mean_loss(model, session.corpus.valid, session.sizes, session.sizes.valid_rows)
        tokens = step * session.rows_per_step * session.sizes.length
        row["curve"].append({"step": step, "tokens": tokens, "seconds": spent, "train": loss, "valid": valid})
        row["reached"] = valid <= target
        print(f"{arm.name} {step}: train {loss:.4f}, valid {valid:.4f} of {target:.4f}, {spent:.1f} s", flush=True)
        return not row["reached"]

    rows = batches(session.train_rows, session.rows_per_step)
    train(arm, config, rows, session.blocks, session.device, every, report)
    return row


def leaderboard_row(row: dict) -> str:
    """The line of `recipes/README.md`."""
    last = row["curve"][-1]
    seconds = f"{last['seconds']:.1f}" if row["reached"] else f"not reached in {last['seconds']:.1f}"
    versions = f"{row['commit']}, torch {row['versions']['torch']}"
    return (
        f"| {seconds} | `{row['entry']}` | {last['valid']:.4f} | {last['step']:,} | {last['tokens'] / 1e6:.0f}M "
        f"| {row['device']} | {versions} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", nargs="?", default=ENTRY, metavar="ARM", help=f"as in quality.py (default: {ENTRY})")
    parser.add_argument("--data", type=Path, default=Path("out/packed"), help="a folder that `quality.py pack` wrote")
    parser.add_argument("--out", type=Path, default=Path("out/speedrun"))
    parser.add_argument("--target", type=float, default=TARGET, help=f"nats per token (default: {TARGET})")
    parser.add_argument("--eager", action="store_true", help="do not compile blocks")
    parser.add_argument("--tiny", action="store_true", help="width 64, four layers, bytes: a trial on a CPU")
    parser.add_argument("--commit", default=None, help="recorded in the row (default: git's)")
    options = parser.parse_args()
    if not options.tiny and not options.data.is_dir():
        parser.error(f"{options.data} is no folder; accepted: one that `python recipes/quality.py pack` wrote")
    begin = time.monotonic()
    shared = {"shape": next(iter(SHAPES)), "steps": None, "tokens": None, "deadline": None, "abandon": None, "done": []}
    session = Session(argparse.Namespace(**shared | vars(options)), begin)
    row = race(session, Arm.parse(options.entry, session.steps), options.target)
    row["wall_seconds"] = time.monotonic() - begin  # with loading, compilation and validation
    (options.out / f"{int(time.time())}.json").write_text(json.dumps(row))
    print(leaderboard_row(row))
    if not row["reached"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
