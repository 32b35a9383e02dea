"""Stateless shuffling: the place of index i in a permutation of n items, computed from a key alone.

A training run that resumes anywhere must know its k-th row without drawing the k - 1 before it, on every machine and
with every version of numpy, whose generators promise neither. A Feistel network over the next power of four, applied
again until the result is below n, is a permutation of n items for every key. It needs no table, and works on one index
or on a whole array.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4
_MASK64 = (1 << 64) - 1


def make_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and words, such as a seed, an epoch and the order's purpose."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def permute(indices: NDArray[np.integer] | int, size: int, key: int) -> NDArray[np.int64]:
    """The place of each index of [0, size), int64 of the same shape; the same key gives the same permutation.

    Raises IndexError for an index outside [0, size).
    """
    given = np.atleast_1d(np.asarray(indices, dtype=np.int64))
    if given.size and (given.min() < 0 or given.max() >= size):
        raise IndexError(f"indices from {given.min()} to {given.max()}, of {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(given.astype(np.uint64), half, key)
    outside = values >= size
    while outside.any():  # each pass lands at least a quarter of them: 4^half < 4 size, sizes below 4 aside
        values[outside] = _feistel(values[outside], half, key)
        outside = values >= size
    return values.astype(np.int64).reshape(np.shape(indices))


def _feistel(values: NDArray[np.uint64], half: int, key: int) -> NDArray[np.uint64]:
    """A keyed permutation of [0, 4^half)."""
    low = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & low
    for i in range(_ROUNDS):
        round_key = np.uint64((key + (i + 1) * 0x9E3779B97F4A7C15) & _MASK64)
        left, right = right, left ^ (_mix(right ^ round_key) & low)
    return (left << np.uint64(half)) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
