"""Bytes as tokens: 256 byte values and one more, the document start.

A byte model reads any file on any machine with nothing to download or train, and its loss is bits per byte, which
compressors share. Trained tokenizers (`tokenizer.json`) are in `encoders`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import torch
from torch import Tensor

from retnet.data.byte_vocabulary import DOCUMENT_START, VOCAB_SIZE


class ByteTokenizer:
    """Text or bytes to tokens and back.

    Tokens 0 to 255 are the bytes themselves (text is UTF-8); 256 (`DOCUMENT_START`) stands before a document and is
    never inside one. Decoding drops it.
    """

    vocab_size = VOCAB_SIZE
    document_start = DOCUMENT_START

    def encode(self, text: str | bytes, *, document_start: bool = True) -> Tensor:
        """Tokens of a document, int64 [T], with the document start first unless `document_start` is False."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        tokens = torch.empty(len(data) + document_start, dtype=torch.int64)
        if document_start:
            tokens[0] = DOCUMENT_START
        if data:
            tokens[int(document_start) :] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return tokens

    def decode_bytes(self, tokens: Tensor | Iterable[int]) -> bytes:
        """The bytes of tokens [T]; document starts are dropped.

        Raises ValueError for a token outside 0 to 256.
        """
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        for token in ids:
            if not 0 <= token < VOCAB_SIZE:
                raise ValueError(f"byte tokens are 0 to {VOCAB_SIZE - 1}, got {token}")
        return bytes(token for token in ids if token != DOCUMENT_START)

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """The text of tokens [T]; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes tokens as they arrive and holds back the bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: ByteTokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, otherwise nothing."""
        return self._utf8.decode(b"", final=True)
