"""Documents packed into rows of T tokens, with the boundaries kept.

Rows are filled to the last token, so every batch has one shape and no compute goes to padding. Documents follow each
other in a row; one that does not fit goes on in the next row as a piece that starts fresh. The first token of a piece
is context and is not predicted: for the first piece it is the document start, for a later one the last token of the
piece before. So each byte of each document is predicted exactly once, and a sum of losses divided by the bytes is
bits per byte with nothing left out.

Only the beginning of each row is kept in memory (16 bytes a row); bytes are read when a row is asked for. Carrying the
state from one piece of a document to the next is left out.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retnet.data.sources import Document
from retnet.data.tokenizer import DOCUMENT_START, ByteTokenizer

IGNORED = -100


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens, by index; the same documents, length and seed give the same rows everywhere.

    documents: what to pack. A document of n bytes is n + 1 tokens: the document start, then its bytes.
    length: T, the tokens in a row, at least 2.
    seed: order of the documents; None keeps the given order. (The order of the rows is the sampler's business.)

    Item i is a dict of int64 tensors [T]:
        input_ids: the tokens.
        labels: the same tokens, -100 where nothing is to be predicted: at the first token of a piece and in what fills
            up the last row. As Hugging Face models expect, they are not shifted.
        position_ids: tokens since the piece began; 0 is a boundary.

    Raises ValueError if there are no documents or the length is below 2.
    """

    def __init__(self, documents: Sequence[Document], length: int, seed: int | None = 0):
        if length < 2:
            raise ValueError(f"a row needs at least 2 tokens to predict one, got length {length}")
        if not documents:
            raise ValueError("no documents to pack")
        self.length = length
        self.documents = list(documents)
        if seed is not None:
            random.Random(seed).shuffle(self.documents)
        self.num_bytes = sum(document.size for document in self.documents)
        # Row r begins with token `_first_token[r]` of document `_first_document[r]`.
        self._first_document = array("q")
        self._first_token = array("q")
        self._index_rows()

    def __len__(self) -> int:
        return len(self._first_document)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        input_ids = torch.full((self.length,), DOCUMENT_START, dtype=torch.int64)
        labels = torch.full((self.length,), IGNORED, dtype=torch.int64)
        position_ids = torch.arange(self.length)
        filled = 0
        for document, begin, size in self._pieces(index):
            end = filled + size
            input_ids[filled:end] = _tokens(document, begin, size)
            labels[filled + 1 : end] = input_ids[filled + 1 : end]
            position_ids[filled:end] = torch.arange(size)
            filled = end
        position_ids[filled:] -= filled
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}

    def _index_rows(self) -> None:
        """Find where each row begins.

        A piece of s tokens moves the cursor of its document by s - 1, because its last token is the next one's context.
        """
        used = self.length
        for index, document in enumerate(self.documents):
            token = 0
            while token < document.size:
                if used == self.length:
                    self._first_document.append(index)
                    self._first_token.append(token)
                    used = 0
                size = min(self.length - used, document.size + 1 - token)
                token += size - 1
                used += size

    def _pieces(self, row: int) -> Iterator[tuple[Document, int, int]]:
        """The pieces of a row: document, first token, number of tokens."""
        index, token = self._first_document[row], self._first_token[row]
        left = self.length
        while left and index < len(self.documents):
            document = self.documents[index]
            size = min(left, document.size + 1 - token)
            yield document, token, size
            left -= size
            index, token = index + 1, 0


def _tokens(document: Document, begin: int, size: int) -> Tensor:
    """Tokens [begin, begin + size) of a document, of which token 0 is the document start."""
    starts = begin == 0
    data = document.read(max(begin - 1, 0), size - starts)
    return ByteTokenizer().encode(data, document_start=starts)
