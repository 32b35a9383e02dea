"""One token of retention per sequence, fused for decoding: q and k rotated, the state updated, the output read.

    S <- gamma S + k^T v        out = scale q S

Layers define these operations; here they are fused for inference: no gradients, no mask but whole sequences, no checks
of values (a NaN stays in the sequence that made it). On a GPU they are one launch (`kernels/decode/fused_step.py`).
"""

import torch
from torch import Tensor

from retnet.ops import device
from retnet.ops.decode.ring import Ring, ring_step
from retnet.ops.dtypes import widened
from retnet.ops.recurrence import StepDecay, advance_
from retnet.ops.rotary import Rotary, rotate


def decode_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    rotary: Rotary,
    decay: StepDecay,
    state: Tensor,
    active: Tensor | None,
    *,
    ring: Ring | None = None,
    scale: float | None = None,
) -> Tensor:
    """One token of retention for every active sequence, the state overwritten (Eq. 6): out [B, H, V], 0 elsewhere.

    Args:
        q: [B, H, K]; k: [B, G, K]; v: [B, G, V]; G divides H. Not rotated yet.
        rotation: (cos, sin) [B, K / 2] of the tokens' positions; None leaves q and k as they are.
        decay: of each head [H], or of each token and head [B, H].
        state: [B, H, K, V] float32 (float64 for float64).
        active: [B] bool; the other states are not touched. None where all are active (required on a GPU).
        ring: tokens not yet written to the state. This token joins them; a full ring is written. The caller increments
            `ring.pending`, once for all layers.
        scale: multiplies q; K ** -0.5 if None.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if device.uses_kernels(q):
        from retnet.kernels.decode.fused_step import decode_step

        rows = None if ring is None else (ring.keys, ring.values, ring.log_decay, ring.pending)
        assert active is not None
        return decode_step(q, k, v, rotation, rotary, decay.log_decay, state, active, rows, scale)
    if rotation is not None:
        cos, sin = (x[:, None] for x in rotation)
        rotated = rotate(torch.cat((q, k), 1)[:, None], cos, sin, rotary)[:, 0]
        q, k = rotated.split_with_sizes([q.shape[1], k.shape[1]], 1)
    q = widened(q) * scale
    if ring is not None:
        return ring_step(q, k, v, decay.log_decay.expand(q.shape[:2]), state, active, ring).to(v.dtype)
    dtype, heads_per_group = v.dtype, q.shape[1] // k.shape[1]
    k, v = widened(k), widened(v)
    if heads_per_group > 1:
        k, v = (x.repeat_interleave(heads_per_group, 1) for x in (k, v))
    if active is not None:
        idle = ~active[:, None]
        q, k, v = (x.masked_fill(idle[..., None], 0) for x in (q, k, v))
        decay = decay.masked(idle)
    advance_(state, decay, k, v)
    out = torch.matmul(q[..., None, :], state)[..., 0, :]
    return out if out.dtype == dtype else out.to(dtype)


def rotate_pairs_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> None:
    """q [B, T, H, K] and k [B, T, G, K] rotated in place by (cos, sin) [B T, K / 2], as `ops.rotary.rotate` does."""
    if device.uses_kernels(q):
        from retnet.kernels.decode.fused_step import rotate_pairs

        for x in (q, k):
            rotate_pairs(x.view(-1, *x.shape[2:]), cos, sin, rotary)
        return
    for x in (q, k):
        x.copy_(rotate(x, cos.view(*x.shape[:2], -1), sin.view(*x.shape[:2], -1), rotary))
