"""Results of `quality.py`: one JSON file per arm, written anew at every point of its curve.

An arm that is running holds a lock, so that several processes may take arms from one queue. The lock ends with its
process: an arm that was killed is taken again, and its curve stays in its file until then.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quality_train import Arm

FINISHED = ("done", "abandoned")  # not run again


def row_path(out: Path, arm: Arm) -> Path:
    return out / (arm.name.replace(":", "_").replace("+", "-with-") + ".json")


def save(out: Path, arm: Arm, row: dict) -> None:
    path = row_path(out, arm)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row))
    os.replace(part, path)


def load_rows(places: list[Path]) -> list[dict]:
    """The rows of folders, and of files with one row per line, sorted by name. A later place replaces earlier rows."""
    rows = {}
    for place in places:
        texts = (
            [p.read_text() for p in sorted(place.glob("*.json"))] if place.is_dir() else place.read_text().split("\n")
        )
        for text in texts:
            if text.strip():
                row = json.loads(text)
                rows[row["arm"], row["shape"], row["data"]] = row
    return [rows[key] for key in sorted(rows)]


def adopt(out: Path, places: list[Path], data: str, shape: str) -> None:
    """Write the finished rows of earlier runs on the same data to the folder, unless it has the arm."""
    for row in load_rows(places):
        arm = Arm.parse(row["arm"], row["steps"])
        fits = row["status"] in FINISHED and (row["data"], row["shape"]) == (data, shape)
        if fits and not row_path(out, arm).exists():
            save(out, arm, row)


def is_finished(out: Path, arm: Arm) -> bool:
    path = row_path(out, arm)
    return path.exists() and json.loads(path.read_text())["status"] in FINISHED


@contextmanager
def claimed(out: Path, arm: Arm) -> Iterator[bool]:
    """Whether this process may run the arm: no other process does."""
    with row_path(out, arm).with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def read_queue(file: Path, steps: int) -> list[tuple[Arm, bool]]:
    """(arm, whether it is a finalist) per line `ARM [final]`; empty lines and what follows a # are skipped.

    Raises ValueError naming the line that is neither.
    """
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or words[1:] not in ([], ["final"]):
            raise ValueError(f"{file}:{number} is {line!r}; accepted: ARM or ARM final")
        found.append((Arm.parse(words[0], steps), len(words) == 2))
    return found


def best_loss_at(rows: list[dict], row: dict, step: int) -> float | None:
    """The lowest validation loss at a step, among other runs of as many steps with the same optimizer and data."""
    alike = [
        other for other in rows
        if other["arm"] != row["arm"] and all(other[key] == row[key] for key in ("optimizer", "steps", "shape", "data"))
    ]  # fmt: skip
    losses = [point["valid"] for other in alike for point in other["curve"] if point["step"] == step]
    return min(losses, default=None)
