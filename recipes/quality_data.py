"""Token streams for `quality.py`: documents joined in their order, in compressed parts that travel.

    meta.json            vocabulary, and per stream its parts and its documents
    train.00.xz ...      little-endian uint16 tokens, compressed (a bit more than half their size)

The streams are train, valid, test (one text each) and books (documents of many windows). Every document begins with the
document start, as `retnet data` stores it. Nothing else marks its border, so rows may continue from one document into
the next.
"""

import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

STREAMS = ("train", "valid", "test", "books")
META = "meta.json"
# Two-byte symbols: literals and matches depend on the parity of the position.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]


@dataclass(frozen=True)
class Stream:
    """tokens [N] int32; ends: of each document; num_bytes: of each document's text."""

    tokens: Tensor
    ends: tuple[int, ...]
    num_bytes: tuple[int, ...]

    def document(self, index: int) -> Tensor:
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]

    def rows(self, length: int) -> Tensor:
        """[rows, length + 1]: consecutive rows with their targets; a row's last token is the next one's first.

        Raises ValueError for a stream shorter than one row.
        """
        count = (len(self.tokens) - 1) // length
        if count < 1:
            raise ValueError(f"the stream has {len(self.tokens)} tokens; accepted: at least {length + 1} for one row")
        return self.tokens[: count * length + 1].unfold(0, length + 1, length)

    def spread_rows(self, length: int, most: int) -> Tensor:
        """At most `most` of the rows, spread evenly over the stream."""
        rows = self.rows(length)
        return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device).long()]


@dataclass(frozen=True)
class Corpus:
    """The four streams of one vocabulary."""

    vocab_size: int
    train: Stream
    valid: Stream
    test: Stream
    books: Stream

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the tokens for training and validation: results are comparable if they are equal."""
        digest = hashlib.sha256()
        for stream in (self.train, self.valid):
            digest.update(stream.tokens.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def pack(folders: dict[str, Path], out: Path, part_bytes: int) -> None:
    """Write streams from folders of `retnet data`, in parts of at most about `part_bytes` compressed bytes."""
    import numpy as np

    from retnet.data.shards import Column, ShardFolder

    out.mkdir(parents=True, exist_ok=True)
    streams, vocab_size = {}, 0
    for name, directory in folders.items():
        folder = ShardFolder(directory)
        vocab_size = folder.tokenizer.vocab_size
        if vocab_size > 1 << 16:
            raise ValueError(f"{directory} has a vocabulary of {vocab_size}; accepted: at most 65,536")
        pieces = [np.asarray(folder.shard_tokens(shard)) for shard in range(len(folder.shards))]
        raw = np.concatenate(pieces).astype("<u2").tobytes()
        streams[name] = {
            "parts": list(_write_parts(raw, out, name, part_bytes)),
            "ends": np.cumsum(folder.lengths).tolist(),
            "bytes": folder.column(Column.BYTES).tolist(),
        }
        print(f"{name}: {len(raw) // 2} tokens, {len(streams[name]['parts'])} parts", flush=True)
    (out / META).write_text(json.dumps({"vocab_size": vocab_size, "streams": streams}))


def _write_parts(raw: bytes, out: Path, name: str, part_bytes: int) -> Iterator[dict]:
    size, number = _whole_tokens(1.75 * part_bytes), 0  # text compresses to somewhat more than half
    while raw:
        packed = lzma.compress(raw[:size], filters=FILTERS)
        if len(packed) > part_bytes:
            size = _whole_tokens(0.98 * size * part_bytes / len(packed))
            continue
        part, raw = raw[:size], raw[size:]
        file = f"{name}.{number:02d}.xz"
        number += 1
        (out / file).write_bytes(packed)
        yield {"file": file, "tokens": len(part) // 2, "sha256": hashlib.sha256(part).hexdigest()}


def _whole_tokens(num_bytes: float) -> int:
    return max(2, int(num_bytes) // 2 * 2)


def load(directory: Path, device: torch.device, most_tokens: int | None = None) -> Corpus:
    """The streams of a folder. Train has at most `most_tokens`, and ends before the first part that is not there.

    Raises ValueError for a damaged part, or if a stream has no part at all.
    """
    meta = json.loads((directory / META).read_text())
    streams = {}
    for name in STREAMS:
        limit = most_tokens if name == "train" else None
        streams[name] = _load_stream(directory, name, meta["streams"][name], limit, device)
    return Corpus(meta["vocab_size"], **streams)


def _load_stream(directory: Path, name: str, entry: dict, most: int | None, device: torch.device) -> Stream:
    parts, count = [], 0
    for part in entry["parts"]:
        path = directory / part["file"]
        if not path.is_file() or (most is not None and count >= most):
            break
        raw = lzma.decompress(path.read_bytes())
        if hashlib.sha256(raw).hexdigest() != part["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {META}")
        parts.append(torch.frombuffer(bytearray(raw), dtype=torch.uint16).to(torch.int32))
        count += part["tokens"]
    if not parts:
        raise ValueError(f"{directory} has no part of {name}; accepted: a folder that `quality.py pack` wrote")
    tokens = torch.cat(parts)[:most]
    ends = [end for end in entry["ends"] if end <= len(tokens)]
    return Stream(tokens.to(device), tuple(ends), tuple(entry["bytes"][: len(ends)]))


@lru_cache(maxsize=1)
def source_bytes(device: torch.device) -> Corpus:
    """A small corpus of bytes, for trials: parts of the standard library's source."""
    from retnet.data import DOCUMENT_START, find_documents

    documents = sorted(find_documents("stdlib"), key=lambda document: document.name)[:60]
    streams = {}
    for index, name in enumerate(STREAMS):
        parts, sizes = [], []
        for document in documents[index :: len(STREAMS)]:
            text = document.read()[:20_000]
            parts.append(torch.tensor([DOCUMENT_START, *text], dtype=torch.int32))
            sizes.append(len(text))
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        streams[name] = Stream(torch.cat(parts).to(device), tuple(ends), tuple(sizes))
    return Corpus(DOCUMENT_START + 1, **streams)


def batches(rows: Tensor, per_step: int, seed: int = 0) -> Iterator[Tensor]:
    """Token ids [per_step, length + 1] without end: all rows in one random order, then in another, and so on.

    The order depends on the number of rows alone, so that all models see the same rows at the same step.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < per_step:
            waiting = torch.cat([waiting, torch.randperm(len(rows), generator=generator)])
        chosen, waiting = waiting[:per_step], waiting[per_step:]
        yield rows[chosen.to(rows.device)].long()
