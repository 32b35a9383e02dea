"""Stop strings: found in the text of the tokens, wherever token borders fall.

Text is not additive over tokens (a character may take several, and a token may print differently after another), so new
text is what decoding a few tokens more adds to decoding a few tokens less; it is held back while it ends in an
unfinished character. Each token costs the decoding of a few, however long the output is.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


class StopStrings:
    """Watches one output. `matched` is the stop string that ended it, `text` the output up to it."""

    def __init__(self, strings: Sequence[str], decode: Decode):
        if any(not string for string in strings):
            raise ValueError("a stop string is empty; accepted: at least one character")
        self.strings, self.matched = tuple(strings), None
        self._decode, self._pieces = decode, [""]
        self._tokens: list[int] = []  # those whose text may still change what comes
        self._shown = 0  # of which so many are in the text already

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token: int) -> str | None:
        """Read one more token; returns the stop string that it completes, the first to begin in the text."""
        self._tokens.append(token)
        before, now = self._decode(self._tokens[: self._shown]), self._decode(self._tokens)
        if now.endswith("�") or len(now) <= len(before):
            return None
        self._tokens, self._shown = self._tokens[self._shown :], len(self._tokens) - self._shown
        return self._add(now[len(before) :])

    def _add(self, piece: str) -> str | None:
        longest = max(map(len, self.strings), default=1) - 1
        tail = ""
        while len(self._pieces) > 1 and len(tail) < longest:
            tail = self._pieces.pop() + tail
        tail += piece
        found = [(tail.find(string), string) for string in self.strings if string in tail]
        if found:
            start, self.matched = min(found)
            tail = tail[:start]
        self._pieces.append(tail)
        return self.matched
