"""Compressed files, read decompressed: whole or an error.

A file is read to its last byte: every member of gzip, every stream of xz and bzip2, every frame of zstandard. Whatever
follows them is damage, apart from padding of zeros where a format has it: at the end of gzip, and in fours after a
stream of xz. Python's own files of these formats end without an error at a second stream that does not begin well.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast

from retnet.data.stores import Location
from retnet.system.extras import needs

ZSTANDARD = ".zst"
ZSTANDARD_FILE = "A .zst file"  # in the error of a missing library
_CHUNK = 1 << 18


class DamagedError(ValueError):
    """A compressed file that cannot be read to its end; the message begins with the file."""


def is_compressed(path: Location) -> bool:
    """Whether `unpacked` decompresses this file, by its name."""
    return suffix_of(path) in _CHUNKS


def plain_name(path: Location) -> Location:
    """The path without the suffix of a compressed file."""
    return path.with_suffix("") if is_compressed(path) else path


def suffix_of(path: Location) -> str:
    """The suffix of a file in lower case, which tells its format."""
    return path.suffix.lower()


def unpacked(raw: BinaryIO, path: Location) -> BinaryIO:
    """The open file `path`, decompressed if it is compressed; reading damaged data raises `DamagedError`."""
    return cast(BinaryIO, io.BufferedReader(_Unpacked(raw, path), _CHUNK)) if is_compressed(path) else raw


class _Unpacked(io.RawIOBase):
    """A raw file of the chunks that a format's reader gives."""

    def __init__(self, raw: BinaryIO, path: Location):
        self._path = path
        self._chunks = _CHUNKS[suffix_of(path)](raw)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = next(self._chunks)
            except StopIteration:
                return 0
            except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
                if getattr(error, "errno", None) is not None:  # of the disk, not of the data
                    raise
                raise DamagedError(f"{self._path} is damaged or cut off: {error}") from error
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


def _streams(new: Callable[[], Any], padding: Callable[[bytes, int], bool], raw: BinaryIO) -> Iterator[bytes]:
    """The streams of a file, one after the other.

    new: a decompressor for one stream, with the methods of Python's for bzip2 and xz.
    padding: whether zeros may stand between a stream and what follows it (the bytes, and how many zeros).
    """
    data = raw.read(_CHUNK)
    if not data:
        raise EOFError("it is empty")
    while data:
        stream = new()
        while not stream.eof:
            yield stream.decompress(data, _CHUNK)
            data = raw.read(_CHUNK) if stream.needs_input and not stream.eof else b""
            if stream.needs_input and not stream.eof and not data:
                raise EOFError("it ends inside a stream")
        data, zeros = stream.unused_data, 0
        while not (rest := data.lstrip(b"\0")) and (more := raw.read(_CHUNK)):
            data, zeros = more, zeros + len(data)
        zeros += len(data) - len(rest)
        if zeros and not padding(rest, zeros):
            raise EOFError(f"{zeros} zero bytes after a stream")
        data = rest


class _Member:
    """A decompressor for one member of gzip."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: gzip's header and trailer

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._member.decompress(self._member.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def needs_input(self) -> bool:
        return not self._member.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data


class _KeptOpen:
    """A file for pyarrow, which closes what it reads from: the file below stays open."""

    def __init__(self, raw: BinaryIO):
        self.read, self.closed = raw.read, False

    def close(self) -> None:
        self.closed = True


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    with needs("train", ZSTANDARD_FILE):
        import pyarrow as pa

    if not cast(io.BufferedReader, raw).peek(1):
        raise EOFError("it is empty")
    file = pa.CompressedInputStream(pa.PythonFile(_KeptOpen(raw), "r"), "zstd")
    while chunk := file.read(_CHUNK):
        yield chunk


_CHUNKS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": partial(_streams, _Member, lambda rest, zeros: not rest),
    ".bz2": partial(_streams, bz2.BZ2Decompressor, lambda rest, zeros: False),
    ".xz": partial(_streams, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), lambda rest, zeros: zeros % 4 == 0),
    ZSTANDARD: _zstd,
}
