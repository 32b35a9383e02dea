"""Streaming encoder: the tokens of a text that arrives in blocks, equal to those of the whole text.

A tokenizer is not additive over blocks. A cut may fall inside a token or a word, one that puts a space before a text
(Metaspace, Llama) puts one before every block, and one that looks ahead (GPT-2, at white space) sees less. So windows
of text overlap: both are tokenised, and joined between two tokens that are the same in both. The join is exact where

- a word of the pre-tokenizer begins in both: what follows does not depend on what was before; or
- both are inside a word, at least `MARGIN` characters into it (a tokenizer without words, a run of letters): no merge
  of byte-pair encoding crosses the join in either window, so none does in the whole text.

The overlap is tokenised from two beginnings, to see that its tokens do not depend on where it begins. Where there is no
such place, the window grows, up to `WINDOW` characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Encoding

OVERLAP = 1 << 13  # characters
BEFORE = 8191  # characters before an overlap; a prime, so that no group of digits has the same phase by chance
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

    ids: text to tokens, with neither special tokens nor truncation. encode: the same with characters and words, which
    takes longer: it reads the overlaps alone. finish: applied to tokens in the end.
    """

    def __init__(
        self,
        ids: Callable[[str], list[int]],
        encode: Callable[[str], Encoding],
        finish: Callable[[list[int]], list[int]],
    ):
        self._ids_of, self._encode, self._finish = ids, encode, finish
        self._text = ""  # of the window
        self._ids: list[int] = []
        self._first = 0  # token of the window that is the first not returned

    def push(self, data: bytes, last: bool) -> Sequence[int]:
        """The tokens that the next bytes of the text make certain; with `last`, all that are left."""
        following = self._text[-OVERLAP:] + utf8_text(data)
        ids = self._ids_of(following)
        ready: list[int] = []
        if not self._text:
            self._text, self._ids = following, ids
        elif join := self._join(ids):
            ready = self._ids[self._first : join[0]]
            self._text, self._ids, self._first = following, ids, join[1]
        else:
            self._grow(following[len(self._text[-OVERLAP:]) :])
        if last:
            ready += self._ids[self._first :]
        return self._finish(ready)

    def _grow(self, text: str) -> None:
        """Tokenise the window again, with the text that follows it. Tokens far from its end stay as they were."""
        self._text += text
        before = self._ids[: self._first + SAME]
        if len(self._text) <= WINDOW:
            self._ids = self._ids_of(self._text)
        if len(self._text) > WINDOW or self._ids[: len(before)] != before:
            raise ValueError(
                f"{WINDOW:,} characters without a place where this tokenizer can stop between two tokens; accepted: "
                "text with such places, as at white space, or bytes (--tokenizer bytes)"
            )

    def _join(self, following: list[int]) -> tuple[int, int] | None:
        """A place where the window and the one that follows join, as the first token after it in each.

        The overlap is tokenised alone, and once more with text before it. Both end where the window ends, and the first
        begins where the following one does, so that equal tokens up to there are those of equal text.
        """
        overlap = self._encode(self._text[-OVERLAP:])
        longer = self._encode(self._text[-OVERLAP - BEFORE :])
        ids = overlap.ids
        from_window = len(self._ids) - len(ids)
        from_longer = len(longer.ids) - len(ids)
        equal_end = min(_common(ids[::-1], other[: -len(ids) - 1 : -1]) for other in (self._ids, longer.ids))
        equal_begin = _common(ids, following)
        for token in reversed(range(max(len(ids) - equal_end + SAME, 1), min(equal_begin, len(ids)) - SAME)):
            begin, end = overlap.token_to_chars(token - 1), overlap.token_to_chars(token)
            if begin is None or end is None or begin[1] > end[0]:
                continue  # inside a character
            if not MARGIN <= end[0] <= OVERLAP - MARGIN:
                continue
            places = (overlap, token), (longer, token + from_longer)
            if all(_begins_word(*place) for place in places) or all(_is_deep_in_word(*place) for place in places):
                return token + from_window, token
        return None


def _begins_word(encoding: Encoding, token: int) -> bool:
    return encoding.token_to_word(token) != encoding.token_to_word(token - 1)


def _is_deep_in_word(encoding: Encoding, token: int) -> bool:
    """Whether a token is at least `MARGIN` characters into its word."""
    word, span = encoding.token_to_word(token), encoding.token_to_chars(token)
    first = None if word is None else encoding.word_to_chars(word)
    return first is not None and span is not None and span[0] - first[0] >= MARGIN


def _common(a: list[int], b: list[int]) -> int:
    """Tokens at the begin of both lists that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def utf8_text(data: bytes) -> str:
    """Bytes as text. Raises ValueError for other than UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = f"byte {error.start} (0x{data[error.start]:02x})"
        raise ValueError(f"the text is not UTF-8 at {at}; accepted by this tokenizer: UTF-8") from error
