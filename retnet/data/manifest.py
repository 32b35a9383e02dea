"""Manifest: the file that makes shards a corpus, made of the records of the shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retnet.data.readers import DataError
from retnet.data.shards import FORMAT, VERSION, token_dtype


def make_manifest(
    records: Sequence[Mapping[str, Any]],
    sizes: Sequence[Mapping[str, int]],
    hashes: Sequence[str],
    *,
    tokenizer: Mapping[str, Any],
    sources: Sequence[str],
    settings: Mapping[str, Any],
    left_out: Mapping[str, int],
) -> dict[str, Any]:
    """The manifest of shards 0, 1, ...

    records: the JSON of each shard. sizes: bytes of its files, by suffix. hashes: SHA-256 of its JSON.
    tokenizer: as `Tokenizer.describe`. sources: their names. left_out: numbers of paths, by kind.

    Raises DataError if there is no text in the shards.
    """
    shards = []
    lines = 0
    for number, (record, size, json_hash) in enumerate(zip(records, sizes, hashes, strict=True)):
        before = lines if record["continues"] else 0
        lines = record["pieces"][-1]["lines"] + (before if len(record["pieces"]) == 1 else 0)
        shards.append(
            {
                "name": f"{number:05}",
                **{key: record[key] for key in ("documents", "tokens", "bytes")},
                "lines_before": before,
                "size": dict(size),
                "sha256": {**record["sha256"], "json": json_hash},
            }
        )
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    if not totals["bytes"]:
        raise DataError(f"no text in {', '.join(sources)}")
    return {
        "format": FORMAT,
        "version": VERSION,
        **totals,
        "dtype": token_dtype(tokenizer["vocab_size"]).str,
        "tokenizer": dict(tokenizer),
        "sources": list(sources),
        "settings": dict(settings),
        "left_out": dict(sorted(left_out.items())),
        "shards": shards,
    }
