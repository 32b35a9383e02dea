"""Borders of a walk: chunk ends at which walks in both directions meet, for the gradient of log_decay.

A border follows every fourth chunk, the last but one, and the last one. There the forward walk stores its state in 16
bits, in the order in which its lanes hold it, and the reverse walk, which has the same tiles, takes the inner product
with its own (`decay_gradient.py`). Of the last state the remainder of rounding is stored too, as one more border.

Indices count terms: one per warpgroup and slice of the state, TERMS per border.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BORDER_CHUNKS = 4

_BORDER_CHUNKS = gl.constexpr(BORDER_CHUNKS)


@gluon.jit
def _is_border(chunk, chunks):
    """Whether a border follows the chunk."""
    return (chunk % _BORDER_CHUNKS == _BORDER_CHUNKS - 1) | (chunk >= chunks - 2)


@gluon.jit
def last_border(chunks):
    """The number of the border at the end."""
    return (chunks + _BORDER_CHUNKS - 2) // _BORDER_CHUNKS


@gluon.jit
def _border(chunk, chunks):
    """The number of the border that follows the chunk."""
    return gl.where(chunk == chunks - 1, last_border(chunks), chunk // _BORDER_CHUNKS).to(gl.int64)


@gluon.jit
def _pointers(borders, term, PIECE_AT: gl.constexpr, PIECES: gl.constexpr, layout: gl.constexpr):
    """Pointers to a stored piece [64 values, 64 keys] of a term: those of a warp's lanes lie side by side."""
    value = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    key = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    base = borders + (term * PIECES + PIECE_AT) * (64 * 64)
    return base + (key // 8 * (8 * 64) + value * 8 + key % 8)


@gluon.jit
def store_border(
    state, borders, term, chunk, chunks,
    TERMS: gl.constexpr, PIECES: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Store the pieces of the state that the chunk leaves behind, if a border follows."""
    if _is_border(chunk, chunks):
        at = _border(chunk, chunks) * TERMS + term
        for j in gl.static_range(PIECES):
            rounded = state[j].to(dtype)
            gl.store(_pointers(borders, at, j, PIECES, layout), rounded)
            if chunk == chunks - 1:
                rest = (state[j] - rounded.to(gl.float32)).to(dtype)
                gl.store(_pointers(borders, at + TERMS, j, PIECES, layout), rest)


@gluon.jit
def _to_bfloat16_precision(x):
    """float32 rounded to 8 bits, as products read the state (Veltkamp's splitting).

    A conversion would be shared with that of the read, and its results would stay in registers meanwhile."""
    shifted = x * 65537.0
    return shifted - (shifted - x)


@gluon.jit
def multiply_border(
    state, borders, products, term, chunk, chunks, TERMS: gl.constexpr, PIECES: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """products [64 values per term]: the stored state times that of a reverse walk before the chunk, summed over keys,
    if a border follows the chunk."""
    if _is_border(chunk, chunks):
        at = _border(chunk, chunks) * TERMS + term
        product = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
        for j in gl.static_range(PIECES):
            stored = gl.load(_pointers(borders, at, j, PIECES, layout)).to(gl.float32)
            if chunk == chunks - 1:
                stored += gl.load(_pointers(borders, at + TERMS, j, PIECES, layout)).to(gl.float32)
            product += gl.sum(stored * _to_bfloat16_precision(state[j]), 1)
        gl.store(products + at * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout)), product)
