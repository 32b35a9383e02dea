"""Readers: documents from pieces of files, in bounded memory.

A document is read as one or more blocks of bytes, the last of them marked. Blocks have at most `BLOCK_BYTES` and end
between characters, so documents may have any size, and block boundaries depend on the document alone.

Every error in the data is a `DataError` whose message begins with the file and the line or row.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from retnet.data.blocks import BLOCK_BYTES, cut_blocks, cut_documents
from retnet.data.compression import DamagedError, is_compressed, unpacked
from retnet.data.kinds import BOM, LINE_BYTES, Kind
from retnet.data.plan import TABLES, Piece, Settings
from retnet.data.stores import location
from retnet.system.extras import needs
from retnet.system.files import naming
from retnet.system.sizes import format_bytes

ROW_KINDS = (Kind.PARQUET, Kind.ARROW, Kind.JSON)
_ROWS = 64


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
    lines: newlines read so far; 0 for files of rows.
    progress: share of the piece that has been read, from 0 to 1.
    """

    def __init__(self, piece: Piece, settings: Settings, *, utf8: bool):
        self.piece, self.settings, self.utf8 = piece, settings, utf8
        self.lines = 0
        self.progress = 0.0
        self._path = location(piece.path)

    def blocks(self) -> Iterator[Block]:
        """The documents, block by block, without empty ones. Raises DataError, OSError."""
        read = {Kind.TEXT: self._text, Kind.JSONL: self._from_lines, Kind.JSON: self._from_array}
        with naming(self._path):
            if self.piece.kind not in read:
                yield from self._from_rows()
            else:
                try:
                    with self._path.open("rb") as raw, unpacked(raw, self._path) as file:
                        raw.seek(self.piece.begin)
                        yield from read[Kind(self.piece.kind)](raw, file)
                except DamagedError as error:
                    raise DataError(str(error)) from error
        self.progress = 1.0

    def _text(self, raw: BinaryIO, file: BinaryIO) -> Iterator[Block]:
        separator = self.settings.cut
        began, documents, open_document = 0, 0, False
        for data, last in cut_documents(self._chunks(raw, file), separator):
            if not open_document:
                self.lines += separator.text.count("\n") if separator and documents else 0
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
            if at == len(line):  # the file's first
                line = line.removeprefix(BOM)
            if line.strip():
                self._advance(raw)
                yield from _blocks_of(self.lines + 1, self._parse(line))
            self.lines += 1

    def _parse(self, line: bytes) -> bytes:
        try:
            record = json.loads(line.decode(), object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._place(1)}: not JSON: {error}") from error
        return self._text_of(record, partial(self._place, 1))

    def _text_of(self, record: Any, place: Callable[[], str]) -> bytes:
        """The text of one JSON record. place: of the record, for messages."""
        field = self.settings.text_field
        if not isinstance(record, _Pairs):
            raise DataError(f"{place()}: a JSON {type(record).__name__}; accepted: an object with {field!r}")
        names = [name for name, _ in record]
        if names.count(field) != 1:
            if field in names:
                raise DataError(f"{place()}: {names.count(field)} fields named {field!r}; accepted: one")
            raise DataError(f"{place()}: no field {field!r}; it has: {', '.join(names) or 'none'}")
        return _encode(record[names.index(field)][1], field, place)

    def _from_array(self, raw: BinaryIO, file: BinaryIO) -> Iterator[Block]:
        """json: an array of objects, or objects one after the other, the text in one field."""
        row = 0

        def place() -> str:
            return place_of(self.piece, row)

        window = _Window(file, place)
        is_array = window.begins("[")
        if is_array:
            window.take("[")
        while not window.begins("]" if is_array else ""):
            if row and is_array:
                window.take(",")
            yield from _blocks_of(row, self._text_of(window.value(), place))
            row += 1
            self._advance(raw)
        if is_array:
            window.take("]")
        window.take("")

    def _from_rows(self) -> Iterator[Block]:
        """parquet and arrow: the text in one column."""
        with needs("train", TABLES):
            import pyarrow as pa

        row, field = self.piece.first_row, self.settings.text_field

        def place() -> str:
            return place_of(self.piece, row)

        try:
            for batch in self._batches():
                self._check_column(batch.schema, field)
                column = batch.column(field)
                _bytes_of(column).validate(full=True)  # offsets of a damaged file point anywhere
                for value in column:
                    yield from _blocks_of(row, _encode(value.as_py(), field, place))
                    row += 1
        except UnicodeDecodeError as error:
            raise DataError(f"{place()}: {field!r} is not UTF-8: {error.reason} at byte {error.start}") from error
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk, not of the data
                raise
            raise DataError(f"{place()} or after: {error}") from error

    def _batches(self) -> Iterator[Any]:
        with needs("train", TABLES):
            from pyarrow import ipc, parquet

        piece, field = self.piece, self.settings.text_field
        with self._path.open("rb") as raw:  # pyarrow takes no path that is not UTF-8
            if piece.kind == Kind.PARQUET:
                with parquet.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True) as file:
                    self._check_column(file.schema_arrow, field)
                    groups = list(range(piece.begin, piece.end))
                    yield from file.iter_batches(_ROWS, row_groups=groups, columns=[field], use_threads=False)
                return
            row = 0
            for batch in ipc.open_stream(raw):
                begin, end = max(piece.begin - row, 0), min(piece.end - row, batch.num_rows)
                if begin < end:
                    yield batch.slice(begin, end - begin)
                    self.progress = (row + end - piece.begin) / (piece.end - piece.begin)
                row += batch.num_rows

    def _check_column(self, schema: Any, field: str) -> None:
        with needs("train", TABLES):
            import pyarrow.types as kinds

        number = schema.names.count(field)
        if number != 1:
            found = f"{number} columns named {field!r}" if number else f"no column {field!r}"
            raise DataError(f"{self._path}: {found}; it has: {', '.join(schema.names)}")
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
    with location(piece.path).open("rb") as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            number, left = number + block.count(b"\n"), left - len(block)
    return f"{piece.path}:{number}"


class _Pairs(list[tuple[str, Any]]):
    """The fields of a JSON object in their order; two may have one name."""


class _Window:
    """Reads the values of JSON one after the other, in an array or by themselves.

    place: where the reader is, for messages.
    """

    def __init__(self, file: BinaryIO, place: Callable[[], str]):
        self._file, self._place = file, place
        self._decoder = json.JSONDecoder(object_pairs_hook=_Pairs)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._is_begin = True  # of the file, where a byte-order mark may stand

    def begins(self, mark: str) -> bool:
        """Whether the next character is `mark`, or whether the file ends for an empty one."""
        while not (rest := self._text[self._at : self._at + 1].strip()):
            if self._at < len(self._text):
                self._at += 1
            elif not self._more(BLOCK_BYTES):
                break
        return rest == mark

    def take(self, mark: str) -> None:
        """Pass the next character, which must be `mark`, or the end of the file for an empty one."""
        if not self.begins(mark):
            found = repr(self._text[self._at]) if self._at < len(self._text) else "the end of the file"
            raise DataError(f"{self._place()}: not JSON: {found}; accepted: {repr(mark) if mark else 'nothing more'}")
        self._at += len(mark)

    def value(self) -> Any:
        """The next value of the array."""
        self.begins("")
        size = BLOCK_BYTES
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if size > LINE_BYTES:
                    message = (
                        f"{self._place()}: an object of more than {format_bytes(LINE_BYTES)}, or not JSON: {error}"
                    )
                    raise DataError(message) from error
                if not self._more(size):
                    raise DataError(f"{self._place()}: not JSON: {error}") from error
                size *= 2
            else:
                self._at = end
                return value

    def _more(self, size: int) -> bool:
        """Read on; returns whether there was anything."""
        data = self._file.read(size)
        try:
            text = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._place()} or after: not UTF-8: {error.reason}") from error
        if self._is_begin and text:
            text, self._is_begin = text.removeprefix("\ufeff"), False
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(data)


def _blocks_of(number: int, text: bytes) -> Iterator[Block]:
    if text:
        yield from (Block(number, data, last) for data, last in cut_blocks(text))


def _bytes_of(column: Any) -> Any:
    """A column of strings as one of bytes, over the same memory."""
    with needs("train", TABLES):
        import pyarrow as pa

    views = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return column.view(views[column.type])


def _encode(value: Any, field: str, place: Callable[[], str]) -> bytes:
    """A field's text as UTF-8."""
    if not isinstance(value, str):
        name = {type(None): "null", _Pairs: "object"}.get(type(value), type(value).__name__)
        raise DataError(f"{place()}: {field!r} is {name}, not text")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place()}: {field!r} holds half a surrogate pair, which is not text: {error}") from error
