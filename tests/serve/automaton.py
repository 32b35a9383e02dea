"""Finite automata over tokens as grammars, in plain Python."""

import random
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Automaton:
    """edges: for each state, the next state by token; state 0 is the first. An output ends where there are no edges.

    last: end tokens, which may come in accepting states. broken: what calls of its matchers raise, by their name.
    """

    edges: tuple[dict[int, int], ...]
    accepting: frozenset[int] = frozenset()
    last: tuple[int, ...] = ()
    broken: dict[str, Exception] = field(default_factory=dict)

    def matcher(self) -> "Walk":
        return Walk(self)

    def allowed(self, tokens: list[int]) -> set[int]:
        """The tokens that may come after these."""
        state = 0
        for token in tokens:
            if token in self.last:
                return set()
            state = self.edges[state][token]
        return {*self.edges[state], *(self.last if state in self.accepting else ())}

    def ends(self, tokens: list[int]) -> bool:
        """Whether nothing may follow these tokens, or only an end token."""
        return self.allowed(tokens) <= set(self.last)


class Walk:
    """A matcher: the states that the output has been in."""

    def __init__(self, automaton: Automaton):
        self.automaton, self.tokens = automaton, []
        self.calls: list[tuple[str, object]] = []

    def _called(self, name: str, value: object = None) -> None:
        self.calls.append((name, value))
        if name in self.automaton.broken:
            raise self.automaton.broken[name]

    @property
    def ended(self) -> bool:
        self._called("ended")
        return self.automaton.ends(self.tokens)

    def fill(self, mask: Tensor) -> None:
        self._called("fill")
        assert not mask.any(), "the words are zero"
        words = [0] * len(mask)
        for token in self.automaton.allowed(self.tokens):
            words[token // 32] |= 1 << token % 32
        for i, word in enumerate(words):
            mask[i] = word - (1 << 32) if word >> 31 else word

    def accept(self, token: int) -> bool:
        self._called("accept", token)
        if token not in self.automaton.allowed(self.tokens):
            return False
        self.tokens.append(token)
        return True

    def rollback(self, count: int) -> None:
        self._called("rollback", count)
        assert 0 < count <= len(self.tokens)
        del self.tokens[-count:]


def random_automaton(rng: random.Random, vocab_size: int, *, eos: int | None = None, num_states: int = 5) -> Automaton:
    """Every state has an edge, or is accepting; some states allow one token only, and some almost all."""
    edges = []
    for state in range(num_states):
        count = rng.choice([0, 1, 1, 2, 3, 8, vocab_size - 1]) if state else rng.choice([1, 3, vocab_size - 1])
        tokens = [token for token in rng.sample(range(vocab_size), count) if token != eos]
        edges.append({token: rng.randrange(num_states) for token in tokens or ([] if state else [0 if eos else 1])})
    accepting = frozenset(s for s in range(num_states) if not edges[s] or rng.random() < 0.3)
    return Automaton(tuple(edges), accepting, () if eos is None else (eos,))


def sequence(tokens: list[int]) -> Automaton:
    """The one output of these tokens."""
    edges = tuple({token: place + 1} for place, token in enumerate(tokens))
    return Automaton((*edges, {}), frozenset([len(tokens)]))


def cycle(tokens: list[int]) -> Automaton:
    """These tokens again and again."""
    return Automaton(tuple({token: (place + 1) % len(tokens)} for place, token in enumerate(tokens)))
