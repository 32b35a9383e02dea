"""Documents as sequences of tokens, whatever they come from: files read as bytes, or shards that `retnet data` wrote.

This is what packing, training and evaluation read. A document begins with its document start and is never joined to
another here. Lengths are in memory (8 bytes a document), tokens are read when asked for.
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

from retnet.data.byte_vocabulary import DOCUMENT_START, VOCAB_SIZE
from retnet.data.sources import Document, find_documents, split_documents

_HASH_BLOCK = 1 << 20


class Corpus(ABC):
    """N documents.

    name: what it was opened as, for messages.
    vocab_size: tokens are below it.
    document_start: the token that stands before every document, and is its token 0.
    lengths: int64 [N], tokens of each document, its start included; at least 2.
    num_bytes: bytes of text in all documents together (UTF-8, or as they lie in the files): what bits per byte are per.
    tokenizer_directory: folder with the `tokenizer.json` that the tokens belong to; None for bytes.
    """

    name: str
    vocab_size: int
    document_start: int
    lengths: NDArray[np.int64]
    num_bytes: int
    tokenizer_directory: Path | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all documents, their starts included."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the starts."""
        return self.num_tokens - len(self)

    @abstractmethod
    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Tokens [start, stop) of a document, stop at most its length; any integer type.

        Raises ValueError if what they are read from has changed since it was opened.
        """

    @abstractmethod
    def describe(self, document: int) -> str:
        """Where a document comes from: a path, or a path and a line or row."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; document starts are dropped, and what is not text becomes U+FFFD."""

    @abstractmethod
    def split(self, valid_fraction: float) -> tuple[Self, Self]:
        """Training and validation: the same documents land on the same side whatever else there is.

        Raises ValueError if the fraction is not between 0 and 1, or if there is too little text for both sides.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash (hexadecimal) of all that the tokens depend on: equal ones give equal training rows."""


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

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token != DOCUMENT_START).decode(errors="replace")

    def split(self, valid_fraction: float) -> tuple[Self, Self]:
        split = split_documents(self.documents, valid_fraction)
        return type(self)(split.train, f"{self.name} (training)"), type(self)(split.valid, f"{self.name} (validation)")

    @cached_property
    def fingerprint(self) -> str:
        """Names, sizes and contents; every file is read once."""
        digest = hashlib.sha256(b"bytes")
        for document in self.documents:
            digest.update(f"\n{document.name!r} {document.size}\n".encode("utf-8", "backslashreplace"))
            for begin in range(0, document.size, _HASH_BLOCK):
                digest.update(document.read(begin, min(_HASH_BLOCK, document.size - begin)))
        return digest.hexdigest()


def open_corpus(source: str | os.PathLike[str]) -> Corpus:
    """The documents of a source: a folder that `retnet data` wrote, or text read as bytes (see `find_documents`).

    Raises FileNotFoundError if there is no such path, ValueError if it holds no text or its shards are not whole.
    """
    return ByteCorpus(find_documents(source), os.fspath(source))
