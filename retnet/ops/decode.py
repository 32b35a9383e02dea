"""What one token a sequence costs, in as few passes and launches as possible: the operators of a decode step.

    decode_linear   skip residual + branch (y W^T + bias)       y = norm(x) * act(gate)
    decode_step_    q, k turned; S <- gamma S + k^T v; out = scale q S

Both are definitions that layers already follow, fused for inference: no gradients, no masks but whole sequences, no
checks of values (a NaN stays in the sequence that made it). On a GPU each is one launch while there are few rows
(`kernels/decode_linear.py`, `kernels/decode_step.py`); on a CPU what counts is reading weights with all cores.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.norms import normalize
from retnet.ops.rotary import Rotary, rotate

MATVEC_ROWS = 1  # up to so many rows a GPU's product is bound by reading weights without tensor cores
INT8_ROWS = 4  # int8 weights are rather read again, so many times, than widened in memory
# Parts of a weight that a CPU multiplies as a batch: MKL reads one product of few rows with one core, a batch with all.
ROW_BLOCKS = (32, 16, 8, 4, 2, 1)  # of W [N, K], the first that divides N
COLUMN_BLOCKS = (4, 2, 1)  # of W kept as [K, N], the first that divides K; their sums are added
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu, "none": lambda x: x}


@dataclass(frozen=True)
class InputNorm:
    """A norm over each of `groups` equal parts of a row; weight and bias [width of a part], or of the whole row."""

    kind: Literal["layer", "rms", "none"] = "none"
    groups: int = 1
    eps: float = 1e-6
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, K], in float32 (float64 for float64)."""
        x = _widened(x)
        if self.kind == "none":
            return x
        width = x.shape[1] // self.groups
        parts = x if self.groups == 1 else x.view(-1, self.groups, width)
        weight, bias = self.weight, self.bias
        if weight is not None and weight.dtype == x.dtype and weight.numel() == width:  # in the norm's own pass
            if self.kind == "layer":
                parts = F.layer_norm(parts, (width,), weight, bias, self.eps)
                return parts if self.groups == 1 else parts.flatten(1)
            parts, weight = F.rms_norm(parts, (width,), weight, self.eps), None
        else:
            parts = normalize(parts, self.kind, self.eps)
        if weight is not None:
            parts = parts * weight.view(-1, width)[0 if self.groups == 1 else slice(None)]
        if bias is not None:
            parts = parts + bias.view(-1, width)[0 if self.groups == 1 else slice(None)]
        return parts if self.groups == 1 else parts.flatten(1)


@dataclass(frozen=True)
class DecodeWeight:
    """values [N, K], floating point, or int8 with scale [N] that multiplies the rows; bias [N].

    Where they lie as [K, N] (strides (1, N)), a CPU reads them faster if N > K.
    """

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @cached_property
    def blocks(self) -> Tensor:
        """Views for a CPU: [n, K, N / n], or of values that lie as [K, N], [n, K / n, N]."""
        N, K = self.values.shape
        if self.by_columns:
            n = next(n for n in COLUMN_BLOCKS if K % n == 0)
            return self.values.t().view(n, K // n, N)
        n = next(n for n in ROW_BLOCKS if N % n == 0)
        return self.values.view(n, N // n, K).mT

    @cached_property
    def ones(self) -> Tensor:
        """[N], for a product whose scale is applied after it, in its own precision."""
        return torch.ones(self.values.shape[0], dtype=torch.bfloat16, device=self.values.device)

    @property
    def by_columns(self) -> bool:
        return self.values.stride(0) == 1


@dataclass(frozen=True)
class StepDecay:
    """log_decay [H] or [B, H], natural log, <= 0, float32 (float64), and its expm1, which slow decays are added by.

    all_slow: whether it is known, without asking a device, that all are slow.
    """

    log_decay: Tensor
    change: Tensor
    all_slow: bool = False

    SLOWEST_FAST = -0.5  # exp of slower ones would be rounded to one side at every token, and drift

    @classmethod
    def of(cls, log_decay: Tensor) -> "StepDecay":
        """Decays that change with every token."""
        return cls(log_decay, torch.expm1(log_decay))

    @classmethod
    def fixed(cls, log_decay: Tensor) -> "StepDecay":
        """Decays that stay, to be asked about once."""
        log_decay = log_decay.detach().clone()
        change = log_decay.double().expm1().to(log_decay.dtype)
        return cls(log_decay, change, bool((log_decay > cls.SLOWEST_FAST).all()))


@dataclass
class Ring:
    """The rows that a state has not been given yet: keys [B, G, W, K], values [B, G, W, V], log_decay [B, H, W].

    pending [B] int64 is how many there are of each sequence, fewer than W; layers that step together share it.
    """

    keys: Tensor
    values: Tensor
    log_decay: Tensor
    pending: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.log_decay))

    def slot(self, index: int) -> "Ring":
        """The rows of one sequence, as views."""
        return Ring(*(x[index : index + 1] for x in (self.keys, self.values, self.log_decay, self.pending)))

    def folded(self, state: Tensor) -> Tensor:
        """The states [B, H, K, V] with the pending rows read, as new tensors."""
        W, heads_per_group = self.keys.shape[2], state.shape[1] // self.keys.shape[1]
        there = torch.arange(W, device=state.device) < self.pending[:, None]
        decay, since = _decays(self.log_decay, there[:, None])
        keys, values = (_per_head(x, there, heads_per_group).to(state.dtype) for x in (self.keys, self.values))
        return state * decay[..., None, None] + (keys * since[..., None]).mT @ values


NO_NORM = InputNorm()


def uses_kernels(x: Tensor) -> bool:
    """Whether these operators run as GPU kernels for x; otherwise they are torch's operators in a CPU's favour."""
    return x.is_cuda


def decode_linear(
    x: Tensor | None,
    weight: DecodeWeight,
    *,
    norm: InputNorm = NO_NORM,
    gate: Tensor | None = None,
    activation: str = "none",
    residual_: Tensor | None = None,
    skip: float = 1.0,
    branch: float = 1.0,
) -> Tensor:
    """skip residual + branch (y W^T + bias) [B, N], with y = norm(x) * activation(gate), in x's dtype.

    Args:
        x, gate: [B, K]; either may be None and is then left out.
        weight: W [N, K] and what belongs to it.
        residual_: [B, N], overwritten with the result; a plain product if None.
    """
    some = x if x is not None else gate
    assert some is not None
    if not uses_kernels(some):
        return _linear_on_cpu(x, weight, norm, gate, activation, residual_, skip, branch)
    from retnet.kernels.decode.linear import matvec, prepare

    described = (norm.kind, norm.groups, norm.eps, norm.weight, norm.bias)
    if len(some) <= (MATVEC_ROWS if weight.scale is None else INT8_ROWS):
        out = some.new_empty(len(some), len(weight.values)) if residual_ is None else residual_
        for rows in zip(*(x.split(MATVEC_ROWS) if x is not None else _nones(some) for x in (x, gate, out))):
            matvec(
                rows[0], rows[1], weight.values, weight.scale, weight.bias, described, activation, rows[2],
                None if residual_ is None else rows[2], skip, branch,
            )  # fmt: skip
        return out
    y = some
    if gate is not None or norm.kind != "none":
        y = torch.empty_like(some, memory_format=torch.contiguous_format)
        prepare(x, gate, described, activation, y)
    return _product(y, weight, residual_, skip, branch)


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
        q: [B, H, K]; k: [B, G, K]; v: [B, G, V]; G divides H. Not turned yet.
        rotation: (cos, sin) [B, K / 2] of the tokens' positions; None leaves q and k as they are.
        decay: of each head [H], or of each token and head [B, H].
        state: [B, H, K, V] float32 (float64 for float64).
        active: [B] bool; the others' states are not touched. None where all are (a GPU is always told).
        ring: rows that were not written yet; this token joins them, and where they fill it they are all written. The
            caller counts `ring.pending` up, once for all layers.
        scale: multiplies q; K ** -0.5 if None.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if uses_kernels(q):
        from retnet.kernels.decode.fused_step import decode_step

        rows = None if ring is None else (ring.keys, ring.values, ring.log_decay, ring.pending)
        assert active is not None
        return decode_step(q, k, v, rotation, rotary, decay.log_decay, decay.change, state, active, rows, scale)
    if rotation is not None:
        cos, sin = (x[:, None] for x in rotation)
        turned = rotate(torch.cat((q, k), 1)[:, None], cos, sin, rotary)[:, 0]
        q, k = turned.split_with_sizes([q.shape[1], k.shape[1]], 1)
    q = _widened(q) * scale
    if ring is not None:
        return _ring_step(q, k, v, decay.log_decay.expand(q.shape[:2]), state, active, ring).to(v.dtype)
    dtype, heads_per_group = v.dtype, q.shape[1] // k.shape[1]
    k, v = _widened(k), _widened(v)
    if heads_per_group > 1:
        k, v = (x.repeat_interleave(heads_per_group, 1) for x in (k, v))
    log_decay, change = decay.log_decay, decay.change
    if active is not None:
        idle = ~active[:, None]
        q, k, v = (x.masked_fill(idle[..., None], 0) for x in (q, k, v))
        log_decay, change = (x.expand(q.shape[0], -1).masked_fill(idle, 0) for x in (log_decay, change))
    if not decay.all_slow:
        slow = log_decay > StepDecay.SLOWEST_FAST
        state.mul_(log_decay.masked_fill(slow, 0).exp()[..., None, None])
        change = change.masked_fill(~slow, 0)
    state.addcmul_(state, change[..., None, None]).addcmul_(k[..., None], v[..., None, :])
    out = torch.matmul(q[..., None, :], state)[..., 0, :]
    return out if out.dtype == dtype else out.to(dtype)


def turn_pairs_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> None:
    """q [B, T, H, K] and k [B, T, G, K] turned in place by (cos, sin) [B T, K / 2], as `ops.rotary.rotate` does."""
    if uses_kernels(q):
        from retnet.kernels.decode.fused_step import turn

        for x in (q, k):
            turn(x.view(-1, *x.shape[2:]), cos, sin, rotary)
        return
    for x in (q, k):
        x.copy_(rotate(x, cos.view(*x.shape[:2], -1), sin.view(*x.shape[:2], -1), rotary))


def _ring_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, active: Tensor | None, ring: Ring
) -> Tensor:
    """The step that leaves the state alone until its ring is full; q [B, H, K] scaled, k and v turned."""
    W, heads_per_group = ring.keys.shape[2], q.shape[1] // k.shape[1]
    sequence = torch.arange(len(q), device=q.device)
    if active is not None:
        sequence = sequence[active]
    for rows, new in ((ring.keys, k), (ring.values, v), (ring.log_decay, log_decay)):
        rows[sequence, :, ring.pending[sequence]] = new[sequence].to(rows.dtype)
    there = torch.arange(W, device=q.device) <= ring.pending[:, None]
    decay, since = _decays(ring.log_decay, there[:, None])
    keys, values = (_per_head(x, there, heads_per_group).to(state.dtype) for x in (ring.keys, ring.values))
    score = (keys @ q[..., None])[..., 0] * since
    out = (q[..., None, :] @ state)[..., 0, :] * decay[..., None] + (score[..., None, :] @ values)[..., 0, :]
    for b in sequence[ring.pending[sequence] == W - 1].tolist():
        state[b].mul_(decay[b, :, None, None]).baddbmm_((keys[b] * since[b, ..., None]).mT, values[b])
    return out if active is None else out.masked_fill(~active[:, None, None], 0)


def _decays(log_decay: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """(over all rows [B, H], from each row to the last [B, H, W]) of log decays [B, H, W], of the rows that are there.

    Suffix sums, not differences: -inf is a reset. 0 where there is no row.
    """
    log_decay = log_decay.masked_fill(~there, 0)
    later = torch.ones(log_decay.shape[-1], log_decay.shape[-1], device=log_decay.device).tril(-1).bool()
    since = torch.where(later.mT, log_decay[..., None, :], 0).sum(-1)
    return log_decay.sum(-1).exp(), since.exp().masked_fill(~there, 0)


def _per_head(rows: Tensor, there: Tensor, heads_per_group: int) -> Tensor:
    """[B, G, W, K] -> [B, H, W, K], 0 where there is no row (what lies there may be anything)."""
    rows = rows.masked_fill(~there[:, None, :, None], 0)
    return rows if heads_per_group == 1 else rows.repeat_interleave(heads_per_group, 1)


def _linear_on_cpu(
    x: Tensor | None,
    weight: DecodeWeight,
    norm: InputNorm,
    gate: Tensor | None,
    activation: str,
    residual_: Tensor | None,
    skip: float,
    branch: float,
) -> Tensor:
    some = x if x is not None else gate
    assert some is not None
    y = None if x is None else norm(x)
    if gate is not None:
        opened = ACTIVATIONS[activation](gate)
        y = opened if y is None else y * opened
    assert y is not None
    return _product(y if y.dtype == some.dtype else y.to(some.dtype), weight, residual_, skip, branch)


def _product(y: Tensor, weight: DecodeWeight, residual_: Tensor | None, skip: float, branch: float) -> Tensor:
    if residual_ is not None and uses_kernels(y) and weight.bias is None and weight.scale is None:
        return residual_.addmm_(y, weight.values.t(), beta=skip, alpha=branch)
    out = _by_library(y, weight) if uses_kernels(y) else _in_blocks(y, weight)
    if weight.bias is not None:
        out = out + weight.bias
    if residual_ is None:
        return out
    if skip != 1.0:
        residual_.mul_(skip)
    return residual_.add_(out, alpha=branch)


def _by_library(y: Tensor, weight: DecodeWeight) -> Tensor:
    if weight.scale is None:
        return y @ weight.values.t()
    return (y @ weight.values.to(y.dtype).t()) * weight.scale.to(y.dtype)


def _in_blocks(y: Tensor, weight: DecodeWeight) -> Tensor:
    """y W^T on a CPU with W in blocks, whose products run side by side on all cores."""
    if weight.scale is not None:
        # bfloat16 inputs and sums: torch's kernel for others is slower than reading the weights in float32.
        out = torch._weight_int8pack_mm(y.bfloat16(), weight.values, weight.ones)
        return (out * weight.scale).to(y.dtype)
    blocks, B = weight.blocks, y.shape[0]  # (len of a tensor takes microseconds)
    if weight.by_columns:
        return torch.bmm(y.view(B, blocks.shape[0], -1).transpose(0, 1), blocks).sum(0)
    out = torch.bmm(y.expand(blocks.shape[0], -1, -1), blocks)
    return out.view(1, -1) if B == 1 else out.transpose(0, 1).reshape(B, -1)


def _widened(x: Tensor) -> Tensor:
    """In float32, or float64: without a call where it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _nones(x: Tensor) -> list[None]:
    return [None] * len(x.split(MATVEC_ROWS))
