"""Grammars: which tokens may come next in an output. The engine asks for them as a mask before every token."""

from typing import Protocol

from torch import Tensor


class Matcher(Protocol):
    """The place of one output in its grammar.

    The engine's calls come one after another, from whichever thread runs the step. An exception of any of them fails
    the request.
    """

    @property
    def ended(self) -> bool:
        """Whether nothing may follow, or only an end token. The engine then ends the output."""
        ...

    def fill(self, mask: Tensor) -> None:
        """Write the tokens that may come next as bits into int32 words [ceil(vocab / 32)] on the host, which are zero:
        token t is bit t % 32 of word t // 32. An end token is among them where the output may end."""
        ...

    def accept(self, token: int) -> bool:
        """Move on by one token; False if it does not fit. The engine accepts tokens of the last mask only."""
        ...

    def rollback(self, count: int) -> None:
        """Move back by the last `count` tokens that were accepted: draft tokens that were rejected."""
        ...


class Grammar(Protocol):
    """A language of outputs. It does not change, and requests share it."""

    def matcher(self) -> Matcher:
        """The place before the first token of an output."""
        ...
