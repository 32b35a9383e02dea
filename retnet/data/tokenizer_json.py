"""Trained tokenizers (a Hugging Face `tokenizer.json`, or a directory that holds one), and tokenizers found by name.

Everything but tokenising is switched off: truncation and padding (many of these files cut at 512 tokens), special
tokens around a text, and special tokens spelled inside a text, which would be read as document boundaries. Tokenizers
that exist only as Python code or as a sentencepiece model are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet.data.chat_files import TEMPLATE_FILE, TEMPLATE_FOLDER, copy_templates
from retnet.data.parts_encoder import PartsEncoder
from retnet.data.stream_decoder import REPLACEMENT, BytesDecoder, StreamDecoder
from retnet.data.stream_encoder import StreamEncoder, WindowEncoder, utf8_text
from retnet.data.tokenizer import (
    BYTES,
    DOCUMENT_START,
    PAD,
    VOCAB_SIZE,
    ByteTokenizer,
    Tokenizer,
    byte_characters,
    check_token,
)
from retnet.system.extras import needs
from retnet.system.files import flush, read_json, write_json, written_whole
from retnet.system.suggest import did_you_mean, did_you_mean_path

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_HUB_FILES = [TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, f"{TEMPLATE_FOLDER}/*.jinja"]
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_LLAMA = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_BYTES_BY_CHARACTER = {character: byte for byte, character in byte_characters().items()}


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`.

    file: its path. start, end: ids of the tokens around documents. loaded: what `file` holds, if it has been read.

    Raises ValueError if the file is not a tokenizer.
    """

    reads_text = True

    def __init__(self, file: Path, start: int, end: int | None = None, *, loaded: tokenizers.Tokenizer | None = None):
        self.file = file
        self._tokenizer = _load(file) if loaded is None else loaded
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.document_start, self.document_end = start, end
        decoders = _decoders(self._tokenizer)
        steps = {step["type"] for step in decoders}
        self._byte_level, self._byte_fallback = "ByteLevel" in steps, "ByteFallback" in steps
        self._joins_bytes = steps == {"ByteLevel"}  # the text of tokens is that of their bytes joined
        self._joins_pieces = decoders[:3] == _LLAMA and decoders[3:] in ([], [_STRIP])  # with spaces for U+2581
        self._strips = decoders[3:] == [_STRIP]
        self._unknown = _unknown_token(self._tokenizer)
        # The unknown token stands for text, and so do the tokens of byte fallback.
        special = {
            token
            for content, token in _special_tokens(self._tokenizer).items()
            if token != self._unknown and not (self._byte_fallback and _BYTE_TOKEN.fullmatch(content))
        }
        self._dropped = special | {start} | ({end} if end is not None else set())
        self._never_text = self._dropped - {self._unknown}
        self._parts_encoder: PartsEncoder | None = None  # made on first use: it is a second copy of the vocabulary
        self._bytes: dict[int, bytes] = {}

    @property
    def special_tokens(self) -> dict[str, int]:
        spelt = {token: self._tokenizer.id_to_token(token) for token in sorted(self._never_text)}
        return {spelling: token for token, spelling in spelt.items() if spelling}

    @property
    def text_vocab_size(self) -> int:
        """Tokens that a text can have are below it: special tokens beyond them never come from `encode`."""
        numbers = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        return max(numbers - set(_special_tokens(self._tokenizer).values()), default=0) + 1

    def encode_batch(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        words = [utf8_text(text) for text in texts]
        with _refused_text():
            encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return [self._as_text(encoding.ids) for encoding in encodings]

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        with _refused_text():
            runs = self._of_parts().encode(parts)
        return [token for run in runs for token in ([run] if isinstance(run, int) else self._as_text(run))]

    def places_of_parts(self, parts: Sequence[str | int]) -> list[tuple[int, int, int]]:
        with _refused_text():
            found = self._of_parts().places(parts)
        return [
            (token, begin, end)
            for token, begin, end, is_special in found
            for token in ([token] if is_special else self._as_text([token]))
        ]

    def _of_parts(self) -> PartsEncoder:
        if self._parts_encoder is None:
            self._parts_encoder = PartsEncoder(_load(self.file), self.special_tokens)
        return self._parts_encoder

    def stream_encoder(self) -> StreamEncoder:
        return WindowEncoder(self._ids_of, self._encode_window, self._as_text)

    def _ids_of(self, text: str) -> list[int]:
        with _refused_text():
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode_window(self, text: str) -> tokenizers.Encoding:
        with _refused_text():
            return self._tokenizer.encode(text, add_special_tokens=False)

    def _as_text(self, tokens: list[int]) -> list[int]:
        """The tokens of a text, with special tokens replaced by those of their spelling.

        A model finds them in a text where their spelling is one of its pieces, as in Unigram and WordLevel.
        """
        if self._never_text.isdisjoint(tokens):
            return tokens
        return [part for token in tokens for part in (self._spelt(token) if token in self._never_text else [token])]

    def _spelt(self, token: int) -> list[int]:
        """The tokens of a special token's spelling in two parts, which the model cannot join."""
        spelling = self._tokenizer.id_to_token(token) or ""
        if len(spelling) < 2:
            if self._unknown is None:
                raise ValueError(f"the text holds {spelling!r}, which is a special token; accepted: text without it")
            return [self._unknown]
        parts = (self._tokenizer.model.tokenize(part) for part in (spelling[:1], spelling[1:]))
        return self._as_text([piece.id for pieces in parts for piece in pieces])

    def decode(self, tokens: Iterable[int]) -> str:
        kept = [int(token) for token in tokens if token not in self._dropped]
        for token in kept:
            check_token(token)
        if not self._byte_fallback:
            return self._tokenizer.decode(kept, skip_special_tokens=False)
        pieces = [piece for token in kept if (piece := self._tokenizer.id_to_token(token)) is not None]
        return self._tokenizer.decoder.decode(_mend_bytes(pieces))

    def stream_decoder(self) -> StreamDecoder:
        if self._joins_bytes:
            return BytesDecoder(self.token_bytes)
        return BytesDecoder(self._spaced_bytes, self._strips) if self._joins_pieces else super().stream_decoder()

    def _spaced_bytes(self, token: int) -> bytes:
        """The bytes of a token in a text of Llama's decoder: a piece with its spaces, or one byte."""
        data = self.token_bytes(token)
        return data if len(data) == 1 else data.replace("▁".encode(), b" ")

    def token_bytes(self, token: int) -> bytes:
        if token not in self._bytes:
            self._bytes[token] = self._find_bytes(token)
        return self._bytes[token]

    def _find_bytes(self, token: int) -> bytes:
        piece = None if token in self._dropped else self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and all(character in _BYTES_BY_CHARACTER for character in piece):
            return bytes(_BYTES_BY_CHARACTER[character] for character in piece)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.encode()

    def same_tokens(self, other: Tokenizer) -> bool:
        if isinstance(other, JsonTokenizer):
            return self._tokenizer.get_vocab() == other._tokenizer.get_vocab()
        return super().same_tokens(other)

    def save(self, directory: Path) -> None:
        directory.mkdir()
        _copy(self.file, directory / TOKENIZER_FILE)
        self._save_config(directory / CONFIG_FILE)
        copy_templates(self.file.parent, directory)
        for path in (*directory.rglob("*"), directory):
            flush(path)

    def _save_config(self, path: Path) -> None:
        beside = self.file.with_name(CONFIG_FILE)
        if beside.is_file():
            _copy(beside, path)
            return
        end = self.document_start if self.document_end is None else self.document_end
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._tokenizer.id_to_token(self.document_start),
            "eos_token": self._tokenizer.id_to_token(end),
        }
        write_json(path, config)


def find_tokenizer(name: str, start: str | None = None, *, with_end: bool = False) -> Tokenizer:
    """The tokenizer that a user names.

    name: `bytes`, a `tokenizer.json`, a directory that holds one, or a model of the Hugging Face hub.
    start: the token before documents; by default the tokenizer's bos token, otherwise its eos token, otherwise its only
        special token.
    with_end: put the eos token (without one, the start) after every document.

    Raises FileNotFoundError if there is no such tokenizer, ValueError if it has no token to stand before documents.
    """
    if name == BYTES:
        if start is not None or with_end:
            raise ValueError("bytes have one document start, 256, and no end; other tokens need a tokenizer.json")
        return ByteTokenizer()
    file = _tokenizer_file(name)
    loaded = _load(file)
    special = _special_tokens(loaded)
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
            raise ValueError(f"{file} has no special token {token!r}; it has: {listed}{did_you_mean(token, special)}")
    return JsonTokenizer(file, special[start], None if end is None else special[end], loaded=loaded)


def saved_tokenizer(directory: Path, description: dict[str, Any]) -> Tokenizer:
    """The tokenizer kept by `describe` and `save`. Raises ValueError if its file is not the one that was saved."""
    if description["identity"] == BYTES:
        return ByteTokenizer()
    tokenizer = JsonTokenizer(directory / TOKENIZER_FILE, description["document_start"], description["document_end"])
    if tokenizer.identity != description["identity"]:
        raise ValueError(f"{tokenizer.file} is not the tokenizer of these tokens: its SHA-256 is {tokenizer.identity}")
    return tokenizer


def tokenizer_of_model(
    name: str,
    directory: Path | None,
    vocab_size: int,
    *,
    bos: int | None = None,
    eos: int | None = None,
    reads_bytes: bool = False,
) -> Tokenizer:
    """The tokenizer of a model: the one beside its weights, otherwise bytes.

    name: what the user called the model. directory: where it is saved, if it is. vocab_size, bos, eos: the model's own;
    bos and eos are used where the tokenizer names none. reads_bytes: the model says that its tokens are bytes, as does
    a vocabulary of 257. The document end is the tokenizer's eos token.

    Raises ValueError if there is neither, if no token can stand before documents, or if the tokenizer has more tokens
    than the model.
    """
    file = None if directory is None else directory / TOKENIZER_FILE
    if file is None or not file.is_file():
        if reads_bytes or vocab_size == VOCAB_SIZE:
            return ByteTokenizer()
        where = "" if directory is None else f" and no {TOKENIZER_FILE} beside its weights"
        raise ValueError(
            f"{name} has a vocabulary of {vocab_size}{where}; accepted without a tokenizer: bytes, {VOCAB_SIZE} tokens "
            f"(or name one in Python: bytes, a {TOKENIZER_FILE}, a directory with one, or a model of the Hugging Face "
            "hub); `retnet train` saves a model with the tokenizer of its data"
        )
    loaded = _load(file)
    if _is_bytes(loaded):
        return ByteTokenizer()
    special, named = _special_tokens(loaded), {}
    for key, token in _read_config(file).items():
        named[key] = loaded.token_to_id(token)
        if named[key] is None and named.get("bos_token") is None:  # beside a bos token, eos may be one never learned
            raise ValueError(
                f"{file} has no token {token!r}, its {key}; special tokens: {', '.join(special) or 'none'}"
            )
    only = next(iter(special.values())) if len(special) == 1 else None
    starts = (named.get("bos_token"), bos, named.get("eos_token"), eos, only)
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise ValueError(
            f"{directory} has neither a bos nor an eos token, in {CONFIG_FILE} or the model's configuration; accepted: "
            f"a bos_token in {CONFIG_FILE}, to stand before documents (special tokens: {', '.join(special) or 'none'})"
        )
    tokenizer = JsonTokenizer(file, start, named.get("eos_token"), loaded=loaded)
    if max(tokenizer.text_vocab_size, start + 1) > vocab_size:
        raise ValueError(f"{file} has {tokenizer.vocab_size} tokens; accepted: at most the {vocab_size} of {name}")
    return tokenizer


def _copy(file: Path, target: Path) -> None:
    """Copy a file; an error of the disk names the target, which shutil's does not."""
    data = file.read_bytes()
    with written_whole(target) as copy:
        copy.write(data)


def _load(file: Path) -> tokenizers.Tokenizer:
    with needs("hf", f"{file}, a trained tokenizer,"):
        from tokenizers import Tokenizer as Loaded

    try:
        return Loaded.from_buffer(file.read_bytes())  # from_file takes no path that is not UTF-8
    except Exception as error:  # the class that tokenizers raises
        raise ValueError(f"{file} is not a tokenizer: {error}") from error


@contextmanager
def _refused_text() -> Iterator[None]:
    """Raise the exception of a text that has no tokens as a ValueError."""
    try:
        yield
    except Exception as error:  # the class that tokenizers raises
        raise ValueError(
            f"the tokenizer has no tokens for this text ({error}); accepted: one with an unknown token, or of bytes"
        ) from error


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    return {token.content: n for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _unknown_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of the token for text outside the vocabulary, if there is one."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None:
        return tokenizer.token_to_id(unknown)
    is_unigram = type(tokenizer.model).__name__ == "Unigram"  # which keeps it out of Python's reach
    return json.loads(tokenizer.to_str())["model"]["unk_id"] if is_unigram else None


def _decoders(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoders that run one after the other, as in the JSON."""
    if tokenizer.decoder is None:
        return []
    found: list[dict[str, Any]] = []
    waiting = [json.loads(tokenizer.decoder.__getstate__())]  # the decoder's part of the JSON
    while waiting:
        step = waiting.pop(0)
        if "decoders" in step:
            waiting = [*step["decoders"], *waiting]
        else:
            found.append(step)
    return found


def _is_bytes(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether this is the byte tokenizer as transformers knows it (`models/hf/tokenizer.py`)."""
    if tokenizer.get_vocab_size() != VOCAB_SIZE or {step["type"] for step in _decoders(tokenizer)} != {"ByteLevel"}:
        return False
    special = set(_special_tokens(tokenizer).values())
    return special in ({DOCUMENT_START}, {DOCUMENT_START, PAD}) and all(
        tokenizer.id_to_token(byte) == character for byte, character in byte_characters().items() if byte not in special
    )


def _mend_bytes(pieces: list[str]) -> list[str]:
    """Tokens with every byte that is no part of a character replaced by U+FFFD.

    Byte fallback would otherwise replace the whole run of bytes that it stands in.
    """
    mended: list[str] = []
    run: list[str] = []
    for piece in [*pieces, ""]:
        if _BYTE_TOKEN.fullmatch(piece):
            run.append(piece)
            continue
        data, begin = bytes.fromhex("".join(token[3:5] for token in run)), 0
        while begin < len(data):
            try:
                data[begin:].decode()
            except UnicodeDecodeError as error:
                mended += [*run[begin : begin + error.start], REPLACEMENT]
                begin += error.end
            else:
                mended += run[begin:]
                begin = len(data)
        run = []
        mended.append(piece)
    return mended[:-1]


def _tokenizer_file(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if path.is_file():
        return path
    accepted = "accepted: bytes, a tokenizer.json, a directory with one, or a model of the Hugging Face hub"
    meant = did_you_mean_path(name, [BYTES])
    if path.suffix == ".json" or path.exists() or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"no such tokenizer: {path} ({accepted}){meant}")
    with needs("hf", f"{name}, a tokenizer of the hub,"):
        from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub raises many kinds: no such model, no network, not allowed
        raise FileNotFoundError(f"no such tokenizer: {name} ({accepted}{meant}): {error}") from error
    if not (directory / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"{name} on the hub has no {TOKENIZER_FILE} ({accepted})")
    return directory / TOKENIZER_FILE


def _read_config(file: Path) -> dict[str, str]:
    """bos_token and eos_token of the tokenizer_config.json beside a tokenizer, as text."""
    beside = file.with_name(CONFIG_FILE)
    if not beside.is_file():
        return {}
    config = read_json(beside)
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
