"""Sources of text: found in a fixed order, by what they hold, and split into training and validation.

A document of plain text is a file. Only its path and size are kept; its bytes are read when a batch needs them, so a
folder may be larger than memory. Nothing is decoded: any encoding is bytes. Files with many documents (jsonl, parquet)
and compressed files are for `retnet data`, which writes them as shards.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

from retnet.data.compression import is_compressed
from retnet.data.kinds import READ, Kind, kind_of_file, kind_of_folder, syntax_of
from retnet.data.stores import Location, StorePath, location, size_of, walk
from retnet.system.sizes import quantity
from retnet.system.suggest import did_you_mean_path

STDLIB = "stdlib"
_PART_SUFFIXES = (".json", ".tokens", ".index")  # of files in shards and saved datasets that are no sources
_NAMES = 3
# Installed packages and tests, which differ from one distribution to the next, and one generated 700 KB file of prose.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


class SourceWarning(UserWarning):
    """Files of a source that are left out, or that are read as something unlikely."""


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


@dataclass
class PathsByKind:
    """Paths quantity by kind, and the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        names = self.names.setdefault(kind, [])
        if len(names) < _NAMES:
            names.append(name)

    def update(self, other: PathsByKind) -> None:
        for kind, names in other.names.items():
            self.names[kind] = [*self.names.get(kind, []), *names][:_NAMES]
        self.counts.update(other.counts)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Such as `2 binary files (a.png, b.png), 1 linked folder (c)`."""
        return ", ".join(self._describe(kind, number) for kind, number in sorted(self.counts.items()))

    def _describe(self, kind: str, number: int) -> str:
        names = ", ".join(self.names[kind])
        more = ", ..." if number > len(self.names[kind]) else ""
        return f"{quantity(number, kind)} ({names}{more})"


@dataclass(frozen=True)
class SourceFile:
    """A file with documents. name: path relative to the source, with forward slashes. size: bytes on disk."""

    name: str
    path: Location
    size: int
    kind: Kind


@dataclass(frozen=True)
class Source:
    """What a source holds.

    kind: SHARDS, DATASET or DATASETS, which have no `files` here; TEXT for files of any kind.
    left_out: the paths of a folder that are not read.
    with_syntax: files of text that look like a table or JSON, and are read with the syntax of it.
    """

    name: str
    kind: Kind
    files: tuple[SourceFile, ...]
    left_out: PathsByKind
    with_syntax: PathsByKind = field(default_factory=PathsByKind)

    def refuse(self, accepted: str) -> NoReturn:
        """Raise ValueError with what was found, for a reader that does not read it."""
        raise ValueError(f"{self.name} holds {self._describe()}; accepted: {accepted}")

    def warn(self) -> None:
        """Warn about the paths that are not read, and about those that are hardly meant as text."""
        if self.left_out:
            warnings.warn(f"{self.name}: left out {self.left_out}", SourceWarning, stacklevel=3)
        if self.with_syntax:
            records = "records are read from .jsonl, .json and .parquet"
            message = f"{self.name}: read as plain text, syntax included: {self.with_syntax}; {records}"
            warnings.warn(message, SourceWarning, stacklevel=3)

    def _describe(self) -> str:
        if self.kind is not Kind.TEXT:
            return "token shards" if self.kind is Kind.SHARDS else f"a {self.kind} of save_to_disk"
        return str(by_kind(self.files))


def by_kind(files: Iterable[SourceFile]) -> PathsByKind:
    """Files by kind, as `compressed jsonl file`."""
    found = PathsByKind()
    for file in files:
        found.add(f"{'compressed ' if is_compressed(file.path) else ''}{file.kind} file", file.name)
    return found


def find_source(source: str | os.PathLike[str], record_field: str | None = None, *, zeros: bool = False) -> Source:
    """What a source holds, decided in one place for every verb (see `kinds`).

    source: `stdlib` (the source of Python's standard library, found through sysconfig, without its tests, generated
        documentation and installed packages), a file, or a folder, searched to any depth; or the URL of one in a store
        (see `stores`).

    record_field: the field with the text, if one was named (see `kind_of_file`).

    zeros: whether a file that is the source may have zero bytes in its text.

    Files are sorted by name. In a folder, names that start with a dot and `__pycache__`, links to folders, empty and
    binary files are left out.

    Raises FileNotFoundError if there is no such path, OSError for a folder or file that cannot be read, ValueError if
    it holds nothing to read, for shards or a dataset in a folder below it, and for a file of either.
    """
    name = os.fspath(source)
    if not name:  # as from an unset variable; a path of it would be the current folder
        raise ValueError("a source is empty text; accepted: a file, a folder ('.' for this one), or 'stdlib'")
    root = Path(sysconfig.get_path("stdlib")) if name == STDLIB else location(source)
    left_out = PathsByKind()
    _check_exists(root, name)
    if name == STDLIB:
        paths: Iterable[Location] = (path for path in _walk(root, _STDLIB_SKIPPED, left_out) if path.suffix == ".py")
    elif root.is_dir():
        if kind := kind_of_folder(root):
            return Source(name, kind, (), left_out)
        paths = _walk(root, set(), left_out)
    else:
        if root.suffix in _PART_SUFFIXES and (whole := _kind_of_parent(root)):
            article = "" if whole is Kind.SHARDS else "a "
            raise ValueError(f"{root} is a part of {article}{whole}; accepted: the whole folder, {root.parent}")
        paths = [root]
    files, with_syntax = [], PathsByKind()
    for path in paths:
        below = path.name if path is root else _below(path, root)
        kind = kind_of_file(path, record_field, zeros=zeros and path is root)
        if kind in READ:
            files.append(SourceFile(below, path, size_of(path), kind))
            if kind is Kind.TEXT and (syntax := syntax_of(path)):
                with_syntax.add(f"{syntax} file", below)
        else:
            left_out.add(kind, below)
    if not files:
        raise ValueError(f"no text in {root}: {left_out or 'it has no files'}")
    if name == STDLIB:
        left_out = PathsByKind()  # of a fixed collection: nothing that a user meant to give
    return Source(name, Kind.TEXT, tuple(sorted(files, key=lambda file: file.name)), left_out, with_syntax)


def find_documents(source: str | os.PathLike[str]) -> tuple[Document, ...]:
    """The documents of a source of plain text, sorted by name; a warning counts what is left out.

    Raises as `find_source` does, and ValueError for a source that holds anything but plain text.
    """
    return plain_documents(find_source(source))


def plain_documents(source: Source) -> tuple[Document, ...]:
    """The documents of files of plain text; a warning counts what is left out.

    Raises ValueError for any other file.
    """
    paths = [file.path for file in source.files if isinstance(file.path, Path)]
    plain = all(file.kind is Kind.TEXT and not is_compressed(file.path) for file in source.files)
    if source.kind is not Kind.TEXT or not plain or len(paths) < len(source.files):
        source.refuse(f"token shards, or plain text only (`retnet data {source.name} OUT` writes shards of it)")
    source.warn()
    return tuple(Document(file.name, path, file.size) for file, path in zip(source.files, paths))


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


def _check_exists(root: Location, name: str) -> None:
    try:
        if not isinstance(root, StorePath):
            root.stat()
        elif not root.exists():
            raise FileNotFoundError(name)
    except FileNotFoundError as error:
        accepted = f"accepted: files, folders, {STDLIB!r}; for `retnet data` also hf:NAME, a dataset, and URLs"
        meant = did_you_mean_path(name, [STDLIB]) if isinstance(root, Path) else ""
        raise FileNotFoundError(f"no such file or folder: {root} ({accepted}){meant}") from error


def _below(path: Location, root: Location) -> str:
    """The path of a file relative to the source, with forward slashes."""
    return cast(Path, path).relative_to(cast(Path, root)).as_posix()


def _walk(root: Location, skipped: set[str], left_out: PathsByKind) -> Iterator[Location]:
    """Files, and links to folders without following them. Raises OSError for a folder that cannot be read."""
    for at, folders, files in walk(root, _raise):
        if str(at) != str(root) and (kind := kind_of_folder(at)):
            raise ValueError(f"{root} holds {kind} in {at}; accepted: {at} as a source of its own")
        folders[:] = sorted(set(folders) - skipped)
        for name in [name for name in folders if name.startswith(".") or name == "__pycache__"]:
            left_out.add(Kind.HIDDEN_FOLDER, _below(at / name, root))
            folders.remove(name)
        yield from (path for path in (at / name for name in folders) if path.is_symlink())
        for name in sorted(files):
            if name.startswith("."):
                left_out.add(Kind.HIDDEN, _below(at / name, root))
            else:
                yield at / name


def _kind_of_parent(path: Location) -> Kind | None:
    """The kind of the folder that holds a file; None if it cannot be listed, which the file's readers need not do."""
    try:
        return kind_of_folder(path.parent)
    except PermissionError:
        return None


def _raise(error: OSError) -> NoReturn:
    raise error


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
