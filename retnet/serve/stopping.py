"""Stop strings: found in the text of the tokens, wherever token boundaries fall."""

from collections.abc import Sequence

from retnet.data.stream_decoder import Decode, StreamDecoder

__all__ = ["Decode", "StopStrings"]


class StopStrings:
    """The text of one output, watched for strings that end it.

    strings: those that end it; with none the text is only decoded. decode: token ids to text, or a decoder of them.

    `matched` is the stop string that ended the output, `text` the output up to it.
    """

    def __init__(self, strings: Sequence[str], decode: Decode | StreamDecoder):
        if wrong := [string for string in strings if not isinstance(string, str)]:
            raise ValueError(f"a stop string is {wrong[0]!r}; accepted: text")
        if any(not string for string in strings):
            raise ValueError("a stop string is empty; accepted: at least one character")
        self.strings = tuple(strings)
        self.matched: str | None = None
        self._decoder = decode if isinstance(decode, StreamDecoder) else StreamDecoder(decode)
        self._longest = max(map(len, strings), default=1)
        self._pieces: list[str] = []  # the text but for `_tail`
        self._tail = ""  # its end, in which a stop string may have begun
        self._num_taken = 0  # pieces that `take` has returned

    @property
    def text(self) -> str:
        return "".join(self._pieces) + self._tail

    def push(self, token: int) -> str | None:
        """Read one more token; returns the stop string that it completes, the first to begin in the text."""
        return self._add(self._decoder.push(token)) if self.matched is None else self.matched

    def flush(self) -> str | None:
        """End the output: an unfinished character at its end joins the text. Returns as `push`."""
        return self._add(self._decoder.flush()) if self.matched is None else self.matched

    def take(self, *, all: bool = False) -> str:
        """The text that no stop string can reach into, as far as it has not been returned before; all that is left of
        it if `all`, at the end of an output."""
        if all or self.matched is not None:
            self._settle(len(self._tail))
        new = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return new

    def _add(self, piece: str) -> str | None:
        if not piece:
            return None
        self._tail += piece
        found = [(self._tail.find(string), string) for string in self.strings if string in self._tail]
        if found:
            start, self.matched = min(found)
            self._tail = self._tail[:start]
            return self.matched
        begun = (n for n in range(min(self._longest - 1, len(self._tail)), 0, -1) if self._may_begin(self._tail[-n:]))
        self._settle(len(self._tail) - next(begun, 0))
        return None

    def _may_begin(self, ending: str) -> bool:
        return any(string.startswith(ending) for string in self.strings)

    def _settle(self, count: int) -> None:
        """Move the first characters of the tail to the pieces."""
        if count:
            self._pieces.append(self._tail[:count])
            self._tail = self._tail[count:]
