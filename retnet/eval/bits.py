"""Bits per byte of documents: -log2 p of a document's tokens over the bytes of its text, each document one context.

Documents are read in pieces with the state carried over, so neither memory nor accuracy depends on their length. Bits
per byte are comparable between models with different tokenizers, and with compressors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from retnet.data import Corpus, Document, Tokenizer
from retnet.data.blocks import cut_documents
from retnet.eval.processes import ALONE, Processes
from retnet.models.lm import LanguageModel
from retnet.models.log_likelihood import score

PIECE_BYTES = 1 << 16
PIECE_TOKENS = 1 << 13  # few enough for progress to be seen on a CPU


@dataclass(frozen=True)
class BitsPerByte:
    """The total over all documents."""

    bits: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.num_bytes


def bits_per_byte(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    on_tokens: Callable[[int], None] = lambda count: None,
    processes: Processes = ALONE,
) -> BitsPerByte:
    """-log2 p summed over every token of every document, each begun by the document start.

    on_tokens: gets the number of tokens of every piece that has been scored.
    processes: share the documents; the sum is that of one process.

    A document cut inside a character (`split_documents` of a single file) begins with its next one, where the tokenizer
    needs text.

    Raises ValueError for a document that the tokenizer cannot read, and if there are none.
    """
    texts = list(documents)

    def scored(document: Document) -> tuple[float, int]:
        begin = _first_character(document) if tokenizer.reads_text else 0
        pieces = _pieces_of_text(tokenizer, document, begin)
        try:
            return _bits(model, tokenizer.document_start, pieces, on_tokens), document.size - begin
        except ValueError as error:
            raise ValueError(f"{document.path}: {error}") from error

    found = processes.run([text.size for text in texts], lambda share: [scored(texts[i]) for i in share])
    return _total(sum(bits for bits, _ in found), sum(size for _, size in found))


def corpus_bits_per_byte(
    model: LanguageModel,
    corpus: Corpus,
    on_tokens: Callable[[int], None] = lambda count: None,
    processes: Processes = ALONE,
) -> BitsPerByte:
    """The same of a corpus whose tokens are the model's: token shards are scored as they were trained on."""
    start = corpus.document_start

    def scored(share: range) -> list[float]:
        return [_bits(model, start, _pieces_of_tokens(corpus, i), on_tokens) for i in share]

    return _total(sum(processes.run(corpus.lengths.tolist(), scored)), corpus.num_bytes)


def _total(bits: float, num_bytes: int) -> BitsPerByte:
    if not num_bytes:
        raise ValueError("there are no documents to score; accepted: at least one")
    return BitsPerByte(bits, num_bytes)


def _bits(
    model: LanguageModel, document_start: int, pieces: Iterable[Sequence[int]], on_tokens: Callable[[int], None]
) -> float:
    """-log2 p of the tokens in `pieces`, which follow one another after the document start."""
    device = model.embedding.weight.device
    bits, state, before = 0.0, None, document_start
    for piece in pieces:
        if len(piece):
            ids = torch.tensor([[before, *piece]], device=device)
            nats, state = score(model, ids, state)
            bits += nats.double().sum().item() / math.log(2)
            before = piece[-1]
            on_tokens(len(piece))
    return bits


def _pieces_of_text(tokenizer: Tokenizer, document: Document, begin: int) -> Iterator[Sequence[int]]:
    """The tokens of a document, in pieces."""
    chunks = (
        document.read(start, min(PIECE_BYTES, document.size - start))
        for start in range(begin, document.size, PIECE_BYTES)
    )
    encoder = tokenizer.stream_encoder()
    for block, last in cut_documents(chunks, None):
        tokens = encoder.push(block, last)
        for start in range(0, len(tokens), PIECE_TOKENS):
            yield tokens[start : start + PIECE_TOKENS]


def _pieces_of_tokens(corpus: Corpus, document: int) -> Iterator[Sequence[int]]:
    length = int(corpus.lengths[document])
    for start in range(1, length, PIECE_TOKENS):
        yield corpus.tokens(document, start, min(start + PIECE_TOKENS, length)).tolist()


def _first_character(document: Document) -> int:
    """Bytes before the first character that begins in a part of a file."""
    head = document.read(0, min(3, document.size)) if document.offset else b""
    return len(head) - len(head.lstrip(bytes(range(0x80, 0xC0))))
