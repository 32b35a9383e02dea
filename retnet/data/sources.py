"""Text files as documents: found in a fixed order, and split into training and validation.

A document is a file. Only its path and size are kept; its bytes are read when a batch needs them, so a folder may be
larger than memory. Nothing is decoded: any encoding is bytes. Formats with many documents per file (jsonl, parquet) are
for `retnet data`, which writes them as shards.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

STDLIB = "stdlib"
SNIFF_BYTES = 8192
LINKED, DANGLING, SPECIAL, EMPTY, BINARY = "linked folder", "dangling link", "special file", "empty file", "binary file"
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
# Installed packages and tests, which differ from one distribution to the next, and one generated 700 KB file of prose.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """A range of bytes in a file: the whole file, or the part that a split gives to one side.

    name: path relative to the source, with forward slashes: the same on every machine.
    """

    name: str
    path: Path
    size: int
    offset: int = 0

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of the document.

        Raises ValueError if the file is now shorter than when it was found.
        """
        length = self.size - start if length is None else length
        with open(self.path, "rb") as file:
            file.seek(self.offset + start)
            data = file.read(length)
        if len(data) != length:
            raise ValueError(
                f"{self.path} changed while in use: {length} bytes expected at {self.offset + start}, got {len(data)}"
            )
        return data


@dataclass(frozen=True)
class Split:
    """The two sides of a source."""

    train: tuple[Document, ...]
    valid: tuple[Document, ...]


def find_documents(
    source: str | os.PathLike[str], *, unpack: bool = False, left_out: Counter[str] | None = None
) -> tuple[Document, ...]:
    """The documents of a source, sorted by name.

    source: `stdlib` (the source of Python's standard library, found through sysconfig, without its tests, generated
        documentation and installed packages), a file, or a folder, searched to any depth.
    unpack: include compressed text and parquet, for readers that can open them; sizes are those on disk.
    left_out: a counter to which files left out are added, by kind (see `describe_left_out`).

    In a folder, names that start with a dot and `__pycache__` are skipped, and links to folders are not followed. Empty
    files are skipped, and so are binary ones: those with a zero byte in their first 8 KiB (git's rule; text in UTF-16
    counts as binary).

    Raises FileNotFoundError if there is no such path, ValueError if it holds no text.
    """
    if os.fspath(source) == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        candidates = (path for path in _walk(root, _STDLIB_SKIPPED) if path.suffix == ".py")
    else:
        root = Path(source)
        if not root.exists():
            raise FileNotFoundError(f"no such file or folder: {root} (data is a file, a folder, or {STDLIB!r})")
        candidates = _walk(root, set()) if root.is_dir() else iter([root])
    return _keep_text(root, candidates, unpack, Counter() if left_out is None else left_out)


def split_documents(documents: Sequence[Document], valid_fraction: float = 0.05) -> Split:
    """A fixed split: a document is for validation if the hash of its name is below `valid_fraction`.

    Adding or removing files moves no other file to the other side. Where one side would be empty (few files), the last
    `valid_fraction` of every document's bytes is for validation instead.

    Raises ValueError if the fraction is not between 0 and 1, or if there is too little text for both sides.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}; accepted: between 0 and 1")
    valid = [document for document in documents if _hash_fraction(document.name) < valid_fraction]
    if 0 < len(valid) < len(documents):
        chosen = set(valid)
        return Split(tuple(d for d in documents if d not in chosen), tuple(valid))
    parts = [_cut(document, valid_fraction) for document in documents if document.size > 1]
    if not parts:
        total = sum(document.size for document in documents)
        raise ValueError(f"too little text for a training and a validation side: {total} bytes in all")
    return Split(tuple(head for head, _ in parts), tuple(tail for _, tail in parts))


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Files, and links to folders without following them."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped and f != "__pycache__" and not f.startswith("."))
        yield from (path for path in (Path(folder, name) for name in folders) if path.is_symlink())
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def _keep_text(root: Path, candidates: Iterable[Path], unpack: bool, left_out: Counter[str]) -> tuple[Document, ...]:
    documents: list[Document] = []
    here: Counter[str] = Counter()
    for path in candidates:
        if kind := _why_left_out(path, unpack):
            here[kind] += 1
            continue
        name = path.name if path == root else path.relative_to(root).as_posix()
        documents.append(Document(name, path, path.stat().st_size))
    if not documents:
        empty, binary = here.pop(EMPTY, 0), here.pop(BINARY, 0)
        others = f", and {describe_left_out(here)}" if here else ""
        raise ValueError(f"no text in {root}: {empty + binary} files seen, {empty} empty, {binary} binary{others}")
    left_out.update(here)
    return tuple(sorted(documents, key=lambda document: document.name))


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """The files that a search left out, as text: `2 binary files, 1 linked folder`."""
    return ", ".join(f"{number:,} {kind}{'' if number == 1 else 's'}" for kind, number in sorted(left_out.items()))


def suffix_of(path: Path) -> str:
    """The suffix of a file in lower case, which tells its format."""
    return path.suffix.lower()


def is_compressed(path: Path) -> bool:
    """Whether `unpacked` decompresses this file."""
    return suffix_of(path) in _OPENERS


def unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    """The open file `path`, decompressed if it is compressed; reading damaged data raises one of `DAMAGED`."""
    return cast(BinaryIO, _OPENERS[suffix_of(path)](raw)) if is_compressed(path) else raw


def _why_left_out(path: Path, unpack: bool) -> str | None:
    """The kind of a path that is not text; None for text."""
    if path.is_dir():
        return LINKED
    if not path.is_file():
        return DANGLING if path.is_symlink() else SPECIAL
    if not path.stat().st_size:
        return EMPTY
    may_be_binary = unpack and suffix_of(path) == ".parquet"
    return BINARY if not may_be_binary and _is_binary(path, unpack) else None


def _is_binary(path: Path, unpack: bool) -> bool:
    try:
        with open(path, "rb") as raw, unpacked(raw, path) if unpack else raw as file:
            return b"\0" in file.read(SNIFF_BYTES)
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def _hash_fraction(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(document: Document, valid_fraction: float) -> tuple[Document, Document]:
    """The head and the tail of a document, each at least one byte."""
    head = min(document.size - 1, max(1, round(document.size * (1 - valid_fraction))))
    return (
        Document(document.name, document.path, head, document.offset),
        Document(document.name, document.path, document.size - head, document.offset + head),
    )
