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

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

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
        encoding = self._encode(text)
        return _Window(text, encoding.ids, encoding.offsets, cast(list[int], encoding.word_ids))


@dataclass(frozen=True)
class _Window:
    """Tokens of a text: their ids, their characters as (begin, end), and the words that they are in."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int]

    def around(self, token: int, shift: int = 0) -> list[tuple[int, int, int]] | None:
        """(begin, end, id) of the tokens beside the begin of `token`, `SAME` on each side; None near the ends."""
        if not SAME <= token <= len(self.ids) - SAME:
            return None
        return [
            (self.spans[i][0] + shift, self.spans[i][1] + shift, self.ids[i]) for i in range(token - SAME, token + SAME)
        ]

    def begins_word(self, token: int) -> bool:
        return self.words[token] != self.words[token - 1]

    def is_deep_in_word(self, token: int) -> bool:
        """Whether the token is at least `MARGIN` characters into its word."""
        first = bisect_left(self.words, self.words[token])
        return self.spans[token][0] - self.spans[first][0] >= MARGIN

    def between(self, begin: int, end: int) -> range:
        """The tokens that begin in [begin, end), at a character."""
        return range(*(bisect_left(self.spans, (at,)) for at in (begin, end)))

    def index_of(self, other: _Window, token: int) -> int:
        """The token of another window that begins where this one does."""
        begin, wanted = other.spans[token][0], other.around(token)
        return next(i for i in self.between(begin, begin + 1) if self.around(i) == wanted)


def _join(left: _Window, right: _Window, shift: int) -> tuple[int, int] | None:
    """A place where two windows join, as the first token after it in each; None if there is none.

    shift: characters of `left` before `right`.
    """
    begin, end = shift + MARGIN, len(left.text) - MARGIN
    tokens = {right.spans[i][0] + shift: i for i in reversed(right.between(begin - shift, end - shift))}
    for i in reversed(left.between(begin, end)):
        at = left.spans[i][0]
        if left.spans[i - 1][1] > at or (j := tokens.get(at)) is None:
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
