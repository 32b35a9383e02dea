"""The merge of parts into a corpus, with the bytes that one process writes.

A shard counts if its record belongs to the plan and its files have the recorded sizes and SHA-256. On this machine one
rename makes the shards OUT; in a store, where they are in OUT already, the manifest is written last and completes them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retnet.data.manifest import make_manifest
from retnet.data.output import check_new
from retnet.data.part_plan import differences, identity_of
from retnet.data.parts import PartsFolder
from retnet.data.shards import MANIFEST, TOKENIZER, read_manifest
from retnet.data.stores import Location, StorePath, names_in, save_json
from retnet.system.files import flush, hash_file, read_json
from retnet.system.lock import locked

_NAMES = 5


def merge_parts(out: str, on_shard: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Make the finished shards of all parts the corpus `out`, and return its manifest.

    on_shard: gets the number of shards that have been compared with their records, and of all.

    Raises FileNotFoundError if no part has begun; ValueError for shards that are missing, of another plan or damaged,
    named, and if `out` exists; DataError if there is no text in the shards.
    """
    parts = PartsFolder(out)
    plan = parts.read_plan()
    if plan is None:
        if (parts.out / MANIFEST).is_file():
            raise FileNotFoundError(f"{out} is a corpus already; accepted: OUT of parts that are not merged yet")
        raise FileNotFoundError(
            f"no parts of {out}: there is no {parts.plan}; accepted: OUT of `retnet data SOURCE... OUT --shard k/n`"
        )
    if isinstance(parts.out, Path):
        if (parts.out / MANIFEST).is_file() and not parts.data.exists():  # a merge was killed after its rename
            _remove(parts)
            return read_manifest(parts.out)
        check_new(parts.out)
    with _alone(parts):
        parts.check_data(plan["shards"])
        records = _records_of(parts, plan)
        _check_tokenizer(parts, plan)
        for number, record in enumerate(records):
            _check_files(parts, number, record)
            on_shard(number + 1, len(records))
        manifest = make_manifest(
            [read_json(parts.files(number)["json"]) for number in range(len(records))],
            [record["size"] for record in records],
            [record["sha256"]["json"] for record in records],
            tokenizer=plan["tokenizer"],
            sources=plan["sources"],
            settings=plan["settings"],
            left_out=plan["left_out"],
        )
        save_json(parts.data / MANIFEST, manifest)
        _finish(parts, len(records))
    return manifest


def _records_of(parts: PartsFolder, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of all shards. Raises ValueError that names the missing, and those of another plan."""
    identity = identity_of(plan)
    found = {number: parts.read_record(number) for number in range(plan["shards"])}
    missing = [number for number, record in found.items() if record is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {plan['shards']} shards of {parts.out} are not written: {_numbers(missing)}; accepted: "
            "all of them (part k/n writes shards k - 1, k - 1 + n, ...; parts that are finished write nothing again)"
        )
    records = [record for record in found.values() if record is not None]
    for number, record in enumerate(records):
        if other := differences(record["plan"], identity):
            raise ValueError(
                f"shard {number:05} of {parts.out} was written by another plan: other {other}; accepted: shards of the "
                f"plan in {parts.plan}; remove {parts.record(number)} and run the part that writes this shard"
            )
    return records


def _check_files(parts: PartsFolder, number: int, record: Mapping[str, Any]) -> None:
    """Raise ValueError for files that are not as recorded; then the record is removed, and a part writes them again."""
    for suffix, file in parts.files(number).items():
        if not file.is_file():
            problem = "is missing"
        elif (found := hash_file(file)) != record["sha256"][suffix]:
            problem = f"is damaged or half written: its SHA-256 is {found}, its record says {record['sha256'][suffix]}"
        else:
            continue
        parts.record(number).unlink(missing_ok=True)
        raise ValueError(f"{file} {problem}; its record was removed: run the part that writes shard {number:05} again")


def _check_tokenizer(parts: PartsFolder, plan: Mapping[str, Any]) -> None:
    for name, expected in plan["tokenizer_files"].items():
        file = parts.data / TOKENIZER / name
        if not file.is_file() or hash_file(file) != expected:
            raise ValueError(f"{file} is missing or damaged; accepted: what parts write; any part writes it again")
    if plan["tokenizer_files"]:
        tops = {name.partition("/")[0] for name in plan["tokenizer_files"]}
        strangers = [name for name in names_in(parts.data / TOKENIZER) - tops if not name.startswith(".")]
        if strangers:
            raise ValueError(f"{parts.data / TOKENIZER} holds {min(strangers)}, which no part wrote; remove it")


def _finish(parts: PartsFolder, shards: int) -> None:
    """Make the data OUT, and remove what only parts need."""
    if isinstance(parts.out, Path) and isinstance(parts.data, Path) and isinstance(parts.folder, Path):
        for file in parts.data.rglob(".*"):
            file.unlink()  # of a process that was killed
        flush(parts.data)
        parts.data.rename(parts.out)
        flush(parts.out.parent)
        _remove(parts)
    else:
        parts.plan.unlink()
        for number in range(shards):
            parts.record(number).unlink(missing_ok=True)


def _remove(parts: PartsFolder) -> None:
    shutil.rmtree(str(parts.folder))


@contextmanager
def _alone(parts: PartsFolder) -> Iterator[None]:
    """One merge at a time on this machine. In a store two merges write the same bytes."""
    folder: Location = parts.folder
    if isinstance(folder, StorePath):
        yield
    else:
        with locked(folder):
            yield


def _numbers(numbers: list[int]) -> str:
    names = ", ".join(f"{number:05}" for number in numbers[:_NAMES])
    return f"{names}, ..." if numbers[_NAMES:] else names
