"""The gradient of a decay per token, from what the walks for dQ and dK leave.

The formula is that of the portable kernels (`portable/decay_gradient.py`), with a border every 256 tokens, before the
last chunk and at the end:

    dlog_decay_t = <S, dS> at the next border + sum_{i >= t, before the border} (q_i . dq_i - k_i . dk_i)

At the border before, the sum must be <S, dS> there; at the first token, the initial state times its gradient. It misses
that by its rounding errors, which grow like a random walk. So each token is given back its share of the gap, in
proportion to its distance from the next border.

The walk for dQ carries S and the walk for dK carries dS. The first one stores S in 16 bits at every border, in its own
order of registers, and the second one, which has the same tiles, multiplies it by dS. Both take the inner products of
their float32 outputs with q or k, before rounding. Of the last state the remainder of rounding is stored as well: the
gradient of that state comes from the caller, and may be so large that the remainder would matter to earlier tokens.

q . dq equals out . dout, and k . dk equals v . dv. This pair is taken because it makes the terms of a sum cancel:
the score of two tokens in both walks is the same dout . v, times the same decay, rounded to the same 16 bits. A pair
whose tokens lie on the same side of t has to vanish from the sum, and here it does up to float32 rounding. Between
walks that score q . k and dout . v, two roundings to 16 bits would remain, which at strong decays are larger than the
gradient. What crosses a chunk is rounded with the state, differently in the two walks; hence the borders.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch
from retnet.kernels.retention.hopper.borders import BORDER_CHUNKS
from retnet.kernels.retention.hopper.token_sums import is_reset
from retnet.kernels.retention.hopper.warp_roles import CHUNK, GROUP_VALUES
from retnet.kernels.retention.portable.decay_gradient import sum_until_reset


@dataclass(frozen=True, slots=True)
class Crossing:
    """What the two walks leave, in `terms` terms, one per warpgroup and slice of a state [K, V].

    dots: q . dq, then k . dk: [2, B, H, terms, chunks * 64]. borders: S [B, H, borders + 1, terms, K V / terms] in 16
    bits, then the remainder of the last one. products: <S, dS> [B, H, borders + 1, terms, 64], of which the last is not
    used. All but `borders` in float32.
    """

    dots: Tensor
    borders: Tensor
    products: Tensor

    @classmethod
    def of(cls, q: Tensor, v: Tensor, terms: int) -> "Crossing":
        """Room for walks over q [B, T, G, K] and v [B, T, H, V]."""
        (B, T, H, V), K = v.shape, q.shape[3]
        chunks = triton.cdiv(T, CHUNK)
        borders = triton.cdiv(chunks - 1, BORDER_CHUNKS) + 2
        dots = torch.empty(2, B, H, terms, chunks * CHUNK, dtype=torch.float32, device=q.device)
        states = torch.empty(B, H, borders, terms, K * V // terms, dtype=q.dtype, device=q.device)
        products = torch.empty(B, H, borders, terms, GROUP_VALUES, dtype=torch.float32, device=q.device)
        return cls(dots, states, products)

    def gradient(self, log_decay: Tensor, sums: Tensor, mask: Tensor | None, initial: Tensor | None) -> Tensor:
        """dlog_decay [B, T, H] float32, from `token_sums`; 0 at resets and masked tokens.

        initial [B, H] float32: the initial state times its gradient (None: no such state)."""
        B, T, H = log_decay.shape
        grad = torch.empty(B, T, H, dtype=torch.float32, device=log_decay.device)
        launch(
            _decay_gradient_kernel, (B * (self.products.shape[2] - 1), H),
            self.dots[0], self.dots[1], self.products, sums,
            None if mask is None else mask.contiguous().view(torch.uint8), grad, T,
            initial, H=H, TERMS=self.dots.shape[3], C=CHUNK, BORDER=BORDER_CHUNKS, VALUES=GROUP_VALUES, num_warps=4,
        )  # fmt: skip
        return grad


@triton.jit
def _crossing(products, row, border, borders, TERMS: tl.constexpr, VALUES: tl.constexpr):
    """<S, dS> at a border."""
    terms = (row * (borders + 1) + border) * (TERMS * VALUES) + tl.arange(0, TERMS * VALUES)
    return tl.sum(tl.load(products + terms), 0)


@triton.jit
def _chunk(q_dot_dq, k_dot_dk, sums, row, token, end, plane, TERMS: tl.constexpr, C: tl.constexpr):
    """q . dq - k . dk of a chunk's tokens before `end`, and which of them are resets."""
    real = token < end
    through = tl.load(sums + row * plane + token, mask=real, other=0.0)
    before = tl.load(sums + row * plane + token - 1, mask=real & (token % C > 0), other=0.0)
    flow = tl.zeros([C], dtype=tl.float32)
    for term in range(TERMS):
        at = (row * TERMS + term) * plane + token
        flow += tl.load(q_dot_dq + at, mask=real, other=0.0) - tl.load(k_dot_dk + at, mask=real, other=0.0)
    return flow, is_reset(through, before)


@triton.jit(do_not_specialize=["tokens"])
def _decay_gradient_kernel(
    q_dot_dq, k_dot_dk, products, sums, mask, grad, tokens, initial,
    H: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, BORDER: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Grid: B * borders, H."""
    chunks = tl.cdiv(tokens, C)
    last = tl.cdiv(chunks - 1, BORDER)  # border
    batch, border = (tl.program_id(0) // (last + 1)).to(tl.int64), tl.program_id(0) % (last + 1)
    head = tl.program_id(1)
    row = batch * H + head
    start = tl.where(border == last, chunks - 1, border * BORDER) * C
    end = tl.where(border == last, tokens, tl.minimum(chunks - 1, (border + 1) * BORDER) * C)
    crossing = _crossing(products, row, border, last + 1, TERMS, VALUES)
    total, resets = crossing, 0.0
    for i in range(BORDER):
        token = start + (BORDER - 1 - i) * C + tl.arange(0, C)
        flow, reset = _chunk(q_dot_dq, k_dot_dk, sums, row, token, end, chunks * C, TERMS, C)
        total += tl.sum(flow, 0)
        resets += tl.sum(reset.to(tl.float32), 0)
    gap = -total
    if border > 0:
        gap += _crossing(products, row, border - 1, last + 1, TERMS, VALUES)
    elif initial is not None:
        gap += tl.load(initial + row)
    gap = tl.where(resets > 0, 0.0, gap) / (end - start)
    for i in range(BORDER):
        token = start + (BORDER - 1 - i) * C + tl.arange(0, C)
        flow, reset = _chunk(q_dot_dq, k_dot_dk, sums, row, token, end, chunks * C, TERMS, C)
        count = tl.cumsum(reset.to(tl.float32), 0)
        value = sum_until_reset(flow, crossing, count, tl.max(count, 0), reset)
        crossing = tl.sum(tl.where(token == start + (BORDER - 1 - i) * C, value, 0.0), 0)
        value += gap * (end - token).to(tl.float32)
        ok = token < end
        if mask is not None:
            ok = ok & (tl.load(mask + batch * tokens + token, mask=ok, other=0) != 0)
        tl.store(grad + (batch * tokens + token) * H + head, tl.where(ok, value, 0.0), mask=token < end)
