"""Streaming decoder: the text of tokens that arrive one at a time. Pure Python, so that the engine may import it.

Text is not additive over tokens: a character may take several of them, and a token may decode differently at the start
of a text (a leading space is stripped) than inside one. So a short window of the latest tokens is decoded, and the
new text is the part that has not been returned yet. The cost per token is bounded: the window is short, and
tokens that never decode to anything (special tokens) are left out of it. `tokenizers.decoders.DecodeStream` has no such
bound, and no way to get the last, unfinished character.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CHARACTER_BYTES = 4  # the longest character in UTF-8, and so the most tokens that it can take
MAX_WINDOW = 32  # tokens; reached only while bytes that are no characters arrive
KEPT = 16  # tokens of a window that has become too long; the last three unfinished characters take at most 9
REPEATS = 8  # of a token that is probed for never having text

Decode = Callable[[Sequence[int]], str]
Unsettled = Callable[[Sequence[int], str], int]


class StreamDecoder:
    """Decodes tokens as they arrive. The pieces joined, with `flush` at the end, are `decode` of all tokens.

    Args:
        decode: token ids to text.
        unsettled: for a list of tokens and its text, the number of characters at the end that the next token may still
            change. By default the U+FFFD at the end, at most three: an unfinished character decodes to them. A U+FFFD
            that is in the text is then returned with the character after it; a tokenizer that knows the bytes of its
            tokens returns it at once (`Tokenizer.stream_decoder`).

    A decode function that rewrites earlier text cannot be followed exactly: Llama's turns a whole run of bytes to
    U+FFFD when a later one is wrong. Text that has been returned then stands.
    """

    def __init__(self, decode: Decode, unsettled: Unsettled | None = None):
        self._decode = decode
        self._unsettled = _trailing_replacements if unsettled is None else unsettled
        self._window: list[int] = []
        self._num_context = 0  # tokens at the front of the window whose text has all been returned
        self._text = ""  # of the window
        self._shown = ""  # the part of it that has been returned
        self._silent: set[int] = set()  # tokens that never have text

    def push(self, token: int) -> str:
        """The text that this token settles; empty while a character is incomplete."""
        if token in self._silent:
            return ""
        text = self._decode([*self._window, token])
        if text == self._text and self._is_silent(token):
            self._silent.add(token)
            return ""
        self._window.append(token)
        self._text = text
        held = self._unsettled(self._window, text)
        if held and not text.startswith(self._shown) and len(self._window) < MAX_WINDOW:
            return ""  # text before it has changed, and may change back
        end = max(len(self._shown), len(text) - held)
        piece = text[len(self._shown) : end]
        self._shown = text[:end]
        if piece and end == len(text):
            self._begin_window()
        elif len(self._window) >= MAX_WINDOW:
            self._shorten_window()
        return piece

    def flush(self) -> str:
        """The text that is left at the end: U+FFFD for an incomplete character, otherwise usually nothing."""
        piece = self._text[len(self._shown) :]
        self._shown = self._text
        return piece

    def _begin_window(self) -> None:
        """Keep the tokens of the latest piece as context: after them, the next are not at the start of a text."""
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._text = self._shown = self._decode([*self._window])

    def _shorten_window(self) -> None:
        """Drop the oldest tokens; the text that has not been returned comes from the last ones."""
        unseen = len(self._text) - len(self._shown)
        self._num_context = max(0, self._num_context - (len(self._window) - KEPT))
        self._window = self._window[-KEPT:]
        self._text = self._decode([*self._window])
        self._shown = self._text[: max(0, len(self._text) - unseen)]

    def _is_silent(self, token: int) -> bool:
        return self._decode([token]) == "" and self._decode([token] * REPEATS) == ""


def ends_inside_character(data: bytes) -> bool:
    """Whether bytes end with the beginning of a UTF-8 character that is not complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data[1 - CHARACTER_BYTES :])
    return bool(decoder.getstate()[0])


def _trailing_replacements(tokens: Sequence[int], text: str) -> int:
    """U+FFFD at the end of a text, as many as the bytes of an unfinished character give."""
    return min(CHARACTER_BYTES - 1, len(text) - len(text.rstrip(REPLACEMENT)))
