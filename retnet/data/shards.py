"""Token shards: the folder that `retnet data` writes, opened for reading.

    manifest.json        totals, the tokenizer, the shards with counts and SHA-256, files left out
    tokenizer/           tokenizer.json and tokenizer_config.json (none for bytes)
    00000.tokens         the tokens of the shard's documents end to end, raw little-endian uint16 or uint32
    00000.index          int64 [5, documents], one row per `Column`
    00000.json           the files that the documents came from, and the shard's counts

The formats are plain: raw numbers and JSON, nothing executable. Every document is in one shard and begins with the
document start. Shards are memory-mapped, so a corpus takes 8 bytes of memory per document. Opening compares the sizes
of all files with the manifest; `check_shards` reads everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retnet.data.kinds import MANIFEST, SHARD_FORMAT
from retnet.data.tokenizer import Tokenizer
from retnet.data.tokenizer_json import saved_tokenizer
from retnet.system.files import hash_file, read_json

FORMAT = SHARD_FORMAT
VERSION = 1
TOKENIZER = "tokenizer"
SUFFIXES = ("tokens", "index", "json")


class Column(IntEnum):
    """Rows of an index."""

    END = 0  # end of the document, in tokens from the start of the shard
    BYTES = 1  # bytes of its text
    HASH = 2  # first 8 bytes of the SHA-256 of its text, as a signed number; decides its side of a split
    PIECE = 3  # the shard's piece that it came from
    NUMBER = 4  # line (from 1, in the piece) or row (from 0, in the file) where it begins; -1 for a whole file


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every token, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardFolder:
    """An open folder of shards: documents by number, over all shards.

    Raises FileNotFoundError if there is no manifest, ValueError if it is not ours or a file has another size than the
    manifest says.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.dtype = np.dtype(self.manifest["dtype"])
        for shard in self.shards:
            for suffix in SUFFIXES:
                _check_size(directory / f"{shard['name']}.{suffix}", shard["size"][suffix])
        self.first_document = np.cumsum([0, *(shard["documents"] for shard in self.shards)])
        self._tokens: dict[int, NDArray[np.integer]] = {}
        self._index: dict[int, NDArray[np.int64]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state without the memory maps, which pickle would copy: each process opens its own."""
        return self.__dict__ | {"_tokens": {}, "_index": {}}

    @property
    def documents(self) -> int:
        return int(self.first_document[-1])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of these tokens."""
        return saved_tokenizer(self.directory / TOKENIZER, self.manifest["tokenizer"])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, int64 [documents]."""
        ends = (self.index(shard)[Column.END] for shard in range(len(self.shards)))
        return np.concatenate([np.diff(end, prepend=0) for end in ends] or [np.zeros(0, dtype=np.int64)])

    def column(self, column: Column) -> NDArray[np.int64]:
        """A column of the index for every document, int64 [documents]."""
        columns = [self.index(shard)[column] for shard in range(len(self.shards))]
        return np.concatenate(columns or [np.zeros(0, dtype=np.int64)])

    def index(self, shard: int) -> NDArray[np.int64]:
        """The index of a shard, int64 [5, documents of the shard]."""
        if shard not in self._index:
            self._index[shard] = self._map(shard, "index", np.dtype("<i8")).reshape(len(Column), -1)
        return self._index[shard]

    def tokens(self, document: int, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens [start, stop) of a document."""
        shard, local = self.place(document)
        begin = int(self.index(shard)[Column.END, local - 1]) if local else 0
        return self.shard_tokens(shard)[begin + start : begin + stop]

    def shard_tokens(self, shard: int) -> NDArray[np.integer]:
        """All tokens of a shard, end to end."""
        if shard not in self._tokens:
            self._tokens[shard] = self._map(shard, "tokens", self.dtype)
        return self._tokens[shard]

    def describe(self, document: int) -> str:
        """The file of a document, and its line or row."""
        shard, local = self.place(document)
        entry = self.shards[shard]
        pieces = read_json(self.directory / f"{entry['name']}.json")["pieces"]
        piece, number = (int(self.index(shard)[column, local]) for column in (Column.PIECE, Column.NUMBER))
        name, unit = pieces[piece]["name"], pieces[piece]["unit"]
        if number < 0:
            return name
        if unit == "row":
            return f"{name} row {number}"
        return f"{name}:{number + (entry['lines_before'] if piece == 0 else 0)}"

    def place(self, document: int) -> tuple[int, int]:
        """The shard of a document, and its number there."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
        return shard, document - int(self.first_document[shard])

    def _map(self, shard: int, suffix: str, dtype: np.dtype) -> NDArray[Any]:
        path = self.directory / f"{self.shards[shard]['name']}.{suffix}"
        if not path.stat().st_size:
            return np.zeros(0, dtype=dtype)
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest. Raises FileNotFoundError if there is none, ValueError if it is not ours or of a later version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {directory}; accepted: a folder that `retnet data` wrote")
    try:
        manifest = read_json(path)
        kind = manifest["format"], manifest["version"]
    except ValueError as error:
        raise ValueError(f"{path} is not a manifest of token shards: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of token shards: no format or no version") from error
    if kind != (FORMAT, VERSION):
        raise ValueError(f"{path} is {kind[0]} version {kind[1]}; accepted: {FORMAT} version {VERSION}")
    return manifest


def check_shards(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Read every file: for each shard its name, and the damage found or None.

    Compares the SHA-256 of every file, and checks that indices and tokens are in range. Raises as `ShardFolder` does,
    and ValueError for a tokenizer that is not the one of these tokens.
    """
    folder = ShardFolder(directory)
    if token_dtype(folder.tokenizer.vocab_size) != folder.dtype:
        raise ValueError(f"{directory}: {folder.dtype} cannot be the type of {folder.tokenizer.vocab_size} tokens")
    for number, shard in enumerate(folder.shards):
        yield shard["name"], _check_shard(folder, number)


def _check_shard(folder: ShardFolder, number: int) -> str | None:
    shard = folder.shards[number]
    for suffix in SUFFIXES:
        file = f"{shard['name']}.{suffix}"
        if (found := hash_file(folder.directory / file)) != shard["sha256"][suffix]:
            return f"{file} is damaged: its SHA-256 is {found}, the manifest says {shard['sha256'][suffix]}"
    ends = folder.index(number)[Column.END]
    if (np.diff(ends, prepend=0) < 1).any() or (len(ends) and ends[-1] != shard["tokens"]):
        return f"{shard['name']}.index does not add up to the {shard['tokens']} tokens of the shard"
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    wrong = np.flatnonzero(folder.shard_tokens(number)[starts] != folder.tokenizer.document_start)
    if len(wrong):
        document = int(folder.first_document[number]) + int(wrong[0])
        return f"{folder.describe(document)} does not begin with the document start"
    return None


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder is incomplete, write it again with `retnet data`")
    if (found := path.stat().st_size) != size:
        raise ValueError(f"{path} has {found} bytes, the manifest says {size}: write it again with `retnet data`")
