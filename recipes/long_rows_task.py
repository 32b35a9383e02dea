"""Recall planted in text, for `long_rows.py`: pairs of a key and its value, written once and asked for once.

    ... k v ....................................... k v ...        the model must predict the second v

A key is one of 28 tokens that text does not have, a value one of 16 others. A key's pair is written with a random
value, and again after a distance; then the key waits and is written with another value. A row is cut into blocks of 64
tokens, in which every key has a place of its own, so that pairs never collide. The distances of a key are drawn
log-uniformly from one block to the key's own longest distance. These are spread over the octaves up to the length of a
row, and keys have them in another order in every row: short distances are frequent, and a key says nothing about its
distance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEYS, VALUES = 28, 16
BLOCK = 64  # tokens, of which the keys' pairs take 56


@dataclass(frozen=True)
class Planted:
    """Rows with their pairs. tokens [B, T + 1]; row, asked [n]: places of the second values; distances [n] to the first
    ones."""

    tokens: Tensor
    row: Tensor
    asked: Tensor
    distances: Tensor


def plant(text: Tensor, first_key: int, generator: torch.Generator) -> Planted:
    """Write pairs over rows of text [B, T + 1]; first_key: the token of the first key. Values follow the keys.

    Raises ValueError for rows that are shorter than three blocks.
    """
    (B, length), tokens = text.shape, text.clone()
    blocks = length // BLOCK - 1
    if blocks < 2:
        raise ValueError(f"rows have {length} tokens; accepted: at least {3 * BLOCK}")
    count = blocks // 2 + 1  # of pairs of a key, if all distances were one block

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    longest = blocks ** ((uniform(B, KEYS).argsort(1) + 1) / KEYS)
    steps = (longest[..., None] ** uniform(B, KEYS, count)).long()
    ends = (steps + 1 + (2 * uniform(B, KEYS, count)).long()).cumsum(-1) - 1
    pairs = ends < blocks
    row, key, _ = pairs.nonzero(as_tuple=True)
    ends, steps = ends[pairs], steps[pairs]
    shift = (BLOCK * uniform(B)).long()
    places = uniform(B, KEYS).argsort(1)  # of the keys in a block
    second = shift[row] + BLOCK * ends + 2 * places[row, key]
    first = second - BLOCK * steps
    values = first_key + KEYS + (VALUES * uniform(len(row))).long()
    for start in (first, second):
        tokens[row, start], tokens[row, start + 1] = first_key + key, values
    return Planted(tokens, row, second + 1, BLOCK * steps)
