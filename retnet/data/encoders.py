"""Text to tokens and back for corpora on disk: bytes as they are, or a `tokenizer.json` of Hugging Face tokenizers.

An encoder is made twice: by name, when text is first read, and from the copy that lies beside the tokens ever after, so
that a corpus needs nothing but itself. What a saved tokenizer does besides tokenising is switched off: truncation and
padding (many a `tokenizer.json` cuts at 512), special tokens around a text, and special tokens spelled inside a text,
which would pass for document boundaries. A tokenizer that exists only as Python code is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retnet.data.byte_vocabulary import DOCUMENT_START, VOCAB_SIZE
from retnet.system.files import flush

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_HUB_FILES = [TOKENIZER_FILE, CONFIG_FILE]
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Encoder(ABC):
    """A vocabulary and its rules.

    identity: `bytes`, or the SHA-256 of the `tokenizer.json`.
    document_start: the token before every document.
    document_end: the token after every document, if there is one.
    reads_text: whether `encode` wants text, which has to be UTF-8, or takes any bytes.
    """

    identity: str
    vocab_size: int
    document_start: int
    document_end: int | None = None
    reads_text: bool

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds every token, little-endian."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @abstractmethod
    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.integer]]:
        """The tokens of each text, nothing around them. Texts are UTF-8 if `reads_text`.

        Raises ValueError for a text that has no tokens in this vocabulary.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Text; document starts and ends are dropped, and what is not text becomes U+FFFD."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says about it, enough for `saved_encoder`."""
        return {
            "identity": self.identity,
            "vocab_size": self.vocab_size,
            "document_start": self.document_start,
            "document_end": self.document_end,
        }

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write into a new folder, flushed to the disk, what transformers needs to load this tokenizer.

        Nothing for bytes.
        """


class ByteEncoder(Encoder):
    """Token b is the byte b (see `ByteTokenizer`)."""

    identity = BYTES
    vocab_size = VOCAB_SIZE
    document_start = DOCUMENT_START
    reads_text = False

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.integer]]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token != DOCUMENT_START).decode(errors="replace")

    def save(self, directory: Path) -> None:
        return


class TokenizerEncoder(Encoder):
    """A `tokenizer.json`.

    file: where it lies. start, end: the tokens around documents, by id.

    Raises ValueError if the file is not a tokenizer.
    """

    reads_text = True

    def __init__(self, file: Path, start: int, end: int | None):
        self.file = file
        self._tokenizer = _load(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.document_start, self.document_end = start, end

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.integer]]:
        words = [text.decode() for text in texts]
        try:
            encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        except Exception as error:  # the class that tokenizers raises
            raise ValueError(
                f"the tokenizer has no tokens for this text ({error}); accepted: one with an unknown token, or of bytes"
            ) from error
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        around = (self.document_start, self.document_end)
        return self._tokenizer.decode([int(t) for t in tokens if t not in around], skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        directory.mkdir()
        shutil.copyfile(self.file, directory / TOKENIZER_FILE)
        self._save_config(directory / CONFIG_FILE)
        for path in (*directory.iterdir(), directory):
            flush(path)

    def _save_config(self, path: Path) -> None:
        beside = self.file.with_name(CONFIG_FILE)
        if beside.is_file():
            shutil.copyfile(beside, path)
            return
        end = self.document_start if self.document_end is None else self.document_end
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._tokenizer.id_to_token(self.document_start),
            "eos_token": self._tokenizer.id_to_token(end),
        }
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def find_encoder(name: str, start: str | None = None, *, with_end: bool = False) -> Encoder:
    """The encoder that a user names.

    name: `bytes`, a `tokenizer.json`, a folder that holds one, or a model of the Hugging Face hub.
    start: the token that is to stand before documents; by default the tokenizer's bos token, otherwise its eos token,
        otherwise its only special token.
    with_end: put the eos token (without one, the start) after every document.

    Raises FileNotFoundError if there is no such tokenizer, ValueError if it has no token to stand before documents.
    """
    if name == BYTES:
        if start is not None or with_end:
            raise ValueError("bytes have one document start, 256, and no end; other tokens need a tokenizer.json")
        return ByteEncoder()
    file = _tokenizer_file(name)
    added = _load(file).get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    listed = ", ".join(special) or "none"
    config = _read_config(file)
    if start is None:
        only = next(iter(special)) if len(special) == 1 else None
        start = config.get("bos_token") or config.get("eos_token") or only
    if start is None:
        raise ValueError(
            f"{file} does not say which token stands before documents; its special tokens: {listed} (choose one with "
            "--document-start)"
        )
    end = config.get("eos_token", start) if with_end else None
    for token in (start, end):
        if token is not None and token not in special:
            raise ValueError(f"{file} has no special token {token!r}; it has: {listed}")
    return TokenizerEncoder(file, special[start], None if end is None else special[end])


def saved_encoder(directory: Path, description: dict[str, Any]) -> Encoder:
    """The encoder that `describe` and `save` have kept. Raises ValueError if its file is not the one that was saved."""
    if description["identity"] == BYTES:
        return ByteEncoder()
    encoder = TokenizerEncoder(directory / TOKENIZER_FILE, description["document_start"], description["document_end"])
    if encoder.identity != description["identity"]:
        raise ValueError(f"{encoder.file} is not the tokenizer of these tokens: its SHA-256 is {encoder.identity}")
    return encoder


def _load(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the class that tokenizers raises
        raise ValueError(f"{file} is not a tokenizer: {error}") from error


def _tokenizer_file(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if path.is_file():
        return path
    accepted = "accepted: bytes, a tokenizer.json, a folder with one, or a model of the Hugging Face hub"
    if path.suffix == ".json" or path.exists() or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"no such tokenizer: {path} ({accepted})")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub has many: no such model, no network, not allowed
        raise FileNotFoundError(f"no such tokenizer: {name} ({accepted}): {error}") from error
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"{name} on the hub has no {TOKENIZER_FILE} ({accepted})")
    return folder / TOKENIZER_FILE


def _read_config(file: Path) -> dict[str, str]:
    """bos_token and eos_token of the tokenizer_config.json beside a tokenizer, as text."""
    beside = file.with_name(CONFIG_FILE)
    if not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{beside} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{beside} is a JSON {type(config).__name__}; accepted: an object")
    tokens: dict[str, str] = {}
    for key in ("bos_token", "eos_token"):
        given = config.get(key)
        token = given.get("content") if isinstance(given, dict) else given
        if not isinstance(token, str) and given is not None:
            raise ValueError(
                f"{beside}: {key} is {json.dumps(given)}; accepted: text, null, or an object with 'content'"
            )
        if token:
            tokens[key] = token
    return tokens
