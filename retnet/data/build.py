"""Building token shards: a resumable run from sources to a directory of shards.

Everything is written into `OUT.partial`, and one rename makes it OUT when all of it is on disk. An interrupted run
(killed, out of disk) leaves `OUT.partial` with the finished shards; the same command resumes there and writes the same
bytes as an uninterrupted run. Data that cannot be read ends the run, and nothing remains.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retnet.data.plan import Piece, Settings, describe_files, make_plan
from retnet.data.pool import write_here, write_in_parallel
from retnet.data.readers import DataError
from retnet.data.shard_writer import Counts
from retnet.data.shards import FORMAT, MANIFEST, SUFFIXES, TOKENIZER, VERSION, hash_file, token_dtype
from retnet.data.sources import PathsByKind
from retnet.data.tokenizer import BYTES, Tokenizer
from retnet.data.tokenizer_json import TOKENIZER_FILE, find_tokenizer
from retnet.system.files import flush, read_json, write_json
from retnet.system.lock import LOCK_FILE, locked
from retnet.system.machine import usable_cores

PARTIAL = ".partial"
_DATA, _RUN = "data", "run.json"


@dataclass(frozen=True)
class Progress:
    """counts: so far, including the shards of an interrupted run. size: the total, in the unit of counts.size."""

    counts: Counts
    size: int


def build_shards(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = BYTES,
    document_start: str | None = None,
    with_end: bool = False,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    shard_size: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Write the folder `out` and return its manifest.

    sources, settings, shard_size: see `make_plan`. tokenizer, document_start, with_end: see `find_tokenizer`.
    workers: processes; one per core if None. A script that asks for more than one needs the usual
        `if __name__ == "__main__"`.

    Raises DataError (a ValueError) for data that cannot be read, named by file and line; ValueError or
    FileNotFoundError for arguments that cannot be used, `out` that exists, or sources that have changed since an
    interrupted run; OSError for what cannot be written.
    """
    if _exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; accepted: a new or empty folder")
    for source in sources:
        if _real(out).is_relative_to(_real(source)):
            raise ValueError(f"{out} lies inside {source} and would be read as text; accepted: a folder outside it")
    out = _real(out)  # through links, so that OUT.partial is on the same disk
    found = find_tokenizer(tokenizer, document_start, with_end=with_end)
    left_out = PathsByKind()
    plan = make_plan(sources, settings, shard_size, left_out)
    run = {
        "sources": list(sources),
        "settings": asdict(settings),
        "tokenizer": found.describe(),
        "shard_size": shard_size,
        "files": describe_files(plan),
    }
    if out.is_dir():
        _check_replaceable(out)
    partial = partial_of(out)
    _check_is_ours(partial)
    with locked(partial):
        _begin(partial, run, found)
        try:
            _write_missing(plan, settings, found, partial / _DATA, workers or usable_cores(), on_progress)
            manifest = _finish(partial / _DATA, plan, run, found, left_out)
        except DataError:
            _remove(partial)
            raise
        (partial / _DATA).rename(out)
        flush(out.parent)
        _remove(partial)
    return manifest


def partial_of(out: Path) -> Path:
    """The folder of an unfinished run into `out`."""
    out = _real(out)
    return out.with_name(out.name + PARTIAL)


def _check_replaceable(out: Path) -> None:
    """Raise ValueError now if the empty folder `out` cannot be replaced by a rename later, as a mount point cannot."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.rename(aside)
        aside.rename(out)
    except OSError as error:
        raise ValueError(
            f"{out} exists and cannot be replaced ({error.strerror}); accepted: a folder that does not exist, "
            f"such as {out / _DATA}"
        ) from error


def _exists(path: Path) -> bool:
    """Whether there is such a path. Raises OSError if that cannot be told, as for a link to itself."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _real(path: str | Path) -> Path:
    """The path through links, as far as they lead."""
    return Path(os.path.realpath(path))


def _remove(partial: Path) -> None:
    """Remove the folder of a run, first the file that a resumed run would read."""
    (partial / _RUN).unlink(missing_ok=True)
    shutil.rmtree(partial)


def _check_is_ours(partial: Path) -> None:
    """Raise ValueError if the folder of an unfinished run holds anything that is not of one."""
    if not partial.exists():
        return
    strangers = [entry.name for entry in partial.iterdir() if entry.name not in (_DATA, _RUN, LOCK_FILE)]
    strangers = [name for name in strangers if not name.startswith(f".{_RUN}")]
    if strangers:
        raise ValueError(f"{partial} is in the way: it holds {strangers[0]}, which `retnet data` does not write")


def _begin(partial: Path, run: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Start a run; or check that the unfinished one is the same, and remove its half-written files."""
    data = partial / _DATA
    before = _unfinished(partial)
    if before is not None:
        if changed := list(_differences(before, json.loads(json.dumps(run)))):
            raise ValueError(
                f"{partial} holds an interrupted run with other {', '.join(changed)}; accepted: the arguments of that "
                "run to resume it, or remove the folder to start again"
            )
    else:
        if data.exists():
            shutil.rmtree(data)
        data.mkdir()
        tokenizer.save(data / TOKENIZER)
        write_json(partial / _RUN, run)
    for file in data.iterdir():
        if file.is_file() and (file.name.startswith(".") or not file.with_suffix(".json").exists()):
            file.unlink()


def _unfinished(partial: Path) -> dict[str, Any] | None:
    """The arguments of the run to resume; None without one, or if it was being removed."""
    if not (partial / _RUN).is_file():
        return None
    run = read_json(partial / _RUN)
    data = partial / _DATA
    needed = data if run["tokenizer"]["identity"] == BYTES else data / TOKENIZER / TOKENIZER_FILE
    return run if needed.exists() else None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        if key != "files":
            yield key
            continue
        yield f"files ({_changed_files(before[key], now[key])})"


def _changed_files(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The files whose description changed, as text; "" if none did."""
    changed = [path for path in before.keys() | now.keys() if before.get(path) != now.get(path)]
    return f"{min(changed)}{f' and {len(changed) - 1} more' if changed[1:] else ''}" if changed else ""


def _write_missing(
    plan: list[list[Piece]],
    settings: Settings,
    tokenizer: Tokenizer,
    data: Path,
    workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Write the shards that are missing."""
    counts: dict[int, Counts] = {}
    missing: dict[int, list[Piece]] = {}
    for number, pieces in enumerate(plan):
        if (data / f"{number:05}.json").is_file():
            record = read_json(data / f"{number:05}.json")
            counts[number] = Counts(sum(p.size for p in pieces), record["documents"], record["tokens"])
        else:
            missing[number] = pieces
    size = sum(piece.size for pieces in plan for piece in pieces)
    total = Counts(*(sum(column) for column in zip(Counts(), *counts.values())))

    def report(number: int, latest: Counts) -> None:
        nonlocal total
        total = Counts(*(t + new - old for t, new, old in zip(total, latest, counts.get(number, Counts()))))
        counts[number] = latest
        if on_progress:
            on_progress(Progress(total, size))

    if on_progress and total.size:
        on_progress(Progress(total, size))  # the part of an interrupted run
    workers = min(workers, len(missing))
    if workers > 1:
        write_in_parallel(missing, settings, tokenizer.describe(), data / TOKENIZER, data, workers, report)
    else:
        write_here(missing, settings, tokenizer, data, report)


def _finish(
    data: Path, plan: list[list[Piece]], run: dict[str, Any], tokenizer: Tokenizer, left_out: PathsByKind
) -> dict[str, Any]:
    """Write the manifest, which completes the folder."""
    _check_unchanged(plan, run["files"])
    shards = []
    lines = 0
    for number in range(len(plan)):
        name = f"{number:05}"
        record = read_json(data / f"{name}.json")
        before = lines if record["continues"] else 0
        lines = record["pieces"][-1]["lines"] + (before if len(record["pieces"]) == 1 else 0)
        shards.append(
            {
                "name": name,
                **{key: record[key] for key in ("documents", "tokens", "bytes")},
                "lines_before": before,
                "size": {suffix: (data / f"{name}.{suffix}").stat().st_size for suffix in SUFFIXES},
                "sha256": record["sha256"] | {"json": hash_file(data / f"{name}.json")},
            }
        )
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    if not totals["bytes"]:
        raise DataError(f"no text in {', '.join(run['sources'])}")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **totals,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "tokenizer": tokenizer.describe(),
        "sources": [Path(source).name for source in run["sources"]],
        "settings": run["settings"],
        "left_out": dict(sorted(left_out.counts.items())),
        "shards": shards,
    }
    write_json(data / MANIFEST, manifest)
    return manifest


def _check_unchanged(plan: list[list[Piece]], files: dict[str, list[int]]) -> None:
    """Raise DataError for a source that changed while it was read: part of it may be missing."""
    try:
        changed = _changed_files(files, describe_files(plan))
    except OSError as error:
        raise DataError(f"{error.filename} disappeared while it was read: {error.strerror}") from error
    if changed:
        raise DataError(f"{changed} changed since the run began; accepted: files that nothing writes to")
