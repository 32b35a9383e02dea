"""Text to tokens for whatever model is evaluated: the tokenizer beside its weights, or bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.data import VOCAB_SIZE, ByteTokenizer
from retnet.data.tokenizer import DOCUMENT_START
from retnet.models.config import ModelConfig


@dataclass(frozen=True)
class TextCodec:
    """encode and decode of a tokenizer; start: the token that stands before a document."""

    tokenizer: Any
    start: int

    @classmethod
    def of(cls, directory: str | Path, config: ModelConfig) -> TextCodec:
        """The tokenizer in a directory, or bytes for a vocabulary of bytes.

        Raises ValueError if there is neither, or no token to start with.
        """
        if (Path(directory) / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast  # AutoTokenizer would ask to run the directory's own code

            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
            starts = (config.bos_token_id, tokenizer.bos_token_id, config.eos_token_id, tokenizer.eos_token_id)
            start = next((token for token in starts if token is not None), None)
            if start is None:
                raise ValueError(f"{directory} has neither a bos nor an eos token; a document needs one to start with")
            return cls(tokenizer, start)
        if config.vocab_size == VOCAB_SIZE:
            return cls(_Bytes(), DOCUMENT_START)
        raise ValueError(
            f"{directory} holds no tokenizer.json, and its vocabulary of {config.vocab_size} is not that of bytes "
            f"({VOCAB_SIZE})"
        )

    def encode(self, text: str) -> list[int]:
        """Tokens, without the start."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


class _Bytes:
    """ByteTokenizer with the methods of transformers' tokenizers."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return ByteTokenizer().encode(text, document_start=add_special_tokens).tolist()

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return ByteTokenizer().decode(tokens)
