"""Stop strings: found in the text of the tokens, wherever token boundaries fall."""

from collections.abc import Sequence
from functools import lru_cache

from retnet.data.stream_decoder import Decode, StreamDecoder, stream_decoder_of
from retnet.serve.string_matcher import StringMatcher

__all__ = ["Decode", "StopStrings"]

CONTEXT = 16  # tokens before an output that are decoded with it


class StopStrings:
    """The text of one output, watched for strings that end it. The cost per token depends on its own text alone.

    strings: those that end it; with none the text is only decoded. decode: token ids to text, or a decoder of them.
    after: the tokens before the output. Some tokenizers drop the space before the first word of a text, and an output
    that goes on with a text keeps it.

    `matched` is the stop string that ended the output, `text` the output up to it.
    """

    def __init__(self, strings: Sequence[str], decode: Decode | StreamDecoder, after: Sequence[int] = ()):
        if wrong := [string for string in strings if not isinstance(string, str)]:
            raise ValueError(f"a stop string is {wrong[0]!r}; accepted: text")
        if any(not string for string in strings):
            raise ValueError("a stop string is empty; accepted: at least one character")
        self.strings = tuple(strings)
        self.matched: str | None = None
        self._decoder = decode if isinstance(decode, StreamDecoder) else stream_decoder_of(decode)
        self._after = [*after[-CONTEXT:]]
        self._matcher = _matcher(self.strings)
        self._state = 0  # of the matcher: its characters, the last ones of the text, may begin a stop string
        self._pieces: list[str] = []
        self._length = 0  # characters of all pieces
        self._num_taken = 0  # characters that `take` has returned
        self._place = 0, 0  # the piece of the first other one, and its index there

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
            self._place = 0, self._num_taken
        return self._pieces[0] if self._pieces else ""

    @property
    def length(self) -> int:
        """Characters of `text`."""
        return self._length

    def push(self, token: int) -> str | None:
        """Read one more token; returns the stop string that it completes, the first to begin in the text."""
        if self._after:
            self._read_context()
        return self._add(self._decoder.push(token)) if self.matched is None else self.matched

    def flush(self) -> str | None:
        """End the output: an unfinished character at its end joins the text. Returns as `push`."""
        return self._add(self._decoder.flush()) if self.matched is None else self.matched

    def take(self, *, all: bool = False) -> str:
        """The text that no stop string can reach into, as far as it has not been returned before; all that is left of
        it if `all`, at the end of an output."""
        open_end = 0 if all or self.matched is not None else self._matcher.depth[self._state]
        count = self._length - open_end - self._num_taken
        self._num_taken += max(0, count)
        piece, index = self._place
        taken: list[str] = []
        while count > 0:
            taken.append(self._pieces[piece][index : index + count])
            count -= len(taken[-1])
            index += len(taken[-1])
            if index == len(self._pieces[piece]):
                piece, index = piece + 1, 0
        self._place = piece, index
        return "".join(taken)

    def _read_context(self) -> None:
        for token in self._after:
            self._decoder.push(token)
        self._decoder.flush()
        self._after.clear()

    def _add(self, piece: str) -> str | None:
        if not piece:
            return None
        if not self.strings:
            self._pieces.append(piece)
            self._length += len(piece)
            return None
        begin, end, length = None, 0, self._length  # of the stop string that begins first, and of the text
        for character in piece:
            length += 1
            self._state = self._matcher.after(self._state, character)
            found = self._matcher.longest[self._state]
            if found and (begin is None or length - found < begin):
                begin, end = length - found, length
        self._pieces.append(piece)
        self._length = length
        if begin is not None:
            whole = self.text
            self.matched, self._pieces, self._length = whole[begin:end], [whole[:begin]], begin
        return self.matched


@lru_cache(maxsize=32)
def _matcher(strings: tuple[str, ...]) -> StringMatcher:
    """The matcher of these strings, which does not change: making one takes about 1 us per character."""
    return StringMatcher(strings)
