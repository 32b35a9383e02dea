"""Streaming decoder: the text of tokens that arrive one at a time. Pure Python, so that the engine may import it.

Text is not additive over tokens: a character may take several of them, and a token may decode differently at the start
of a text (a leading space is stripped) than inside one. So a short window of the latest tokens is decoded, and the
new text is the part that has not been returned yet. The cost per token is bounded: a window that becomes long loses
the tokens that have no text (special tokens), or else its oldest. `tokenizers.decoders.DecodeStream` has no such bound,
and no way to get the last, unfinished character.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Characters that unfinished ones decode to: U+FFFD, and those of the error handler "surrogateescape".
UNFINISHED = REPLACEMENT + "".join(map(chr, range(0xDC80, 0xDD00)))
CHARACTER_BYTES = 4  # the longest character in UTF-8, and so the most tokens that it can take
MAX_WINDOW = 32  # tokens; reached only while tokens without text, or bytes that are no characters, arrive
KEPT = 16  # the latest tokens of a window that has become too long; the last three unfinished characters take at most 9
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
        self._silent: dict[int, bool] = {}  # whether a token has no text, alone and repeated

    def push(self, token: int) -> str:
        """The text that this token settles; empty while a character is incomplete."""
        window = [*self._window, token]
        text = self._text_of(window)
        held = self._unsettled(window, text)
        self._window, self._text = window, text
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

    def _text_of(self, tokens: Sequence[int]) -> str:
        text = self._decode([*tokens])  # the function may change its list
        if not isinstance(text, str):
            raise TypeError(f"decode gave {text!r}; accepted: text")
        return text

    def _begin_window(self) -> None:
        """Keep the tokens of the latest piece as context: after them, the next are not at the start of a text."""
        latest = self._window[self._num_context :]
        text = self._text_of(latest)
        if text or len(self._window) >= KEPT:  # spaces may be stripped there, and so may the next
            self._window, self._text = latest, text
        self._num_context, self._shown = len(self._window), self._text

    def _shorten_window(self) -> None:
        """Drop tokens that have no text, older ones first, as far as the text stays; otherwise the oldest tokens."""
        if self._drop_silent(len(self._window) - KEPT) or self._drop_silent(len(self._window)):
            return
        unseen = len(self._text) - len(self._shown)  # comes from the last tokens
        self._num_context = max(0, self._num_context - (len(self._window) - KEPT))
        self._window = self._window[-KEPT:]
        self._text = self._text_of(self._window)
        self._shown = self._text[: max(0, len(self._text) - unseen)]

    def _drop_silent(self, count: int) -> bool:
        """Drop those of the first tokens that have no text; returns whether the window has become short."""
        kept = [i >= count or not self._is_silent(token) for i, token in enumerate(self._window)]
        window = [token for token, keep in zip(self._window, kept, strict=True) if keep]
        if len(window) < len(self._window) and self._text_of(window) == self._text:
            self._window, self._num_context = window, sum(kept[: self._num_context])
        return len(self._window) <= (KEPT + MAX_WINDOW) // 2

    def _is_silent(self, token: int) -> bool:
        if token not in self._silent:
            self._silent[token] = self._text_of([token]) == "" == self._text_of([token] * REPEATS)
        return self._silent[token]


class BytesDecoder(StreamDecoder):
    """The same for tokens whose bytes joined are the bytes of the text, which costs a tenth.

    bytes_of: the bytes of a token. strips: drop one space at the start of the text, as Llama's decoder does.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], strips: bool = False):
        self._bytes_of, self._strips = bytes_of, strips
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        text = self._utf8.decode(self._bytes_of(token))
        return self._stripped(text) if self._strips and text else text

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        return self._stripped(text) if self._strips and text else text

    def _stripped(self, text: str) -> str:
        self._strips = False
        return text.removeprefix(" ")


def stream_decoder_of(decode: Decode) -> StreamDecoder:
    """A decoder for a function; that of the tokenizer for a tokenizer's `decode`, which knows the bytes of tokens."""
    owner = getattr(decode, "__self__", None)
    make = getattr(owner, "stream_decoder", None)
    return make() if make is not None and decode == getattr(owner, "decode", None) else StreamDecoder(decode)


def ends_inside_character(data: bytes) -> bool:
    """Whether bytes end with the beginning of a UTF-8 character that is not complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data[1 - CHARACTER_BYTES :])
    return bool(decoder.getstate()[0])


def _trailing_replacements(tokens: Sequence[int], text: str) -> int:
    """Characters at the end of a text that may be unfinished, at most as many as an unfinished one decodes to."""
    return min(CHARACTER_BYTES - 1, len(text) - len(text.rstrip(UNFINISHED)))
