"""Tokenizers: the interface between text and tokens, and bytes as tokens.

A byte model reads any file on any machine with nothing to download or train, and its loss is bits per byte, which
compressors share. Trained tokenizers (`tokenizer.json`) are in `tokenizer_json`. Standard library only: worker
processes that tokenise load no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from retnet.data.stream_decoder import REPLACEMENT, BytesDecoder, StreamDecoder, ends_inside_character
from retnet.data.stream_encoder import BytesEncoder, StreamEncoder

BYTES = "bytes"
DOCUMENT_START = 256
DOCUMENT_START_TOKEN = "<|document|>"  # its spelling, for libraries whose special tokens have one
VOCAB_SIZE = 257
PAD = 0xFF  # no part of any UTF-8 text; a pad for libraries that need one


class Tokenizer(ABC):
    """A vocabulary and its rules.

    identity: equal for tokenizers whose tokens mean the same: `bytes`, or the SHA-256 of the `tokenizer.json`.
    vocab_size: tokens are below it. A model's vocabulary may be larger (padded); such tokens decode to nothing.
    document_start: the token before every document, and before a prompt.
    document_end: the token after every document, if there is one.
    reads_text: whether `encode` needs text, which is UTF-8 where given as bytes, or takes any bytes.
    """

    identity: str
    vocab_size: int
    document_start: int
    document_end: int | None = None
    reads_text: bool

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """The tokens that are no part of a text, by their spelling, those around documents among them."""

    def encode(self, text: str | bytes, *, start: bool = False) -> list[int]:
        """The tokens of a text, with the document start first if `start`. Special tokens spelled in a text are text.

        Raises ValueError for a text that has no tokens in this vocabulary, and for bytes that are not UTF-8 where text
        is needed.
        """
        try:
            data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has half of a surrogate pair at character {error.start}; accepted: whole characters"
            ) from error
        (tokens,) = self.encode_batch([data])
        return [self.document_start, *tokens] if start else list(tokens)

    @abstractmethod
    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The tokens of a text in which special tokens stand, given by their ids between the parts of the text.

        It is tokenised as a whole, as transformers tokenises a text with these tokens spelled in it; what is spelled in
        the parts stays text. Nothing is put before it. Raises ValueError as `encode`.
        """

    @abstractmethod
    def places_of_parts(self, parts: Sequence[str | int]) -> list[tuple[int, int, int]]:
        """`encode_parts` with the place of each token: (token, begin, end), where a character of a part counts one, and
        so does a special token. A character in several tokens is the place of each.
        """

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        """The tokens of each text, nothing around them; bytes come back as bytes. Raises ValueError as `encode`."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens. Special tokens and padding of the vocabulary are dropped, and bytes that are not UTF-8
        become U+FFFD.

        Raises ValueError for a negative token.
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for inside a text, apart from spaces that decoding adds or strips."""

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time: a character is returned with its last byte."""

        def unsettled(tokens: Sequence[int], text: str) -> int:
            if not text.endswith(REPLACEMENT):
                return 0
            tail = b"".join(map(self.token_bytes, tokens))
            return int(ends_inside_character(tail))  # decoded to one U+FFFD

        return StreamDecoder(self.decode, unsettled)

    @abstractmethod
    def stream_encoder(self) -> StreamEncoder:
        """An encoder for a text that arrives in blocks: their tokens are those of the whole text."""

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every token means the same to both: a tokenizer saved again has another identity."""
        return self.identity == other.identity

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for a tokenizer, enough for `saved_tokenizer`."""
        return {
            "identity": self.identity,
            "vocab_size": self.vocab_size,
            "document_start": self.document_start,
            "document_end": self.document_end,
        }

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write into a new directory, flushed to the disk, what transformers needs to load this tokenizer.

        Nothing for bytes.
        """


class ByteTokenizer(Tokenizer):
    """Bytes as tokens.

    Tokens 0 to 255 are the bytes themselves (text is UTF-8); 256 (`DOCUMENT_START`) stands before a document and is
    never inside one.
    """

    identity = BYTES
    vocab_size = VOCAB_SIZE
    document_start = DOCUMENT_START
    reads_text = False

    @property
    def special_tokens(self) -> dict[str, int]:
        return {DOCUMENT_START_TOKEN: DOCUMENT_START}

    def encode_batch(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        return list(texts)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        return [token for part in parts for token in ([part] if isinstance(part, int) else self.encode(part))]

    def places_of_parts(self, parts: Sequence[str | int]) -> list[tuple[int, int, int]]:
        places: list[tuple[int, int, int]] = []
        for at, unit in enumerate(unit for part in parts for unit in ([part] if isinstance(part, int) else part)):
            tokens = [unit] if isinstance(unit, int) else self.encode(unit)
            places += [(token, at, at + 1) for token in tokens]
        return places

    def stream_encoder(self) -> StreamEncoder:
        return BytesEncoder()

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens; document starts and padding of the vocabulary are dropped."""
        return b"".join(map(self.token_bytes, tokens))

    def decode(self, tokens: Iterable[int]) -> str:
        return self.decode_bytes(tokens).decode(errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        return BytesDecoder(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        check_token(token)
        return _ONE_BYTE[token] if token < DOCUMENT_START else b""

    def save(self, directory: Path) -> None:
        return


_ONE_BYTE = [bytes([byte]) for byte in range(256)]


def check_token(token: int) -> None:
    """Raise ValueError for a token that no vocabulary has."""
    if token < 0:
        raise ValueError(f"a token is {token}; accepted: 0 or more")


def byte_characters() -> dict[int, str]:
    """Byte -> the character that stands for it in byte-level BPE: itself where printable, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
