"""Stop strings: found in the text of the tokens, wherever token borders fall.

Text is not additive over tokens (a character may take several, and a token may print differently after another), so new
text is what decoding a few tokens more adds to decoding a few tokens less; it is held back while it ends in an
unfinished character. Each token costs the decoding of a few, however long the output is.
"""

from collections.abc import Callable, Sequence

MOST_HELD = 16  # tokens: a character takes four bytes, so what is still unfinished then will not be finished

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
        if len(now) <= len(before):
            return None
        if now.endswith("�") and len(self._tokens) - self._shown < MOST_HELD:
            whole = now[len(before) :].rstrip("�")
            return self._add(whole) if self._completes(whole) else None
        self._tokens, self._shown = self._tokens[self._shown :], len(self._tokens) - self._shown
        return self._add(now[len(before) :])

    def _completes(self, piece: str) -> bool:
        longest, tail = max(map(len, self.strings), default=1) - 1, piece
        for earlier in reversed(self._pieces):
            if len(tail) >= longest + len(piece):
                break
            tail = earlier + tail
        return any(string in tail[-longest - len(piece) :] for string in self.strings)

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
