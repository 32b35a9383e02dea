"""Atomic checkpoints: folders that are complete or absent, with a size and a hash per file.

`system.files` makes one file atomic. A checkpoint is many files, which the Trainer and torch write, so the unit here is
the folder: it is written in a staging folder, every file is flushed to the disk, a marker with the size and hash of
each file is written last, and the folder is renamed to `checkpoint-STEP`. A crash leaves only a staging folder, which
is never read. A checkpoint is complete if it has a marker and every file is as the marker says.

Checkpoints are ordered by `serial`, which grows with every save, not by step: after a run was resumed from an older
checkpoint, the newest is the last one saved.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from retnet.system.files import flush, hash_file, move_into_place, read_json, write_json
from retnet.system.sizes import format_bytes

MARKER = "complete.json"
STAGING = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read. The message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-STEP`. problem: what is wrong with it, None if it is complete; only then is serial set."""

    path: Path
    step: int
    serial: int = -1
    problem: str | None = None


@contextmanager
def staged(output: Path, name: str, *, writes: bool = True) -> Iterator[Path]:
    """A path to write `checkpoint-STEP` or the model at, for `commit` or `publish` to move into its place.

    writes: whether this process creates and removes the staging folder (one process per file system). After an error
    the folder is removed, and the error becomes a CheckpointError that names the last complete checkpoint.
    """
    root = output / STAGING
    if writes:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
    with undone_on_error(output, name, writes=writes):
        yield root / name


@contextmanager
def undone_on_error(output: Path, name: str, *, writes: bool = True) -> Iterator[None]:
    """A context in which an error removes the staging folder and becomes a CheckpointError, as in `staged`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError, CheckpointException) as error:  # of different writers
        if writes:
            shutil.rmtree(output / STAGING, ignore_errors=True)
        raise CheckpointError(_not_saved(output, name, first_failure(error))) from error


def first_failure(error: BaseException) -> BaseException:
    """The error of the first process that failed, instead of torch's collection of them."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def commit(staging: Path, hashes: Mapping[str, str] | None = None) -> Checkpoint:
    """Complete a staged checkpoint and move it to its place, instead of an earlier one of the same step.

    hashes: the SHA-256 of files that are on the disk already, by name.
    """
    output = staging.parent.parent
    serial = 1 + max((c.serial for c in list_checkpoints(output)), default=0)
    files = {}
    for file in _files(staging):
        name = file.relative_to(staging).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": (hashes or {}).get(name) or hash_file(file)}
        flush(file)
    write_json(staging / MARKER, {"serial": serial, "files": files})
    for folder in {file.parent for file in _files(staging)}:
        flush(folder)
    final = output / staging.name
    if final.exists():
        _discard(final)
    staging.rename(final)
    flush(output)
    shutil.rmtree(staging.parent, ignore_errors=True)
    return Checkpoint(final, int(_NAME.fullmatch(final.name).group(1)), serial)  # type: ignore[union-attr]


def list_checkpoints(output: Path, *, hashes: bool = False) -> list[Checkpoint]:
    """All checkpoints of a run: those with a problem, then the complete ones in the order in which they were saved.

    hashes: compare the hash of every file; otherwise its size only.
    """
    if not output.is_dir():
        return []
    found = [inspect(path, hashes=hashes) for path in output.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda checkpoint: (checkpoint.serial, checkpoint.step))


def inspect(path: Path, *, hashes: bool = True) -> Checkpoint:
    """Check one checkpoint."""
    match = _NAME.fullmatch(path.name)
    step = int(match.group(1)) if match else -1
    try:
        marker = read_json(path / MARKER)
        serial = int(marker["serial"])
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in marker["files"].items()}
    except FileNotFoundError:
        problem = f"it has no {MARKER}: saving did not finish" if path.is_dir() else "there is no such folder"
        return Checkpoint(path, step, problem=problem)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Checkpoint(path, step, problem=f"its {MARKER} cannot be read: {error}")
    if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        return Checkpoint(path, step, problem=f"its {MARKER} names {outside[0]!r}, which is outside of it")
    if pickled := next(path.glob("*/.metadata"), None):
        return Checkpoint(path, step, problem=f"its {pickled.relative_to(path)} is a pickle, which is not read")
    for name, (expected_size, expected_hash) in files.items():
        file = path / name
        if not file.is_file():
            return Checkpoint(path, step, problem=f"{name} is missing")
        size = file.stat().st_size
        if size != expected_size:
            return Checkpoint(path, step, problem=f"{name} has {size} bytes, not {expected_size}")
        if hashes and hash_file(file) != expected_hash:
            return Checkpoint(path, step, problem=f"{name} has changed since it was written: its hash differs")
    return Checkpoint(path, step, serial)


def choose(output: Path) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The newest complete checkpoint of a run, with all its hashes checked, and the damaged ones that were found.

    (None, []) if there are no checkpoints. Raises CheckpointError if there are some and none is complete.
    """
    damaged = []
    for checkpoint in reversed(list_checkpoints(output)):
        checked = inspect(checkpoint.path) if checkpoint.problem is None else checkpoint
        if checked.problem is None:
            # In this order those without a marker come last, and are reported too.
            rest = [c for c in list_checkpoints(output) if c.problem is not None and c not in damaged]
            return checked, damaged + rest
        damaged.append(checked)
    if damaged:
        each = "; ".join(f"{c.path}: {c.problem}" for c in damaged)
        raise CheckpointError(f"no complete checkpoint in {output} ({each}); remove them to start from the beginning")
    return None, []


def rotate(output: Path, keep: int | None, best: Path | None = None) -> None:
    """Remove all checkpoints but the `keep` newest complete ones and the best one. None or 0 keeps all.

    Damaged ones that are older than those kept are removed too. The newest complete one is never removed.
    """
    if not keep:
        return
    checkpoints = list_checkpoints(output)
    complete = [c for c in checkpoints if c.problem is None]
    kept = {c.path for c in complete[-max(keep, 1) :]}
    if best is not None:
        kept.add(best)
    oldest = min((c.step for c in complete if c.path in kept), default=-1)
    for checkpoint in checkpoints:
        if checkpoint.path not in kept and (checkpoint.problem is None or checkpoint.step < oldest):
            _discard(checkpoint.path)


def publish(staging: Path, output: Path) -> None:
    """Move all files of a staging folder into another, each atomically."""
    for file in _files(staging):
        target = output / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        move_into_place(file, target)
    shutil.rmtree(staging.parent)


def _discard(path: Path) -> None:
    """Remove a folder atomically: it is renamed first."""
    doomed = path.parent / STAGING / f"removed-{path.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):  # not empty: a checkpoint is being saved
        doomed.parent.rmdir()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _not_saved(output: Path, name: str, error: BaseException) -> str:
    complete = [c for c in list_checkpoints(output) if c.problem is None]
    last = f"the last complete checkpoint is {complete[-1].path}" if complete else "there is no checkpoint"
    free = format_bytes(shutil.disk_usage(output).free, 3)
    return f"{name} could not be written ({error}; {free} free): {last}"
