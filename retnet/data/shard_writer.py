"""One shard: its pieces read, tokenised and written, in memory bounded by a batch of text.

What the bytes of the files are depends on the pieces and the tokenizer alone. The shard's JSON is written last: where
it is, the shard is done.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retnet.data.durable import write_json, written_whole
from retnet.data.encoders import Encoder
from retnet.data.plan import Piece, Settings
from retnet.data.readers import Block, Reading
from retnet.data.shards import Column

BATCH_BYTES = 1 << 19


class Counts(NamedTuple):
    """What has been read and written so far. size: in the unit of the pieces' sizes."""

    size: int = 0
    documents: int = 0
    tokens: int = 0


def write_shard(
    number: int,
    pieces: Sequence[Piece],
    settings: Settings,
    encoder: Encoder,
    directory: Path,
    report: Callable[[Counts], None],
) -> None:
    """Write the files of shard `number` (see `shards`), calling `report` after every batch.

    Raises DataError for what cannot be read, OSError for what cannot be written; the shard's JSON is not there then.
    """
    name = f"{number:05}"
    sources: list[dict[str, Any]] = []
    size_before = 0
    with written_whole(directory / f"{name}.tokens") as file:
        writer = _TokenWriter(file, encoder)
        for index, piece in enumerate(pieces):
            reading = Reading(piece, settings, utf8=encoder.reads_text)
            for block in reading.blocks():
                if writer.add(index, block):
                    size = size_before + int(reading.progress * piece.size)
                    report(Counts(size, len(writer.columns[Column.END]), writer.tokens))
            size_before += piece.size
            unit = "row" if piece.kind in ("parquet", "arrow") else "line"
            sources.append({"name": piece.name, "unit": unit, "lines": reading.lines})
        writer.flush()
    index_bytes = np.array([writer.columns[column] for column in Column], dtype="<i8").tobytes()
    with written_whole(directory / f"{name}.index") as file:
        file.write(index_bytes)
    documents = len(writer.columns[Column.END])
    record = {
        "documents": documents,
        "tokens": writer.tokens,
        "bytes": sum(writer.columns[Column.BYTES]),
        "sha256": {"tokens": writer.digest.hexdigest(), "index": hashlib.sha256(index_bytes).hexdigest()},
        "continues": pieces[0].begin > 0 and sources[0]["unit"] == "line",
        "pieces": sources,
    }
    write_json(directory / f"{name}.json", record)
    report(Counts(size_before, documents, writer.tokens))


class _TokenWriter:
    """Blocks gathered to batches, tokenised, and written with the tokens around documents.

    columns: the index, as far as documents have ended.
    """

    def __init__(self, file: BinaryIO, encoder: Encoder):
        self.columns = {column: array("q") for column in Column}
        self.tokens = 0
        self.digest = hashlib.sha256()
        self._file, self._encoder = file, encoder
        self._batch: list[tuple[int, Block]] = []
        self._batch_bytes = 0
        self._text: Any = None  # hash of the document that is open
        self._text_bytes = 0

    def add(self, piece: int, block: Block) -> bool:
        """Take a block; true if a batch has been written."""
        self._batch.append((piece, block))
        self._batch_bytes += len(block.data)
        if self._batch_bytes < BATCH_BYTES:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Write what has been gathered."""
        texts = self._encoder.encode([block.data for _, block in self._batch])
        runs: list[NDArray[np.integer]] = []
        for (piece, block), tokens in zip(self._batch, texts, strict=True):
            if self._text is None:
                self._text, self._text_bytes = hashlib.sha256(), 0
                runs.append(self._one(self._encoder.document_start))
            runs.append(tokens)
            self.tokens += len(tokens)
            self._text.update(block.data)
            self._text_bytes += len(block.data)
            if block.last:
                self._end_document(piece, block.number, runs)
        if runs:
            data = np.concatenate(runs, dtype=self._encoder.dtype, casting="unsafe").tobytes()
            self._file.write(data)
            self.digest.update(data)
        self._batch, self._batch_bytes = [], 0

    def _end_document(self, piece: int, number: int, runs: list[NDArray[np.integer]]) -> None:
        if self._encoder.document_end is not None:
            runs.append(self._one(self._encoder.document_end))
        entry = {
            Column.END: self.tokens,
            Column.BYTES: self._text_bytes,
            Column.HASH: int.from_bytes(self._text.digest()[:8], "big", signed=True),
            Column.PIECE: piece,
            Column.NUMBER: number,
        }
        for column, value in entry.items():
            self.columns[column].append(value)
        self._text = None

    def _one(self, token: int) -> NDArray[np.integer]:
        self.tokens += 1
        return np.array([token], dtype=self._encoder.dtype)
