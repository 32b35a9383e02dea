"""The identity of a plan, the same on every machine, by which shards that several processes wrote are told apart.

Files count by their names, sizes, the places where they are cut, and their first and last 64 KiB: not by their folders
and times, which differ between machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

from retnet.data.plan import Piece, Settings
from retnet.data.sources import PathsByKind
from retnet.data.stores import location, sample_of, size_of
from retnet.data.tokenizer import Tokenizer
from retnet.system.files import hash_file

FORMAT, VERSION = "retnet-parts", 1
# The parts of a plan's identity, and what they are called in messages.
ASPECTS = {
    "sources": "sources",
    "files": "files",
    "left_out": "files left out",
    "settings": "settings",
    "tokenizer": "tokenizer",
    "tokenizer_files": "files of the tokenizer",
    "cuts": "shards (--shard-size)",
}


def describe_plan(
    sources: Sequence[str],
    plan: Sequence[Sequence[Piece]],
    settings: Settings,
    tokenizer: Tokenizer,
    tokenizer_directory: Path,
    left_out: PathsByKind,
) -> dict[str, Any]:
    """What is written, as JSON. tokenizer_directory: where the tokenizer is saved; it may not be there for bytes."""
    saved = sorted(path for path in tokenizer_directory.rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "version": VERSION,
        "sources": [location(source).name for source in sources],
        "files": [list(entry) for entry in _files_of(plan)],
        "left_out": dict(sorted(left_out.counts.items())),
        "settings": asdict(settings),
        "tokenizer": tokenizer.describe(),
        "tokenizer_files": {path.relative_to(tokenizer_directory).as_posix(): hash_file(path) for path in saved},
        "cuts": _digest([[astuple(replace(piece, path="")) for piece in pieces] for pieces in plan]),
        "shards": len(plan),
    }


def identity_of(description: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each aspect of a plan."""
    return {aspect: _digest(description[aspect]) for aspect in ASPECTS}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The aspects that differ between two identities or two descriptions, in words; "" if none does."""
    differing = [aspect for aspect in ASPECTS if theirs.get(aspect) != ours.get(aspect)]
    if differing[1:]:
        differing = [aspect for aspect in differing if aspect != "cuts"]  # they follow from the others
    return ", ".join(ASPECTS[aspect] + _first_difference(aspect, theirs, ours) for aspect in differing)


def _first_difference(aspect: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first file that differs, as " (name)", or the options; "" where only hashes are known."""
    before, now = theirs.get(aspect), ours.get(aspect)
    if aspect == "settings" and isinstance(before, dict) and isinstance(now, dict):
        options = sorted(f"--{key}" for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return f" ({', '.join(options)})"
    if aspect != "files" or not isinstance(before, list) or not isinstance(now, list):
        return ""
    known = {json.dumps(entry) for entry in before} ^ {json.dumps(entry) for entry in now}
    names = [entry[0] for entry in (*before, *now) if json.dumps(entry) in known]
    return f" ({names[0]})" if names else " (in another order)"


def _files_of(plan: Sequence[Sequence[Piece]]) -> Iterator[tuple[str, int, str]]:
    """Name, size and a hash of both ends of every file, in the order of the plan."""
    seen: set[str] = set()
    for piece in (piece for pieces in plan for piece in pieces):
        if piece.path not in seen:
            seen.add(piece.path)
            path = location(piece.path)
            size = size_of(path)
            yield piece.name, size, sample_of(path, size)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
