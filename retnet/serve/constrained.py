"""Constrained outputs: the masks of the next tokens of one output, and the matcher that follows its tokens.

Draft tokens are accepted ahead of time, because the mask after each of them is needed before it is known whether the
output has it. The matcher is rolled back by those that the output does not have.
"""

import torch
from torch import Tensor

from retnet.models.decode.sampling import mask_words
from retnet.serve.grammar import Grammar

ALL = -1  # every bit of a word


class GrammarFailed(Exception):
    """An output cannot go on under its grammar; the message says why."""


class ConstrainedOutput:
    """The output of one request under its grammar.

    banned: tokens that the request excludes by a bias of minus infinity. They are excluded from the masks, so that
    every mask has a token whose logit stays finite.
    """

    def __init__(self, grammar: Grammar, vocab_size: int, banned: list[int]):
        self._matcher = grammar.matcher()
        self._has_bans = bool(banned)
        self._possible = torch.zeros(mask_words(vocab_size) * 32, dtype=torch.int64)
        self._possible[:vocab_size] = 1
        self._possible[banned] = 0
        self._possible = (self._possible.view(-1, 32) << torch.arange(32)).sum(-1).to(torch.int32)
        self._ahead: list[int] = []  # accepted by the matcher, and not yet tokens of the output

    @property
    def ended(self) -> bool:
        """Whether the grammar lets nothing follow the output."""
        return not self._ahead and self._has_ended()

    def fill(self, masks: Tensor, draft: list[int]) -> list[int]:
        """Fill the mask of the next token, and those after each draft token, into masks [W, words].

        Returns the draft up to the first token that the grammar refuses, or that ends it. Raises GrammarFailed if no
        token may come next.
        """
        self._take_back()
        if not self._fill(masks[0]):
            masks[0].fill_(ALL)
            bans = " that logit_bias does not ban" if self._has_bans else ""
            raise GrammarFailed(f"its grammar allows no token{bans} after those of the output")
        for t, token in enumerate(draft):
            if not _has(masks[t], token):
                return draft[:t]
            self._accept(token)
            self._ahead.append(token)
            if self._has_ended():
                return draft[: t + 1]
            if not self._fill(masks[t + 1]):  # plain decoding would find that only after this token
                masks[t + 1].fill_(ALL)
                self._ahead.pop()
                self._rollback(1)
                return draft[:t]
        return draft

    def push(self, token: int) -> None:
        """Add a token to the output. Raises GrammarFailed if it does not fit."""
        if self._ahead and self._ahead[0] == token:
            self._ahead.pop(0)
            return
        self._take_back()
        self._accept(token)

    def _take_back(self) -> None:
        """Roll back the draft tokens that did not become tokens of the output."""
        if self._ahead:
            count, self._ahead = len(self._ahead), []
            self._rollback(count)

    def _fill(self, mask: Tensor) -> bool:
        """Whether any token may come next; the others are masked."""
        mask.zero_()
        try:
            self._matcher.fill(mask)
        except Exception as error:
            mask.fill_(ALL)
            raise GrammarFailed(f"its grammar gives no mask: {error!r}") from error
        return bool(mask.bitwise_and_(self._possible).any())

    def _accept(self, token: int) -> None:
        try:
            accepted = self._matcher.accept(token)
        except Exception as error:
            raise GrammarFailed(f"its grammar cannot read token {token}: {error!r}") from error
        if not accepted:
            raise GrammarFailed(f"its grammar refuses token {token}")

    def _rollback(self, count: int) -> None:
        try:
            self._matcher.rollback(count)
        except Exception as error:
            raise GrammarFailed(f"its grammar cannot go back by {count} tokens: {error!r}") from error

    def _has_ended(self) -> bool:
        try:
            return bool(self._matcher.ended)
        except Exception as error:
            raise GrammarFailed(f"its grammar does not say whether it has ended: {error!r}") from error


def _has(mask: Tensor, token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)
