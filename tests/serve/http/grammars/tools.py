"""Outputs drawn under a grammar, without a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from retnet.serve.grammar import Matcher
from retnet.serve.http.grammars.constraints import Constraint, Constraints, constraint_of

Choose = Callable[[list[int]], int]


def constraint(**structured: object) -> Constraint:
    found = constraint_of(None, structured)
    assert found is not None
    return found


def allowed_by(matcher: Matcher, vocab_size: int) -> list[int]:
    """The tokens that may come next. The words of the mask have no bit beyond the vocabulary."""
    mask = torch.zeros((vocab_size + 31) // 32, dtype=torch.int32)
    matcher.fill(mask)
    bits = int.from_bytes(mask.numpy().tobytes(), "little")
    tokens = [token for token in range(bits.bit_length()) if bits >> token & 1]
    assert all(token < vocab_size for token in tokens[-1:])
    return tokens


def draw(constraints: Constraints, wanted: Constraint, vocab_size: int, choose: Choose, most: int = 200) -> list[int]:
    """An output of random tokens that ends where the grammar ends it, or after `most` tokens."""
    matcher = constraints.compile_here(wanted).matcher()
    tokens: list[int] = []
    while not matcher.ended and len(tokens) < most:
        tokens.append(choose(allowed_by(matcher, vocab_size)))
        assert matcher.accept(tokens[-1])
    return tokens


def at_random(seed: int) -> Choose:
    return random.Random(seed).choice


def fits(constraints: Constraints, wanted: Constraint, text: bytes, end: int) -> bool:
    """Whether the grammar takes this whole text, one byte per token."""
    matcher = constraints.compile_here(wanted).matcher()
    return all(map(matcher.accept, text)) and (matcher.ended or matcher.accept(end))
