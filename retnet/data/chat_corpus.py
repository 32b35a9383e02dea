"""Conversations as documents of which only the answers are learned.

Tokens are in memory. A document is one conversation, from its document start to the end of its last answer; a row of
training holds whole documents (`whole_rows`), unless states are carried from row to row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from retnet.data.chat_answers import Conversation, tokens_and_answers
from retnet.data.chat_template import ChatTemplate
from retnet.data.conversations import read_conversations
from retnet.data.corpus import Corpus
from retnet.data.readers import DataError
from retnet.data.shards import token_dtype
from retnet.data.sources import SourceFile
from retnet.data.tokenizer import BYTES, Tokenizer
from retnet.data.tokenizer_json import TOKENIZER_FILE


class Chat(NamedTuple):
    """origin: file and line. tokens: of any integer type. learned: bool, which of them belong to answers."""

    origin: str
    tokens: NDArray[np.integer]
    learned: NDArray[np.bool_]


class ChatCorpus(Corpus):
    """Conversations in one chat template.

    cut_short: conversations longer than a row, of which the rest is left out. without_answer: those left out because
    nothing in them is learned (in a row).
    """

    uncut = True

    def __init__(self, chats: Sequence[Chat], template: ChatTemplate, directory: Path | None, name: str, *counts: int):
        self.chats, self.template, self.name = chats, template, name
        self.cut_short, self.without_answer = counts or (0, 0)
        tokenizer = template.tokenizer
        self.vocab_size, self.document_start = tokenizer.vocab_size, tokenizer.document_start
        self.tokenizer_id, self.tokenizer_directory = tokenizer.identity, directory
        self.lengths = np.array([len(chat.tokens) for chat in chats], dtype=np.int64)
        used = np.bincount(np.concatenate([chat.tokens[chat.learned] for chat in chats]).astype(np.int64))
        self._num_targets = int(used.sum())
        self.num_bytes = sum(int(n) * len(tokenizer.token_bytes(token)) for token, n in enumerate(used) if n)

    @property
    def num_targets(self) -> int:
        """Tokens of answers."""
        return self._num_targets

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        return self.chats[document].tokens[start:stop]

    def learned(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        return self.chats[document].learned[start:stop]

    def prompt(self, document: int, length: int) -> NDArray[np.integer]:
        """Everything before the first answer, whatever its length: an answer to a part of it would show nothing."""
        return self.tokens(document, 0, int(self.chats[document].learned.argmax()))

    def describe(self, document: int) -> str:
        return self.chats[document].origin

    @property
    def tokenizer(self) -> Tokenizer:
        return self.template.tokenizer

    def split(self, valid_fraction: float) -> tuple[Self, Self]:
        """Split by the hash of each conversation, so that copies are on the same side; at least one on each side."""
        if not 0 < valid_fraction < 1:
            raise ValueError(f"valid_fraction is {valid_fraction}; accepted: between 0 and 1")
        hashes = np.array([_hash(chat) for chat in self.chats], dtype=np.uint64)
        if len(kinds := np.unique(hashes)) < 2:
            raise ValueError(
                f"{self.name} has one conversation, too few for a training and a validation side; accepted: more, or a "
                "file of their own for validation (valid=...)"
            )
        bound = np.clip(np.uint64(valid_fraction * 2**64), kinds[0], kinds[-2])
        valid = hashes <= bound
        return self._choose(~valid, "training"), self._choose(valid, "validation")

    @cached_property
    def fingerprint(self) -> str:
        """The hash of tokens and answers."""
        digest = hashlib.sha256(f"chat {self.tokenizer_id}".encode())
        for chat in self.chats:
            digest.update(f"\n{len(chat.tokens)}\n".encode() + chat.tokens.astype("<u4").tobytes())
            digest.update(np.packbits(chat.learned).tobytes())
        return digest.hexdigest()

    def _choose(self, chosen: NDArray[np.bool_], side: str) -> Self:
        chats = [chat for chat, wanted in zip(self.chats, chosen, strict=True) if wanted]
        counts = self.cut_short, self.without_answer
        return type(self)(chats, self.template, self.tokenizer_directory, f"{self.name} ({side})", *counts)


def open_chats(
    source: str, files: Sequence[SourceFile], template: ChatTemplate, directory: Path | None, length: int | None
) -> ChatCorpus:
    """The conversations of a source, whose files are those that `conversation_files` found.

    directory: of the model, with its tokenizer. length: of a row, where longer conversations are cut; None: no limit.

    Raises DataError (a ValueError) that names the line of a conversation that the template cannot write, and for a
    source without a single answer.
    """
    dtype = token_dtype(template.tokenizer.vocab_size)
    chats, cut_short, without_answer = [], 0, 0
    for file in files:
        for line, conversation in read_conversations(file.path):
            origin = f"{file.path}:{line}"
            try:
                _check_template(template, conversation)
                tokens, learned = tokens_and_answers(template, conversation)
            except ValueError as error:
                raise DataError(f"{origin}: {error}") from error
            cut_short += length is not None and len(tokens) > length
            chat = Chat(origin, np.array(tokens[:length], dtype=dtype), np.array(learned[:length], dtype=bool))
            if chat.learned.any():
                chats.append(chat)
            else:
                without_answer += 1
    if not chats:
        where = "" if length is None else f" in its first {length} tokens (a larger length reads more)"
        raise DataError(f"no conversation in {source} has an answer to learn{where}")
    tokenizer = template.tokenizer
    has_file = directory is not None and (directory / TOKENIZER_FILE).is_file() and tokenizer.identity != BYTES
    return ChatCorpus(chats, template, directory if has_file else None, source, cut_short, without_answer)


def _check_template(template: ChatTemplate, conversation: Conversation) -> None:
    """Raise ValueError for tools that the template would leave out."""
    for what, found in (
        ("tools", bool(conversation.tools)),
        ("tool_calls", any(message.get("tool_calls") for message in conversation.messages)),
    ):
        if found and not template.mentions(what):
            raise ValueError(f"{what} in a conversation, and the chat template {template.name} writes none")


def _hash(chat: Chat) -> int:
    return int.from_bytes(hashlib.sha256(chat.tokens.astype("<u4").tobytes()).digest()[:8], "big")
