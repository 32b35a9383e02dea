"""What the forward and the backward pass of one call have in common: its inputs, as `ops/retention.py` checked them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RetentionProblem:
    """q, k [B, T, G, K], v [B, T, H, V], log_decay [H] or [B, T, H], state [N, H, K, V], mask [B, T], cu_seqlens [N+1].

    `chunk_size` (None or 0: the tuned one) is taken to the nearest supported segment; the walk has one of its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    scale: float
    state: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    chunk_size: int | None = None

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def plain(self) -> bool:
        """Every token of every row belongs to one sequence: neither masked nor packed."""
        return self.mask is None and self.cu_seqlens is None


@dataclass(frozen=True, slots=True)
class RetentionGradients:
    """RetentionGradients of a problem's tensors in their shapes; None for what was not asked for. dstate is float32."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlog_decay: Tensor | None
    dstate: Tensor | None
