"""Kinds of sources: the one place that decides what a file or a folder holds, for every verb.

A name that tells a format (`.jsonl`, `.ndjson`, `.parquet`, `.arrow`) decides: the file is that, or is an error.
A `.json` file is records or text, by its first lines. Any other file is text, or binary if it has a zero byte in its
first 8 KiB (git's rule; text in UTF-16 counts as binary) or begins as a compressed file under another name.
"""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

from retnet.data.compression import plain_name, suffix_of, unpacked
from retnet.system.files import read_json

DEFAULT_FIELD = "text"
LINE_BYTES = 1 << 26
SNIFF_BYTES = 8192
_BOM = b"\xef\xbb\xbf"
# First bytes of files that are not text, though they may have no zero byte early on: compressed files under other
# names, zip archives, PDF.
_MAGIC = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh", b"PK\3\4", b"%PDF-")
MANIFEST, SHARD_FORMAT = "manifest.json", "retnet-tokens"
STATE, INFO = "state.json", "dataset_info.json"


class Kind(StrEnum):
    """What a path holds. The first five are read; the others are left out of a folder."""

    TEXT = "text"
    JSONL = "jsonl"  # one JSON object per line
    JSON = "json"  # one JSON array of objects
    PARQUET = "parquet"
    ARROW = "arrow"
    SHARDS = "token shards"
    DATASET = "dataset"  # a folder that `Dataset.save_to_disk` wrote
    DATASETS = "dataset with splits"  # a folder that `DatasetDict.save_to_disk` wrote
    LINKED = "linked folder"
    DANGLING = "dangling link"
    SPECIAL = "special file"
    EMPTY = "empty file"
    BINARY = "binary file"
    HIDDEN = "hidden file"
    HIDDEN_FOLDER = "hidden folder"


_SUFFIXES = {".jsonl": Kind.JSONL, ".ndjson": Kind.JSONL, ".parquet": Kind.PARQUET, ".arrow": Kind.ARROW}
RECORDS = (Kind.JSONL, Kind.JSON, Kind.PARQUET, Kind.ARROW)  # documents are in a field
READ = (Kind.TEXT, *RECORDS)


def kind_of_file(path: Path, field: str | None = None) -> Kind:
    """The kind of a path that is not a folder, or is a link to one.

    field: the field with the text, if one was named; `text` otherwise. A `.json` file of one object is text without it,
        and so is an array of objects, unless a field was named.

    Raises OSError for a path that cannot be read, DamagedError for a compressed file.
    """
    if path.is_dir():
        return Kind.LINKED
    if not path.is_file():
        return Kind.DANGLING if path.is_symlink() else Kind.SPECIAL
    named = _SUFFIXES.get(suffix_of(plain_name(path)))
    if named is not None and named is not Kind.JSONL:
        return named
    with open(path, "rb") as raw, unpacked(raw, path) as file:
        head = file.read(SNIFF_BYTES)
    if not head:
        return Kind.EMPTY
    if named is None and suffix_of(plain_name(path)) == ".json":
        named = _kind_of_json(path, field)
    if named is not None:
        return named
    return Kind.BINARY if b"\0" in head or head.startswith(_MAGIC) else Kind.TEXT


def kind_of_folder(path: Path) -> Kind | None:
    """SHARDS, DATASET or DATASETS; None for any other folder.

    What is damaged or incomplete counts too, so that opening it is an error and its files are not read as text: shards
    without a manifest, a dataset without its state.
    """
    names = set(os.listdir(path))
    if "00000.tokens" in names and not names.isdisjoint((MANIFEST, "00000.index", "00000.json")):
        return Kind.SHARDS
    if MANIFEST in names and json_object(path / MANIFEST).get("format") == SHARD_FORMAT:
        return Kind.SHARDS
    if "dataset_dict.json" in names and splits_of(path):
        return Kind.DATASETS
    state, info = STATE in names, INFO in names
    if state and info and "_data_files" in json_object(path / STATE):
        return Kind.DATASET
    has_arrow = any(name.endswith(".arrow") and not name.startswith(".") for name in names)
    return Kind.DATASET if (state or info) and has_arrow else None


def splits_of(path: Path) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; empty for any other folder."""
    splits = json_object(path / "dataset_dict.json").get("splits")
    return splits if isinstance(splits, list) and all(isinstance(split, str) for split in splits) else []


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} for no such file or other content."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _kind_of_json(path: Path, named: str | None) -> Kind | None:
    """The kind of a `.json` file with records; None if it is text.

    It has one object per line where a line of the first two is an object and there are two, as in JSON lines with a
    damaged line, or where its only line is an object with the field. It is an array of records where the first of them
    is an object, with the field or with a field that was named: then the reader says what it lacks.
    """
    field = DEFAULT_FIELD if named is None else named
    with open(path, "rb") as raw, unpacked(raw, path) as file:
        lines = filter(bytes.strip, iter(lambda: file.readline(LINE_BYTES), b""))
        first, second = next(lines, b"").removeprefix(_BOM), next(lines, b"")
    if first.lstrip().startswith(b"["):
        record = _first_record(path)
        return Kind.JSON if record is not None and (field in record or named is not None) else None
    record = _object(first)
    if record is not None:
        return Kind.JSONL if second or field in record else None
    return Kind.JSONL if first.startswith(b'{"') and _object(second) is not None else None


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line is; None for anything else, and for a line that is indented."""
    if not line.startswith(b"{"):
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _first_record(path: Path) -> dict[str, Any] | None:
    """The first object of a JSON array of objects."""
    size = SNIFF_BYTES
    while True:
        with open(path, "rb") as raw, unpacked(raw, path) as file:
            data = file.read(size)
        text = data.removeprefix(_BOM).decode(errors="ignore").lstrip()[1:].lstrip()
        if not text.startswith("{"):
            return None
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except (ValueError, RecursionError):
            if len(data) < size or size >= LINE_BYTES:
                return None
        size *= 8
