"""Short causal convolution and its activation as a module: weights in the layout of `nn.Conv1d`, past inputs passed in
and returned."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retnet.layers.token_layout import TokenLayout
from retnet.ops.context_shard import ContextShard
from retnet.ops.short_convolution import Activation, short_convolution


class ShortConvolution(nn.Module):
    """x [B, T, C], recent [N, W - 1, C] -> (y, recent)."""

    def __init__(self, channels: int, width: int, bias: bool = True, activation: Activation = "none"):
        super().__init__()
        self.activation: Activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_own()

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Uniform in +- 1 / sqrt(W), no bias."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The inputs before the first token, all zero: [N, W - 1, C]."""
        channels, _, width = self.weight.shape
        return torch.zeros(batch, width - 1, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, recent: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """A mask is supported for one token per row; longer masked calls come here packed."""
        (y,), recent = self.of_parts((x,), recent, layout)
        return y, recent

    def of_parts(
        self, parts: Sequence[Tensor], recent: Tensor | None, layout: TokenLayout
    ) -> tuple[list[Tensor], Tensor]:
        """`forward` of inputs [B, T, C_i] whose channels follow each other: they are read without being joined."""
        if layout.context is not None:
            recent = self._from_the_shard_before(parts, layout.context, layout.cu_seqlens)
        widths = [x.shape[-1] for x in parts]
        weights = self.weight.split(widths)
        biases = [None] * len(parts) if self.bias is None else self.bias.split(widths)
        pasts = [None] * len(parts) if recent is None else recent.split(widths, -1)
        ys, afters = [], []
        for x, weight, bias, past in zip(parts, weights, biases, pasts, strict=True):
            y, after = short_convolution(
                x, weight, bias, activation=self.activation, recent=past, cu_seqlens=layout.cu_seqlens
            )
            ys.append(y)
            afters.append(after)
        after = afters[0] if len(afters) == 1 else torch.cat(afters, -1)
        if recent is None:
            return ys, after
        if layout.mask is not None:
            after = torch.where(layout.mask[..., None], after, recent)
        if layout.in_place and layout.one_per_row:
            return ys, recent.copy_(after)
        return ys, after

    def _from_the_shard_before(self, parts: Sequence[Tensor], shard: ContextShard, cu_seqlens: Tensor | None) -> Tensor:
        """The last W - 1 inputs before each sequence of a shard [N, W - 1, C]: zeros for those that begin on it."""
        reach = self.weight.shape[-1] - 1
        if shard.tokens < reach:
            raise ValueError(f"a shard has {shard.tokens} tokens; accepted by this convolution: at least {reach}")
        ends = torch.cat([x[:, -reach:] for x in parts], -1)
        return shard.recent(ends, ends.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def advance_recent_(recent: Tensor, inputs: Tensor, counts: Tensor) -> None:
    """Move `recent` [B, W - 1, C] on by the first counts[b] of the inputs [B, T, C], in place."""
    spread = torch.cat([recent, inputs.to(recent.dtype)], 1)
    index = counts[:, None] + torch.arange(recent.shape[1], device=counts.device)
    recent.copy_(spread.gather(1, index[..., None].expand(-1, -1, recent.shape[2])))
