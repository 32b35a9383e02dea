"""Streaming encoder: the tokens of a text that arrives in blocks, equal to those of the whole text.

A tokenizer is not additive over blocks. A cut may fall inside a token or a word, one that puts a space before a text
(Metaspace, Llama) puts one before every block, and one that looks ahead (GPT-2, at white space) sees less. So windows
of text overlap: both are tokenised, and joined between two tokens that are the same in both. The join is exact where

- a word of the pre-tokenizer begins in both: what follows does not depend on what was before; or
- both are inside a word, at least `MARGIN` characters into it (a tokenizer without words, a run of letters): no merge
  of byte-pair encoding crosses the join in either window, so none does in the whole text.

Where there is no such place, the window grows, up to `WINDOW` characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Encoding

OVERLAP = 1 << 13  # characters
MARGIN = 1 << 10  # characters: an overlap's ends, where a window lacks context, and the least part of a long word
SAME = 4  # tokens on each side of a join that are equal
WINDOW = 1 << 24  # characters


class StreamEncoder(Protocol):
    """Takes the blocks of one text."""

    def push(self, data: bytes, last: bool) -> Sequence[int]:
        """The tokens that are certain with this block, and all that are left with the last one.

        Raises ValueError for a text that has no tokens, or that is not UTF-8 where the tokenizer needs text.
        """
        ...


class BytesEncoder:
    """Bytes are tokens."""

    def push(self, data: bytes, last: bool) -> Sequence[int]:
        return data


class WindowEncoder:
    """Overlapping windows of text, tokenised and joined.

    encode: text to an encoding with neither special tokens nor truncation. finish: applied to tokens in the end.
    """

    def __init__(self, encode: Callable[[str], Encoding], finish: Callable[[list[int]], list[int]]):
        self._encode, self._finish = encode, finish
        self._window: _Window | None = None
        self._first = 0  # token of the window that is the first not returned

    def push(self, data: bytes, last: bool) -> Sequence[int]:
        text, window = utf8_text(data), self._window
        ready: list[int] = []
        if window is None:
            self._window = self._read(text)
        else:
            begin = max(0, len(window.text) - OVERLAP)
            following = self._read(window.text[begin:] + text)
            if join := _join(window, following, begin):
                ready = window.ids[self._first : join[0]]
                self._window, self._first = following, join[1]
            else:
                self._grow(window, text)
        if last and self._window is not None:
            ready += self._window.ids[self._first :]
        return self._finish(ready)

    def _grow(self, window: _Window, text: str) -> None:
        """Tokenise the window again, with the text that follows it."""
        whole = window.text + text
        if len(whole) > WINDOW:
            raise ValueError(
                f"{WINDOW:,} characters without a place where this tokenizer can stop between two tokens; accepted: "
                "text with such places, as at white space, or bytes (--tokenizer bytes)"
            )
        self._window = self._read(whole)
        if self._first:
            self._first = self._window.index_of(window, self._first)

    def _read(self, text: str) -> _Window:
        return _Window(text, self._encode(text))


class _Window:
    """The tokens of a text; of these, the characters and words are asked for near the ends alone."""

    def __init__(self, text: str, encoding: Encoding):
        self.text, self.ids = text, encoding.ids
        self._encoding = encoding

    def span(self, token: int) -> tuple[int, int]:
        """The characters of a token, as (begin, end)."""
        return self._encoding.token_to_chars(token) or (-1, -1)

    def around(self, token: int, shift: int = 0) -> list[tuple[int, int, int]] | None:
        """(begin, end, id) of the tokens beside the begin of `token`, `SAME` on each side; None near the ends."""
        if not SAME <= token <= len(self.ids) - SAME:
            return None
        spans = [(i, *self.span(i)) for i in range(token - SAME, token + SAME)]
        return [(begin + shift, end + shift, self.ids[i]) for i, begin, end in spans]

    def begins_word(self, token: int) -> bool:
        return self._encoding.token_to_word(token) != self._encoding.token_to_word(token - 1)

    def is_deep_in_word(self, token: int) -> bool:
        """Whether the token is at least `MARGIN` characters into its word."""
        word = self._encoding.token_to_word(token)
        tokens = None if word is None else self._encoding.word_to_tokens(word)
        return tokens is not None and self.span(token)[0] - self.span(tokens[0])[0] >= MARGIN

    def at(self, character: int) -> int:
        """The token of a character, or of the first after it that has one."""
        tokens = map(self._encoding.char_to_token, range(character, len(self.text)))
        return next((token for token in tokens if token is not None), len(self.ids))

    def index_of(self, other: _Window, token: int) -> int:
        """The token that is `token` in another window of the same begin."""
        wanted = other.around(token)
        return next(i for i in range(self.at(other.span(token)[0]), len(self.ids)) if self.around(i) == wanted)


def _join(left: _Window, right: _Window, shift: int) -> tuple[int, int] | None:
    """A place where two windows join, as the first token after it in each; None if there is none.

    shift: characters of `left` before `right`.
    """
    begin, end = shift + MARGIN, len(left.text) - MARGIN
    if begin >= end:
        return None
    starts = {right.span(j)[0] + shift: j for j in reversed(range(right.at(begin - shift), right.at(end - shift)))}
    for i in reversed(range(left.at(begin), left.at(end))):
        start = left.span(i)[0]
        if left.span(i - 1)[1] > start or (j := starts.get(start)) is None:
            continue
        both_begin = left.begins_word(i) and right.begins_word(j)
        if not both_begin and not (left.is_deep_in_word(i) and right.is_deep_in_word(j)):
            continue
        if (around := left.around(i)) is not None and around == right.around(j, shift):
            return i, j
    return None


def utf8_text(data: bytes) -> str:
    """Bytes as text. Raises ValueError for other than UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = f"byte {error.start} (0x{data[error.start]:02x})"
        raise ValueError(f"the text is not UTF-8 at {at}; accepted by this tokenizer: UTF-8") from error
