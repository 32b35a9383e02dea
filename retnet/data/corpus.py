"""Corpora: documents as sequences of tokens, from files read as bytes or from shards that `retnet data` wrote.

Packing, training and evaluation read corpora. A document begins with its document start; documents are not joined here.
Lengths are in memory (8 bytes per document), tokens are read on demand.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from retnet.data.kinds import Kind
from retnet.data.shards import TOKENIZER, Column, ShardFolder
from retnet.data.sources import Document, find_source, plain_documents, split_documents
from retnet.data.stores import StorePath, location
from retnet.data.tokenizer import BYTES, DOCUMENT_START, VOCAB_SIZE, ByteTokenizer, Tokenizer

_HASH_BLOCK = 1 << 20


class Corpus(ABC):
    """N documents.

    name: the source it was opened from, for messages.
    vocab_size: tokens are below it.
    document_start: token 0 of every document.
    lengths: int64 [N], tokens per document, the start included; at least 1.
    num_bytes: bytes of text in all documents (UTF-8, or as in the files), for bits per byte.
    tokenizer_id: equal for corpora with the same tokenizer: `bytes`, or the SHA-256 of a `tokenizer.json`.
    tokenizer_directory: directory with that `tokenizer.json` and its `tokenizer_config.json`, which transformers'
        AutoTokenizer loads; None for bytes.
    uncut: whether a row of training holds whole documents only.
    """

    name: str
    vocab_size: int
    document_start: int
    lengths: NDArray[np.int64]
    num_bytes: int
    tokenizer_id: str = BYTES
    tokenizer_directory: Path | None = None
    uncut: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all documents, document starts included."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the document starts."""
        return self.num_tokens - len(self)

    @abstractmethod
    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Tokens [start, stop) of a document, stop at most its length; any integer type.

        Raises ValueError if the files have changed since they were opened.
        """

    def learned(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Whether each of the tokens [start, stop) of a document has a loss: all do, except in conversations."""
        stop = int(self.lengths[document]) if stop is None else stop
        return np.ones(stop - start, dtype=bool)

    def prompt(self, document: int, length: int) -> NDArray[np.integer]:
        """Tokens of a document that a model is to continue: the first `length`."""
        return self.tokens(document, 0, min(length, int(self.lengths[document])))

    @abstractmethod
    def describe(self, document: int) -> str:
        """The origin of a document: a path, or a path with a line or row."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of these tokens."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; document starts are dropped, and bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(tokens)

    @abstractmethod
    def split(self, valid_fraction: float) -> tuple[Self, Self]:
        """Training and validation side; a document's side does not depend on the other documents.

        Raises ValueError if the fraction is not between 0 and 1, or if there is too little text for both sides.
        """

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal hash of everything that the tokens depend on: equal fingerprints give equal training rows."""


class ByteCorpus(Corpus):
    """Files as bytes: token b is the byte b, and 256 stands before a document (see `ByteTokenizer`)."""

    vocab_size = VOCAB_SIZE
    document_start = DOCUMENT_START

    def __init__(self, documents: Sequence[Document], name: str = "documents"):
        self.name = name
        self.documents = tuple(documents)
        self.lengths = np.array([document.size + 1 for document in self.documents], dtype=np.int64)
        self.num_bytes = sum(document.size for document in self.documents)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        chosen = self.documents[document]
        stop = chosen.size + 1 if stop is None else stop
        data = np.frombuffer(chosen.read(max(start - 1, 0), stop - max(start, 1)), dtype=np.uint8)
        if start > 0:
            return data
        return np.concatenate([np.array([DOCUMENT_START], dtype=np.uint16), data])

    def describe(self, document: int) -> str:
        chosen = self.documents[document]
        return f"{chosen.path} from byte {chosen.offset}" if chosen.offset else str(chosen.path)

    @property
    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer()

    def split(self, valid_fraction: float) -> tuple[Self, Self]:
        split = split_documents(self.documents, valid_fraction)
        return type(self)(split.train, f"{self.name} (training)"), type(self)(split.valid, f"{self.name} (validation)")

    @cached_property
    def fingerprint(self) -> str:
        """The hash of names, sizes and contents; reads every file once."""
        digest = hashlib.sha256(b"bytes")
        for document in self.documents:
            digest.update(f"\n{document.name!r} {document.size}\n".encode("utf-8", "backslashreplace"))
            for begin in range(0, document.size, _HASH_BLOCK):
                digest.update(document.read(begin, min(_HASH_BLOCK, document.size - begin)))
        return digest.hexdigest()


class ShardCorpus(Corpus):
    """Documents of token shards: all of them, or one side of a split.

    One side is a selection of the folder's documents, or the head or tail of every document. A tail begins with its own
    document start.
    """

    def __init__(self, folder: ShardFolder, name: str):
        self.folder, self.name = folder, name
        described = folder.manifest["tokenizer"]
        self.vocab_size, self.document_start = described["vocab_size"], described["document_start"]
        self.tokenizer_id = described["identity"]
        self.tokenizer_directory = None if self.tokenizer_id == BYTES else folder.directory / TOKENIZER
        self._documents: NDArray[np.int64] | None = None
        self._skipped: NDArray[np.int64] | None = None
        self.lengths = folder.lengths
        self.num_bytes = int(folder.manifest["bytes"])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        stop = int(self.lengths[document]) if stop is None else stop
        whole = document if self._documents is None else int(self._documents[document])
        skipped = 0 if self._skipped is None else int(self._skipped[document])
        tokens = self.folder.tokens(whole, start + skipped, stop + skipped)
        if skipped and start == 0 and len(tokens):
            tokens = np.concatenate([np.array([self.document_start], dtype=tokens.dtype), tokens[1:]])
        return tokens

    def describe(self, document: int) -> str:
        whole = document if self._documents is None else int(self._documents[document])
        text = self.folder.describe(whole)
        skipped = 0 if self._skipped is None else int(self._skipped[document])
        return f"{text} from token {skipped}" if skipped else text

    @property
    def tokenizer(self) -> Tokenizer:
        return self.folder.tokenizer

    def split(self, valid_fraction: float) -> tuple[Self, Self]:
        """Split by the hash of each document's text, so that copies of a text are on the same side.

        Where one side would be empty (few documents), the last `valid_fraction` of every document's tokens is for
        validation, cut between characters. Its bytes are those of its decoded text, which is exact for tokenizers whose
        decoding restores the text.
        """
        if not 0 < valid_fraction < 1:
            raise ValueError(f"valid_fraction is {valid_fraction}; accepted: between 0 and 1")
        hashes = self.folder.column(Column.HASH).view(np.uint64)
        valid = hashes < np.uint64(valid_fraction * 2**64)
        if 0 < valid.sum() < len(valid):
            sizes = self.folder.column(Column.BYTES)
            return self._choose(~valid, "training", sizes), self._choose(valid, "validation", sizes)
        return self._cut(valid_fraction)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the manifest's hashes and the selected documents; reads no token."""
        manifest = self.folder.manifest
        digest = hashlib.sha256(repr((manifest["dtype"], sorted(manifest["tokenizer"].items()))).encode())
        for shard in manifest["shards"]:
            digest.update(f"{shard['sha256']['tokens']}{shard['sha256']['index']}".encode())
        for array in (self._documents, self._skipped, self.lengths):
            digest.update(b"whole" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _choose(self, chosen: NDArray[np.bool_], side: str, sizes: NDArray[np.int64]) -> Self:
        part = type(self)(self.folder, f"{self.name} ({side})")
        part._documents = np.flatnonzero(chosen)
        part.lengths = self.lengths[chosen]
        part.num_bytes = int(sizes[chosen].sum())
        return part

    def _cut(self, valid_fraction: float) -> tuple[Self, Self]:
        """The heads and the tails of all documents with at least two tokens of text."""
        documents = np.flatnonzero(self.lengths > 2)
        if not len(documents):
            raise ValueError(
                f"too little text in {self.name} for a training and a validation side: {self.num_bytes} bytes in all"
            )
        text = self.lengths[documents] - 1
        heads = np.clip(np.rint(text * (1 - valid_fraction)).astype(np.int64), 1, text - 1)
        tail_bytes = 0
        for slot, document in enumerate(documents):
            heads[slot], size = self._cut_at_character(int(document), int(heads[slot]))
            tail_bytes += size
        sizes = self.folder.column(Column.BYTES)[documents]
        train, valid = (type(self)(self.folder, f"{self.name} ({side})") for side in ("training", "validation"))
        train._documents = valid._documents = documents
        train.lengths, train.num_bytes = heads + 1, int(sizes.sum()) - tail_bytes
        valid._skipped, valid.lengths, valid.num_bytes = heads, text - heads + 1, tail_bytes
        return train, valid

    def _cut_at_character(self, document: int, head: int) -> tuple[int, int]:
        """The first place to cut, from `head` tokens on, that is between characters; and the bytes after it."""
        last = int(self.lengths[document]) - 1
        if self.tokenizer_id == BYTES:
            return head, last - head
        cut = next((cut for cut in range(head, min(head + 4, last)) if self._begins_character(document, cut)), head)
        return cut, len(self.decode(self.tokens(document, cut + 1).tolist()).encode())

    def _begins_character(self, document: int, cut: int) -> bool:
        """Whether the tokens of text from `cut` on begin with a whole character, which takes at most 4 tokens."""
        tokens = self.tokens(document, cut + 1, min(cut + 5, int(self.lengths[document]))).tolist()
        starts = (self.decode(tokens[:count]) for count in range(1, len(tokens) + 1))
        return any(not start.startswith("\N{REPLACEMENT CHARACTER}") for start in starts)


def token_kind(corpus: Corpus) -> tuple[str, int, int]:
    """Tokenizer, vocabulary and document start: equal for two corpora whose tokens mean the same."""
    return corpus.tokenizer_id, corpus.vocab_size, corpus.document_start


def open_corpus(source: str | os.PathLike[str]) -> Corpus:
    """The documents of a source: a folder that `retnet data` wrote, or plain text read as bytes (see `find_source`).

    Raises FileNotFoundError if there is no such path, ValueError if it holds anything else, no text, or incomplete
    shards.
    """
    found = find_source(source)
    if found.kind is Kind.SHARDS:
        folder = location(source)
        if isinstance(folder, StorePath):
            found.refuse("a copy on this machine, as shards are mapped into memory")
        return ShardCorpus(ShardFolder(folder), found.name)
    return ByteCorpus(plain_documents(found), found.name)
