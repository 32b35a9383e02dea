"""Compressors for comparison, in bits per byte: gzip, xz and an order-2 byte model.

gzip and xz see only the text that they compress, as one stream, which suits them better than file by file. The order-2
model is trained on the training documents, as the network is: a network that does not beat it has not even learnt
which byte follows the last two.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from retnet.data import ByteCorpus, Corpus

_CHUNK = 1 << 20
ORDER2 = "order-2 bytes"


class Text(Protocol):
    """Bytes to compress: a document in a file (`retnet.data.Document`), or one decoded."""

    @property
    def size(self) -> int: ...

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length), to the end if None."""
        ...


@dataclass(frozen=True)
class DecodedText:
    """The text of a document that is stored as tokens."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        return self.data[start : None if length is None else start + length]


class DecodedCorpus:
    """The texts of a corpus, decoded one at a time when they are asked for."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __iter__(self) -> Iterator[DecodedText]:
        for document in range(len(self.corpus)):
            yield DecodedText(self.corpus.decode(self.corpus.tokens(document).tolist()).encode())


def gzip_bits_per_byte(documents: Iterable[Text]) -> float:
    """Size of `gzip -9` of all documents in one stream, in bits per byte of text."""
    counter = _CountingSink()
    with gzip.GzipFile(fileobj=counter, mode="wb", compresslevel=9, mtime=0) as stream:
        total = sum(stream.write(data) for data in _chunks(documents))
    return 8 * counter.size / total


def xz_bits_per_byte(documents: Iterable[Text]) -> float:
    """Size of `xz -9` of all documents in one stream, in bits per byte of text."""
    compressor = lzma.LZMACompressor(preset=9)
    size = total = 0
    for data in _chunks(documents):
        total += len(data)
        size += len(compressor.compress(data))
    return 8 * (size + len(compressor.flush())) / total


class Order2Model:
    """The probability of a byte after the two bytes before it, with interpolated Witten-Bell smoothing.

    With c(h, x) how often byte x followed the context h, c(h) the sum over x, and u(h) how many different bytes
    followed h, the estimate of order n falls back on order n - 1 for the share of mass u / (c + u):

        p_n(x | h) = (c(h, x) + u(h) p_{n-1}(x | h')) / (c(h) + u(h)),   p_{-1}(x) = 1 / 256

    where h' is h without its oldest byte (Witten and Bell 1991, "The zero-frequency problem", method C; interpolated).
    A document starts in the context of two zero bytes.
    """

    def __init__(self, documents: Iterable[Text]):
        counts = torch.zeros(1 << 24, dtype=torch.float64)
        for codes in _trigram_codes(documents):
            values, times = codes.unique(return_counts=True)
            counts[values] += times
        trigrams = counts.view(256, 256, 256)
        order0 = _witten_bell(trigrams.sum((0, 1)), counts.new_full((256,), 1 / 256))
        order1 = _witten_bell(trigrams.sum(0), order0)
        for table in trigrams:  # in place, one oldest byte at a time: the table itself is 128 MiB
            table.copy_(_witten_bell(table, order1).log2_())
        self._log2 = counts

    def bits_per_byte(self, documents: Iterable[Text]) -> float:
        """Mean of -log2 p over all bytes."""
        bits, total = 0.0, 0
        for codes in _trigram_codes(documents):
            bits -= self._log2[codes].sum().item()
            total += len(codes)
        return bits / total


def texts_of(corpus: Corpus) -> Iterable[Text]:
    """The texts of a corpus: its files, or its tokens decoded."""
    return corpus.documents if isinstance(corpus, ByteCorpus) else DecodedCorpus(corpus)


def compressor_table(
    train: Iterable[Text] | None, valid: Iterable[Text], on_method: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Bits per byte of `valid`, by name of the method; the order-2 model only if there is something to train it on.

    on_method: gets the name of each method before it runs.
    """
    methods: dict[str, Callable[[], float]] = {
        "gzip -9": lambda: gzip_bits_per_byte(valid),
        "xz -9": lambda: xz_bits_per_byte(valid),
    }
    if train is not None:
        methods[ORDER2] = lambda: Order2Model(train).bits_per_byte(valid)
    table = {}
    for name, bits_per_byte in methods.items():
        on_method(name)
        table[name] = bits_per_byte()
    return table


def _witten_bell(counts: Tensor, lower: Tensor) -> Tensor:
    """One step of the interpolation: counts [..., 256] of an order, probabilities of the order below."""
    total = counts.sum(-1, keepdim=True)
    distinct = (counts > 0).sum(-1, keepdim=True)
    # A context that never occurred has 0 / 0: all its mass belongs to the lower order.
    distinct = distinct.clamp(min=1)
    return (counts + distinct * lower) / (total + distinct)


def _trigram_codes(documents: Iterable[Text]) -> Iterator[Tensor]:
    """For each byte x after bytes a and b: 65536 a + 256 b + x, int64, at most `_CHUNK` at a time."""
    for document in documents:
        before = bytes(2)
        for start in range(0, document.size, _CHUNK):
            data = before + document.read(start, min(_CHUNK, document.size - start))
            codes = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
            yield (codes[:-2] * 256 + codes[1:-1]) * 256 + codes[2:]
            before = data[-2:]


def _chunks(documents: Iterable[Text]) -> Iterator[bytes]:
    for document in documents:
        for start in range(0, document.size, _CHUNK):
            yield document.read(start, min(_CHUNK, document.size - start))


class _CountingSink:
    """A file that remembers only how much was written."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
