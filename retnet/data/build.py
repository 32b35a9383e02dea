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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retnet.data.manifest import make_manifest
from retnet.data.output import check_new, check_outside, real_path
from retnet.data.plan import Piece, Settings, describe_files, make_plan
from retnet.data.pool import into_folder
from retnet.data.readers import DataError
from retnet.data.shard_writer import Counts
from retnet.data.shards import MANIFEST, SUFFIXES, TOKENIZER
from retnet.data.sources import PathsByKind
from retnet.data.stores import location
from retnet.data.tokenizer import BYTES, Tokenizer
from retnet.data.tokenizer_json import TOKENIZER_FILE, find_tokenizer
from retnet.data.writing import Progress, changed_files, check_unchanged, size_of_pieces, write_missing
from retnet.system.files import flush, hash_file, read_json, write_json
from retnet.system.lock import LOCK_FILE, locked

PARTIAL = ".partial"
_DATA, _RUN = "data", "run.json"


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
    check_new(out)
    check_outside(out, sources)
    out = real_path(out)  # through links, so that OUT.partial is on the same disk
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
            data, written = partial / _DATA, _written(partial / _DATA, plan)
            writer = into_folder(data)
            write_missing(plan, written, settings, found, data / TOKENIZER, writer, workers, on_progress)
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
    out = real_path(out)
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
        yield f"files ({changed_files(before[key], now[key])})"


def _written(data: Path, plan: list[list[Piece]]) -> dict[int, Counts]:
    """The counts of the shards that are there."""
    counts: dict[int, Counts] = {}
    for number, pieces in enumerate(plan):
        if (data / f"{number:05}.json").is_file():
            record = read_json(data / f"{number:05}.json")
            counts[number] = Counts(size_of_pieces(pieces), record["documents"], record["tokens"])
    return counts


def _finish(
    data: Path, plan: list[list[Piece]], run: dict[str, Any], tokenizer: Tokenizer, left_out: PathsByKind
) -> dict[str, Any]:
    """Write the manifest, which completes the folder."""
    check_unchanged(plan, run["files"])
    names = [f"{number:05}" for number in range(len(plan))]
    manifest = make_manifest(
        [read_json(data / f"{name}.json") for name in names],
        [{suffix: (data / f"{name}.{suffix}").stat().st_size for suffix in SUFFIXES} for name in names],
        [hash_file(data / f"{name}.json") for name in names],
        tokenizer=tokenizer.describe(),
        sources=[location(source).name for source in run["sources"]],
        settings=run["settings"],
        left_out=dict(left_out.counts),
    )
    write_json(data / MANIFEST, manifest)
    return manifest
