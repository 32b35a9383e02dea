"""One read of all segments: its tensors, its states and its direction. Shared by the two segment kernels."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.device import precision
from retnet.kernels.retention.portable.segment_decay import SegmentDecay
from retnet.kernels.segments import Segments


@dataclass(slots=True)
class SegmentRead:
    """x, y [tokens, ., R], z [tokens, ., O] and states [slots, H, K, V]: the symbols of `segment_kernel`'s formulas.

    Without `sum_heads`, x and y are per group, z and out per head, and R = K. With it, x and y are per head, z and out
    per group, and R = V. `dot_with` [tokens, G, O] asks for its inner product with each head's float32 out, per token:
    what the gradient of log_decay is made of.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    states: Tensor
    decay: SegmentDecay
    segments: Segments
    state_scale: float
    pair_scale: float
    reverse: bool
    sum_heads: bool
    dot_with: Tensor | None = None

    def outputs(self, column_tiles: int) -> tuple[Tensor, Tensor | None]:
        """Empty out [tokens, ., O] in z's dtype, and empty inner products [column tiles, H, tokens] if wanted."""
        tokens, z = self.segments.num_tokens, self.z
        out = torch.empty(tokens, z.shape[1], z.shape[2], dtype=z.dtype, device=z.device)
        if self.dot_with is None:
            return out, None
        dots = torch.empty(column_tiles, self.states.shape[1], tokens, dtype=torch.float32, device=z.device)
        return out, dots

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.y, self.z, self.states

    @property
    def partner(self) -> Tensor:
        """`dot_with`, or a tensor that is not read."""
        return self.z if self.dot_with is None else self.dot_with

    @property
    def tokens(self) -> tuple[Tensor | int | None, ...]:
        """The kernels' arguments from `rate` to `num_tokens`."""
        decay, segments = self.decay, self.segments
        return decay.rate, decay.sums, decay.mask, segments.table, segments.tokens_per_sequence, segments.num_tokens

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.x.stride()[:2], *self.y.stride()[:2], *self.z.stride()[:2]

    @property
    def constants(self) -> dict[str, int | bool | str]:
        return {
            "H": self.states.shape[1],
            "R": self.x.shape[2],
            "O": self.z.shape[2],
            "L": self.segments.length,
            "REVERSE": self.reverse,
            "PER_TOKEN": self.decay.per_token,
            "MASKED": self.decay.mask is not None,
            "PACKED": self.segments.packed,
            "PRECISION": precision(self.z.dtype),
        }


@triton.jit
def load_state(state, r, columns, R: tl.constexpr, O: tl.constexpr, TRANSPOSED: tl.constexpr):
    """S[r, columns] of one head's state [R, O], stored as [O, R] if TRANSPOSED."""
    if TRANSPOSED:
        at = state + columns[None, :] * R + r[:, None]
    else:
        at = state + r[:, None] * O + columns[None, :]
    return tl.load(at, mask=(r < R)[:, None] & (columns < O)[None, :], other=0.0)


@triton.jit
def store_tile(out, start, rows, length, head, HEADS: tl.constexpr, columns, tile, O: tl.constexpr):
    """Store a [rows, columns] tile of one head of out [tokens, HEADS, O]; the segment's first token is `start`."""
    at = out + (start + rows)[:, None] * (HEADS * O) + head * O + columns[None, :]
    tl.store(at, tile.to(out.dtype.element_ty), mask=(rows < length)[:, None] & (columns < O)[None, :])
