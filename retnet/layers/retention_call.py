"""Calls of the retention operator by mixers (retention, Mamba-2), with their cost and the chunk size that runs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retnet.layers.mixer_base import MixerFlops, Workload
from retnet.layers.token_layout import TokenLayout
from retnet.ops.context_parallel import context_retention
from retnet.ops.plan import supported_chunk_size
from retnet.ops.retention import Mode, chunk_tokens, retention, retention_step_


@dataclass(frozen=True)
class RetentionCall:
    """Retention of H heads with K keys and V values each, in one mixer.

    chunk_size: a hint on a GPU; None: chosen by the operator. per_token: decays depend on the token. grouped: heads
    share q and k. scale: multiplies q; K ** -0.5 if None. split: the heads of one process; others wait for its output,
    so decays that are NaN give NaN instead of an error.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    mode: Mode = "auto"
    chunk_size: int | None = None
    per_token: bool = False
    grouped: bool = False
    scale: float | None = None
    split: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        """(out, memory [N, H, K, V] after the last token, or None without `layout.carry`).

        The given memory is overwritten if the layout allows it.
        """
        if layout.in_place and memory is not None and layout.one_per_row:
            return retention_step_(q, k, v, log_decay, memory, scale=self.scale, mask=layout.mask), memory
        if not (layout.deferred or self.split):
            return self._retention(q, k, v, log_decay, memory, layout)
        # Drafts of many requests are one call, which must not be refused for one of them: its output becomes NaN.
        broken = log_decay.isnan()
        decay = log_decay.masked_fill(broken, 0)
        out, memory = self._retention(q, k, v, decay, memory, layout)
        if self.split and memory is not None:
            memory = memory.masked_fill(broken.reshape(-1, broken.shape[-1]).any(0)[:, None, None], torch.nan)
        reached = broken.cumsum(1) > 0 if broken.dim() == 3 else broken
        return out.masked_fill(reached[..., None], torch.nan), memory

    def _retention(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {
            "scale": self.scale,
            "mask": layout.mask,
            "cu_seqlens": layout.cu_seqlens,
            "mode": self.mode if q.shape[1] > 1 else "auto",
            "chunk_size": supported_chunk_size(q, v, self.per_token, self.chunk_size),
        }
        if layout.context is not None:
            out, memory = context_retention(q, k, v, log_decay, layout.context, state=memory, **options)
            return out, memory if layout.carry else None
        state_dtype = None if memory is None else memory.dtype
        return retention(
            q, k, v, log_decay, state=memory, state_dtype=state_dtype, return_state=layout.carry, **options
        )

    def flops(self, work: Workload) -> MixerFlops:
        """S += k^T v and q S cost 4 K V per head; the causal half of a chunk of C tokens costs C (K + V).

        C is what runs on the device. The parallel form has one chunk, the whole sequence, and no S; the recurrent form
        has S alone.
        """
        through_state, in_chunk = 4 * self.key_dim * self.value_dim, self.key_dim + self.value_dim
        forward = through_state + min(self._chunk_tokens(work, self.mode), work.context) * in_chunk
        if self.mode == "parallel":
            forward = work.context * in_chunk
        elif self.mode == "recurrent":
            forward = through_state
        return MixerFlops(self.num_heads * forward, self.num_heads * through_state)

    def chunk_note(self, name: str, work: Workload) -> str | None:
        """The tokens per chunk that really run, in words. None for forms without chunks."""
        if self.mode not in ("auto", "chunkwise"):
            return None
        tokens = self._chunk_tokens(work, "chunkwise")
        asked = f", the nearest to chunk_size {self.chunk_size}" if self.chunk_size not in (None, tokens) else ""
        return f"{name} on {work.device}: {tokens} tokens per chunk{asked}"

    def _chunk_tokens(self, work: Workload, mode: Mode) -> int:
        sizes = work.context, self.key_dim, self.value_dim
        options = {"chunk_size": self.chunk_size, "per_token": self.per_token, "grouped": self.grouped}
        return chunk_tokens(*sizes, dtype=work.dtype, device=work.device, mode=mode, **options)
