"""Shard writer: the pieces of one shard read, tokenised and written, in memory bounded by one batch of text.

The bytes written depend on the pieces and the tokenizer alone. The shard's JSON is written last and marks the shard as
finished.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retnet.data.plan import Piece, Settings
from retnet.data.readers import ROW_KINDS, Block, DataError, Reading, place_of
from retnet.data.shards import Column, token_dtype
from retnet.data.stream_encoder import StreamEncoder
from retnet.data.tokenizer import Tokenizer
from retnet.system.files import write_json, written_whole

BATCH_BYTES = 1 << 19


class Counts(NamedTuple):
    """Input read and output written so far. size: in the unit of the pieces' sizes."""

    size: int = 0
    documents: int = 0
    tokens: int = 0

    @classmethod
    def total(cls, counts: Iterable[Counts]) -> Counts:
        """The counts of several shards together."""
        return cls(*(sum(column) for column in zip(cls(), *counts)))


def write_shard(
    number: int,
    pieces: Sequence[Piece],
    settings: Settings,
    tokenizer: Tokenizer,
    directory: Path,
    report: Callable[[Counts], None],
) -> None:
    """Write the files of shard `number` (see `shards`), calling `report` after every batch.

    Raises DataError for data that cannot be read, OSError for files that cannot be written; then there is no JSON.
    """
    name = f"{number:05}"
    sources: list[dict[str, Any]] = []
    size_before = 0
    with ExitStack() as stack:
        index = _Index([stack.enter_context(tempfile.TemporaryFile(dir=directory)) for _ in Column])
        with written_whole(directory / f"{name}.tokens") as file:
            writer = _TokenWriter(file, index, tokenizer, pieces)
            for position, piece in enumerate(pieces):
                reading = Reading(piece, settings, utf8=tokenizer.reads_text)
                for block in reading.blocks():
                    if writer.add(position, block):
                        size = size_before + int(reading.progress * piece.size)
                        report(Counts(size, index.documents, writer.tokens))
                size_before += piece.size
                unit = "row" if piece.kind in ROW_KINDS else "line"
                sources.append({"name": piece.name, "unit": unit, "lines": reading.lines})
            writer.flush()
        with written_whole(directory / f"{name}.index") as file:
            index_hash = index.write(file)
    record = {
        "documents": index.documents,
        "tokens": writer.tokens,
        "bytes": index.bytes,
        "sha256": {"tokens": writer.digest.hexdigest(), "index": index_hash},
        "continues": pieces[0].begin > 0 and sources[0]["unit"] == "line",
        "pieces": sources,
    }
    write_json(directory / f"{name}.json", record)
    report(Counts(size_before, index.documents, writer.tokens))


class _Index:
    """The index of the finished documents: one temporary file per column, so that memory does not grow."""

    def __init__(self, columns: Sequence[BinaryIO]):
        self.documents = self.bytes = 0
        self._columns = columns

    def add(self, entries: Sequence[dict[Column, int]]) -> None:
        for column, file in zip(Column, self._columns, strict=True):
            file.write(np.array([entry[column] for entry in entries], dtype="<i8").tobytes())
        self.documents += len(entries)
        self.bytes += sum(entry[Column.BYTES] for entry in entries)

    def write(self, file: BinaryIO) -> str:
        """Write the columns one after the other; returns their SHA-256."""
        digest = hashlib.sha256()
        for column in self._columns:
            column.seek(0)
            while block := column.read(BATCH_BYTES):
                file.write(block)
                digest.update(block)
        return digest.hexdigest()


class _TokenWriter:
    """Collects blocks into batches, tokenises them, and writes them with the tokens around documents."""

    def __init__(self, file: BinaryIO, index: _Index, tokenizer: Tokenizer, pieces: Sequence[Piece]):
        self.tokens = 0
        self.digest = hashlib.sha256()
        self._file, self._index, self._tokenizer, self._pieces = file, index, tokenizer, pieces
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._batch: list[tuple[int, Block]] = []
        self._batch_bytes = 0
        self._encoder: StreamEncoder | None = None  # of the open document
        self._text: Any = None  # hash of the open document
        self._text_bytes = 0

    def add(self, piece: int, block: Block) -> bool:
        """Add a block; returns whether anything was written."""
        if block.last and self._encoder is None:
            self._batch.append((piece, block))
            self._batch_bytes += len(block.data)
            if self._batch_bytes < BATCH_BYTES:
                return False
            self.flush()
        else:  # of a document of several blocks
            self.flush()
            self._write([(piece, block)], [self._encode_part(piece, block)])
        return True

    def flush(self) -> None:
        """Write the collected documents of one block."""
        if self._batch:
            self._write(self._batch, self._encode())
            self._batch, self._batch_bytes = [], 0

    def _write(self, blocks: Sequence[tuple[int, Block]], texts: Sequence[NDArray[np.integer]]) -> None:
        runs: list[NDArray[np.integer]] = []
        ended: list[dict[Column, int]] = []
        for (piece, block), tokens in zip(blocks, texts, strict=True):
            if self._text is None:
                self._text, self._text_bytes = hashlib.sha256(), 0
                runs.append(self._one(self._tokenizer.document_start))
            runs.append(tokens)
            self.tokens += len(tokens)
            self._text.update(block.data)
            self._text_bytes += len(block.data)
            if block.last:
                ended.append(self._end_document(piece, block.number, runs))
        data = np.concatenate(runs, dtype=self._dtype, casting="unsafe").tobytes()
        self._file.write(data)
        self.digest.update(data)
        self._index.add(ended)

    def _encode_part(self, piece: int, block: Block) -> NDArray[np.integer]:
        """The tokens that are certain with a block of a longer document. Raises DataError that names it."""
        if self._encoder is None:
            self._encoder = self._tokenizer.stream_encoder()
        try:
            tokens = self._encoder.push(block.data, block.last)
        except ValueError as error:
            raise DataError(f"{place_of(self._pieces[piece], block.number)}: {error}") from error
        if block.last:
            self._encoder = None
        return self._array(tokens)

    def _encode(self) -> list[NDArray[np.integer]]:
        """The tokens of each block. Raises DataError that names the first text without tokens."""
        try:
            texts = self._tokenizer.encode_batch([block.data for _, block in self._batch])
        except ValueError:
            for piece, block in self._batch:
                try:
                    self._tokenizer.encode_batch([block.data])
                except ValueError as error:
                    raise DataError(f"{place_of(self._pieces[piece], block.number)}: {error}") from error
            raise
        return [self._array(tokens) for tokens in texts]

    def _array(self, tokens: Sequence[int]) -> NDArray[np.integer]:
        return np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.array(tokens, self._dtype)

    def _end_document(self, piece: int, number: int, runs: list[NDArray[np.integer]]) -> dict[Column, int]:
        """Close the open document; returns its entry in the index."""
        if self._tokenizer.document_end is not None:
            runs.append(self._one(self._tokenizer.document_end))
        size, digest = self._text_bytes, self._text.digest()
        self._text = None
        return {
            Column.END: self.tokens,
            Column.BYTES: size,
            Column.HASH: int.from_bytes(digest[:8], "big", signed=True),
            Column.PIECE: piece,
            Column.NUMBER: number,
        }

    def _one(self, token: int) -> NDArray[np.integer]:
        self.tokens += 1
        return np.array([token], dtype=self._dtype)
