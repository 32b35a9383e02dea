"""Readers: documents from pieces of files, in bounded memory.

A document is read as one or more blocks of bytes, the last of them marked. Blocks have at most `BLOCK_BYTES` and end
between characters; if possible after a line or before a space, where the usual tokenizers cut anyway. So documents may
have any size, those of one block are tokenised whole, and block boundaries depend on the document alone.

Every error in the data is a `DataError` whose message begins with the file and the line or row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from retnet.data.plan import Piece, Settings
from retnet.data.sources import DAMAGED, is_compressed, unpacked
from retnet.system.sizes import format_bytes

BLOCK_BYTES = 1 << 20
LINE_BYTES = 1 << 26
ROW_KINDS = ("parquet", "arrow")
_ROWS = 64
_TAIL = 1 << 14
_AFTER_LINE = re.compile(rb"\S\n(?=\S)")
_BEFORE_SPACE = re.compile(rb"\S(?= \S)")


class DataError(ValueError):
    """Data that cannot be read; the message begins with the place."""


class Block(NamedTuple):
    """Bytes of a document.

    number: line (from 1, in the piece) or row (from 0, in the file) where the document begins; -1 for a whole file.
    last: whether the document ends here.
    """

    number: int
    data: bytes
    last: bool


class Reading:
    """Reads one piece.

    utf8: whether text must be UTF-8.
    lines: newlines read so far; 0 for parquet and arrow.
    progress: share of the piece that has been read, from 0 to 1.
    """

    def __init__(self, piece: Piece, settings: Settings, *, utf8: bool):
        self.piece, self.settings, self.utf8 = piece, settings, utf8
        self.lines = 0
        self.progress = 0.0
        self._path = Path(piece.path)

    def blocks(self) -> Iterator[Block]:
        """The documents, block by block, without empty ones. Raises DataError, OSError."""
        if self.piece.kind in ROW_KINDS:
            yield from self._from_rows()
        else:
            try:
                with open(self._path, "rb") as raw, unpacked(raw, self._path) as file:
                    raw.seek(self.piece.begin)
                    yield from self._from_lines(raw, file) if self.piece.kind == "jsonl" else self._text(raw, file)
            except DAMAGED as error:
                raise DataError(f"{self._path} is damaged or cut off: {error}") from error
        self.progress = 1.0

    def _text(self, raw: BinaryIO, file: BinaryIO) -> Iterator[Block]:
        separator = (self.settings.separator or "").encode()
        began, documents, open_document = 0, 0, False
        for data, last in cut_documents(self._chunks(raw, file), separator):
            if not open_document:
                self.lines += separator.count(b"\n") if documents else 0
                began = self.lines + 1 if separator else -1
                documents += 1
            if self.utf8:
                self._check_utf8(data)
            empty = not data or (separator and data.isspace())
            if open_document or not (last and empty):
                yield Block(began, data, last)
            self.lines += data.count(b"\n")
            open_document = not last

    def _chunks(self, raw: BinaryIO, file: BinaryIO) -> Iterator[bytes]:
        left = None if is_compressed(self._path) else self.piece.end - self.piece.begin
        while chunk := file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
            left = None if left is None else left - len(chunk)
            self._advance(raw)
            yield chunk
        if left:
            raise self._cut_short(self.piece.end - left)

    def _from_lines(self, raw: BinaryIO, file: BinaryIO) -> Iterator[Block]:
        """jsonl: one object per line, the text in one field. Blank lines are skipped."""
        at, packed = self.piece.begin, is_compressed(self._path)
        while packed or at < self.piece.end:
            line = file.readline(LINE_BYTES + 1)
            at += len(line)
            if len(line) > LINE_BYTES:
                raise DataError(f"{self._place(1)}: a line of more than {format_bytes(LINE_BYTES)}")
            if packed and not line:
                return
            if not packed and at < self.piece.end and not line.endswith(b"\n"):
                raise self._cut_short(at)
            self._check_utf8(line)
            if line.strip():
                self._advance(raw)
                yield from _blocks_of(self.lines + 1, self._parse(line))
            self.lines += 1

    def _parse(self, line: bytes) -> bytes:
        field = self.settings.field
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._place(1)}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{self._place(1)}: a JSON {type(record).__name__}; accepted: an object with {field!r}")
        if field not in record:
            raise DataError(f"{self._place(1)}: no field {field!r}; it has: {', '.join(record) or 'none'}")
        return _encode(record[field], field, self._place)

    def _from_rows(self) -> Iterator[Block]:
        """parquet and arrow: the text in one column."""
        import pyarrow as pa

        row, field = self.piece.first_row, self.settings.field
        try:
            for batch in self._batches():
                self._check_column(batch.schema, field)
                column = batch.column(field)
                for i in range(len(column)):
                    yield from _blocks_of(
                        row, _encode(column[i].as_py(), field, lambda _, row=row: place_of(self.piece, row))
                    )
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{place_of(self.piece, row)} or after: {error}") from error

    def _batches(self) -> Iterator[Any]:
        from pyarrow import ipc, memory_map, parquet

        piece = self.piece
        if piece.kind == "parquet":
            with parquet.ParquetFile(self._path, pre_buffer=False) as file:
                self._check_column(file.schema_arrow, self.settings.field)
                groups = list(range(piece.begin, piece.end))
                yield from file.iter_batches(_ROWS, row_groups=groups, columns=[self.settings.field], use_threads=False)
            return
        with memory_map(piece.path) as file:
            row = 0
            for batch in ipc.open_stream(file):
                begin, end = max(piece.begin - row, 0), min(piece.end - row, batch.num_rows)
                if begin < end:
                    yield batch.slice(begin, end - begin)
                    self.progress = (row + end - piece.begin) / (piece.end - piece.begin)
                row += batch.num_rows

    def _check_column(self, schema: Any, field: str) -> None:
        import pyarrow.types as kinds

        if field not in schema.names:
            raise DataError(f"{self._path}: no column {field!r}; it has: {', '.join(schema.names)}")
        kind = schema.field(field).type
        if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
            raise DataError(f"{self._path}: column {field!r} holds {kind}; accepted: strings")

    def _check_utf8(self, data: bytes) -> None:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            place = self._place(1 + data[: error.start].count(b"\n"))
            raise DataError(f"{place}: not UTF-8: {error.reason} 0x{data[error.start]:02x}") from error

    def _place(self, line: int) -> str:
        """The name in messages of the line-th line after those read so far."""
        return place_of(self.piece, self.lines + line)

    def _cut_short(self, at: int) -> DataError:
        return DataError(
            f"{self._path} became shorter while it was read: it ends at byte {at} and had {self.piece.end} or more; "
            "accepted: files that nothing writes to"
        )

    def _advance(self, raw: BinaryIO) -> None:
        self.progress = min((raw.tell() - self.piece.begin) / (self.piece.end - self.piece.begin), 1.0)


def place_of(piece: Piece, number: int) -> str:
    """The name in messages of a document's first line or row: `number` as in `Block`."""
    if number < 0:
        return piece.path
    if piece.kind in ROW_KINDS:
        return f"{piece.path} row {number}"
    left = piece.begin
    with open(piece.path, "rb") as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            number, left = number + block.count(b"\n"), left - len(block)
    return f"{piece.path}:{number}"


def cut_documents(chunks: Iterable[bytes], separator: bytes) -> Iterator[tuple[bytes, bool]]:
    """Documents between separators as (block, whether it is the document's last), empty ones too.

    Without a separator everything is one document. No more than a chunk and two blocks are in memory.
    """
    rest = b""
    for chunk in chunks:
        rest += chunk
        if separator:
            *whole, rest = rest.split(separator)
            for document in whole:
                yield from _cut(document)
        while len(rest) > BLOCK_BYTES + len(separator):  # a separator may have begun in the last bytes
            cut = _between_tokens(rest)
            yield rest[:cut], False
            rest = rest[cut:]
    yield from _cut(rest)


def _cut(document: bytes) -> Iterator[tuple[bytes, bool]]:
    while len(document) > BLOCK_BYTES:
        cut = _between_tokens(document)
        yield document[:cut], False
        document = document[cut:]
    yield document, True


def _between_tokens(data: bytes) -> int:
    """The end of the first block of data longer than `BLOCK_BYTES`."""
    begin = BLOCK_BYTES - _TAIL
    window = data[begin : BLOCK_BYTES + 1]
    for pattern in (_AFTER_LINE, _BEFORE_SPACE):
        ends = [match.end() for match in pattern.finditer(window)]
        if ends:
            return begin + ends[-1]
    cut = BLOCK_BYTES
    while cut > BLOCK_BYTES - 3 and data[cut] & 0xC0 == 0x80:  # inside a character of UTF-8
        cut -= 1
    return cut


def _blocks_of(number: int, text: bytes) -> Iterator[Block]:
    if text:
        yield from (Block(number, data, last) for data, last in _cut(text))


def _encode(value: Any, field: str, place: Any) -> bytes:
    """A field's text as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{place(1)}: {field!r} is {'null' if value is None else type(value).__name__}, not text")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place(1)}: {field!r} holds half a surrogate pair, which is not text: {error}") from error
