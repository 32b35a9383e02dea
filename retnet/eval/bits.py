"""Bits per byte of documents under a byte model, each document in one context however long.

Documents are read in pieces with the state carried over, so neither memory nor accuracy depends on their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from retnet.data import VOCAB_SIZE, ByteTokenizer, Document
from retnet.models.lm import LanguageModel
from retnet.models.log_likelihood import score

PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class BitsPerByte:
    """The total over all documents."""

    bits: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.num_bytes


def bits_per_byte(model: LanguageModel, documents: Iterable[Document]) -> BitsPerByte:
    """-log2 p summed over every byte of every document, each begun by the document start.

    Raises ValueError if the model's vocabulary is not bytes or there are no documents.
    """
    check_reads_bytes(model)
    device = model.embedding.weight.device
    bits, num_bytes = 0.0, 0
    for document in documents:
        state, before = None, ByteTokenizer().encode(b"")
        for start in range(0, document.size, PIECE_BYTES):
            data = document.read(start, min(PIECE_BYTES, document.size - start))
            ids = torch.cat([before, ByteTokenizer().encode(data, document_start=False)])
            nats, state = score(model, ids[None].to(device), state)
            bits += nats.double().sum().item() / math.log(2)
            before = ids[-1:]
        num_bytes += document.size
    if not num_bytes:
        raise ValueError("no documents to score")
    return BitsPerByte(bits, num_bytes)


def check_reads_bytes(model: LanguageModel) -> None:
    """Raise ValueError unless the model's tokens are bytes and the document start."""
    if model.config.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"{model.config.name} has a vocabulary of {model.config.vocab_size}; text is read as bytes, which need "
            f"one of {VOCAB_SIZE}"
        )
