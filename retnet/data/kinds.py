"""Kinds of sources: the one place that decides what a file or a folder holds, for every verb.

A name that tells a format (`.jsonl`, `.ndjson`, `.parquet`, `.arrow`) decides: the file is that, or is an error.
A `.json` file is records or text, by its first values. Any other file is text, or binary if it has a zero byte in its
first 8 KiB (git's rule), or begins with the byte-order mark of UTF-16 or as a compressed file under another name.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Any

from retnet.data.compression import plain_name, suffix_of, unpacked
from retnet.data.stores import Location, names_in
from retnet.system.files import read_json

DEFAULT_FIELD = "text"
LINE_BYTES = 1 << 26
SNIFF_BYTES = 8192
BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_TABLES = (".csv", ".tsv")
_JSON_BEGIN = re.compile(rb'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')  # an object, or an array of them
# First bytes of files that are not text, though they may have no zero byte early on: compressed files under other
# names, zip archives, PDF.
_MAGIC = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\3\4", b"%PDF-")
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # words may begin with BZh
MANIFEST, SHARD_FORMAT = "manifest.json", "retnet-tokens"
STATE, INFO = "state.json", "dataset_info.json"


class Kind(StrEnum):
    """What a path holds. The first five are read; the others are left out of a folder."""

    TEXT = "text"
    JSONL = "jsonl"  # one JSON object per line
    JSON = "json"  # a JSON array of objects, or objects one after the other
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
    UTF16 = "UTF-16 file"
    HIDDEN = "hidden file"
    HIDDEN_FOLDER = "hidden folder"


JSONL_SUFFIXES = (".jsonl", ".ndjson")
_SUFFIXES = {**dict.fromkeys(JSONL_SUFFIXES, Kind.JSONL), ".parquet": Kind.PARQUET, ".arrow": Kind.ARROW}
RECORDS = (Kind.JSONL, Kind.JSON, Kind.PARQUET, Kind.ARROW)  # documents are in a field
READ = (Kind.TEXT, *RECORDS)


def kind_of_file(path: Location, field: str | None = None, *, zeros: bool = False) -> Kind:
    """The kind of a path that is not a folder, or is a link to one.

    field: the field with the text, if one was named; `text` otherwise. A `.json` file of one object is text without it,
        and so is an array of objects, unless a field was named.
    zeros: whether text may have zero bytes, as between documents.

    Raises OSError for a path that cannot be read, DamagedError for a compressed file.
    """
    if path.is_dir():
        return Kind.LINKED
    if not path.is_file():
        return Kind.DANGLING if path.is_symlink() else Kind.SPECIAL
    named = _SUFFIXES.get(suffix_of(plain_name(path)))
    if named is not None and named is not Kind.JSONL:
        return named
    with path.open("rb") as raw, unpacked(raw, path) as file:
        head = file.read(SNIFF_BYTES)
    if not head:
        return Kind.EMPTY
    if named is None and suffix_of(plain_name(path)) == ".json":
        named = _kind_of_json(path, field)
    if named is not None:
        return named
    if head.startswith(_UTF16):
        return Kind.UTF16
    is_binary = (b"\0" in head and not zeros) or head.startswith(_MAGIC) or _BZIP2.match(head)
    return Kind.BINARY if is_binary else Kind.TEXT


def syntax_of(path: Location) -> str | None:
    """`table` or `JSON` for a file of text with the syntax of one, which becomes part of its document."""
    suffix = suffix_of(plain_name(path))
    if suffix in (".json", *_TABLES):
        return "JSON" if suffix == ".json" else "table"
    with path.open("rb") as raw, unpacked(raw, path) as file:
        return "JSON" if _JSON_BEGIN.match(file.read(SNIFF_BYTES).removeprefix(BOM)) else None


def kind_of_folder(path: Location) -> Kind | None:
    """SHARDS, DATASET or DATASETS; None for any other folder.

    What is damaged or incomplete counts too, so that opening it is an error and its files are not read as text: shards
    without a manifest, a dataset without its state.
    """
    names = names_in(path)
    if "00000.tokens" in names and not names.isdisjoint((MANIFEST, "00000.index", "00000.json")):
        return Kind.SHARDS
    if MANIFEST in names and json_object(path / MANIFEST).get("format") == SHARD_FORMAT:
        return Kind.SHARDS
    if "dataset_dict.json" in names and splits_of(path):
        return Kind.DATASETS
    state, info = STATE in names, INFO in names
    has_arrow = any(name.endswith(".arrow") and not name.startswith(".") for name in names)
    return Kind.DATASET if (state and info) or ((state or info) and has_arrow) else None


def splits_of(path: Location) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; empty for any other folder."""
    splits = json_object(path / "dataset_dict.json").get("splits")
    return splits if isinstance(splits, list) and all(isinstance(split, str) for split in splits) else []


def json_object(path: Location) -> dict[str, Any]:
    """The JSON object in a file; {} for no such file or other content."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _kind_of_json(path: Location, named: str | None) -> Kind | None:
    """The kind of a `.json` file with records; None if it is text.

    It has one object per line where a line of the first two is an object and there are two, as in JSON lines with a
    damaged line, or where its only line is an object with the field. It is an array of records where the first of them
    is an object, with the field or with a field that was named: then the reader says what it lacks. Objects in any
    other layout are records where there are several, or where the only one has text in the field, and so are damaged
    ones that begin with text in the field.
    """
    field = DEFAULT_FIELD if named is None else named
    with path.open("rb") as raw, unpacked(raw, path) as file:
        lines = filter(bytes.strip, iter(lambda: file.readline(LINE_BYTES), b""))
        first, second = next(lines, b"").removeprefix(BOM), next(lines, b"")
    if first.lstrip().startswith(b"["):
        record, _ = _first_record(path)
        if record is None:
            return _kind_of_damaged(path, field)
        return Kind.JSON if field in record or named is not None else None
    record = _object(first)
    if record is not None:
        return Kind.JSONL if second or field in record else None
    if first.startswith(b'{"') and _object(second) is not None:
        return Kind.JSONL
    record, following = _first_record(path)
    if record is None:
        return _kind_of_damaged(path, field)
    return Kind.JSON if following.startswith("{") or isinstance(record.get(field), str) else None


def _kind_of_damaged(path: Location, field: str) -> Kind | None:
    """The kind of a file whose first value is no object that can be read."""
    with path.open("rb") as raw, unpacked(raw, path) as file:
        head = file.read(SNIFF_BYTES).removeprefix(BOM)
    text_follows = re.escape(json.dumps(field, ensure_ascii=False).encode()) + rb'\s*:\s*"'
    return Kind.JSON if _JSON_BEGIN.match(head) and re.search(text_follows, head) else None


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line is; None for anything else, and for a line that is indented."""
    if not line.startswith(b"{"):
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _first_record(path: Location) -> tuple[dict[str, Any] | None, str]:
    """The first object of JSON, of an array or by itself, and what was read of the text after it."""
    size = SNIFF_BYTES
    while True:
        with path.open("rb") as raw, unpacked(raw, path) as file:
            data = file.read(size)
        text = data.removeprefix(BOM).decode(errors="ignore").lstrip().removeprefix("[").lstrip()
        if not text.startswith("{"):
            return None, ""
        try:
            record, end = json.JSONDecoder().raw_decode(text)
            return record, text[end:].lstrip()
        except (ValueError, RecursionError):
            if len(data) < size or size >= LINE_BYTES:
                return None, ""
        size *= 8
