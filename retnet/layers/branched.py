"""Several mixers side by side in one layer, which read the same tokens and whose outputs are merged.

    sum     y = sum_i s_i f_i(a_i x)                       Falcon-H1 (arXiv 2507.22448): attention beside Mamba-2
    mean    y = 1/n sum_i w_i * rms_norm(f_i(a_i x)) s_i   after Hymba (arXiv 2411.13676); w_i [D] is learnt
    gate    y = sum_i g_i s_i f_i(a_i x)                   g = softmax(x W_g), all of them or the `top_k` largest

Every f_i has its own output projection; Hymba's heads share one, after the mean. With top_k 2 or more the kept gates
are divided by their sum; with top_k 1 the gate is the probability itself, which gives W_g a gradient, as in a mixture
of experts. Every mixer reads every token, whatever its gate is, because its state is that of all tokens.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from retnet.layers.composed import ComposedConfig, ComposedDraft, ComposedModule, ComposedState, composed_flops
from retnet.layers.growth import Growths
from retnet.layers.linear import WideLinear
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.norm import RMSNorm, check_eps
from retnet.layers.registry import mixer_configs, mixer_of
from retnet.layers.token_layout import TokenLayout


@dataclass(frozen=True)
class BranchedConfig(ComposedConfig):
    """branches: the mixers, in the order of their states. merge: of their outputs.

    input_scales, output_scales: a_i and s_i, a number for each branch (empty: 1). top_k: how many branches a token
    uses, with merge "gate" (None: all). norm_eps: of the norms, with merge "mean".
    """

    branches: tuple[MixerConfig, ...] = field(metadata={"kinds": mixer_configs})
    merge: Literal["sum", "mean", "gate"] = "sum"
    input_scales: tuple[float, ...] = ()
    output_scales: tuple[float, ...] = ()
    top_k: int | None = None
    norm_eps: float = 1e-6
    kind: Literal["branched"] = "branched"

    def __post_init__(self) -> None:
        for name in ("branches", "input_scales", "output_scales"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.branches) < 2:
            raise ValueError(f"branches has {len(self.branches)} mixers; accepted: at least two")
        for i, branch in enumerate(self.branches):
            if isinstance(branch, ComposedConfig):
                raise ValueError(f"branches[{i}] is {branch.kind}; accepted: mixers that are not made of others")
        super().__post_init__()
        for name in ("input_scales", "output_scales"):
            scales = getattr(self, name)
            if len(scales) not in (0, len(self.branches)) or not all(math.isfinite(scale) for scale in scales):
                raise ValueError(f"{name} is {scales}; accepted: {len(self.branches)} finite numbers, one per branch")
        if self.top_k is not None and not (self.merge == "gate" and 1 <= self.top_k <= len(self.branches)):
            raise ValueError(
                f"top_k is {self.top_k} with merge {self.merge!r}; accepted: None, or with merge 'gate' "
                f"1 to {len(self.branches)}"
            )
        check_eps(self, "norm_eps")

    @property
    def inside(self) -> tuple[MixerConfig, ...]:
        return self.branches

    def part(self, rank: int, size: int) -> Self:
        return replace(self, branches=tuple(branch.part(rank, size) for branch in self.branches))

    def for_export(self, one_token: bool) -> Self | None:
        branches = tuple(branch.for_export(one_token) for branch in self.branches)
        return None if None in branches else replace(self, branches=branches)


class BranchedState(ComposedState):
    """The states of the branches."""


class BranchedDraft(ComposedDraft):
    """The drafts of the branches."""


class Branched(ComposedModule):
    """x [B, T, D] -> y [B, T, D], the states of the branches."""

    STATE, DRAFT = BranchedState, BranchedDraft
    GROWTH: ClassVar[Growths] = {"gate_proj": "readout"}

    def __init__(self, config: BranchedConfig, d_model: int):
        super().__init__()
        self.config = config
        count = len(config.branches)
        self.branches = nn.ModuleList(mixer_of(branch).module(branch, d_model) for branch in config.branches)
        self.norms = None
        if config.merge == "mean":
            self.norms = nn.ModuleList(RMSNorm(d_model, eps=config.norm_eps) for _ in range(count))
        self.gate_proj = WideLinear(d_model, count, bias=False) if config.merge == "gate" else None

    def inside(self) -> dict[str, MixerModule]:
        return {f"branches.{i}": branch for i, branch in enumerate(self.branches)}  # pyright: ignore[reportReturnType]

    def forward(
        self, x: Tensor, state: BranchedState | None, layout: TokenLayout
    ) -> tuple[Tensor, ComposedState | ComposedDraft | None]:
        outs, results = [], []
        for i, branch in enumerate(self.branches):
            out, result = branch(_scaled(x, self.config.input_scales, i), state and state.states[i], layout)
            if self.norms is not None:
                out = self.norms[i](out)
            outs.append(_scaled(out, self.config.output_scales, i))
            results.append(result)
        return self._merged(x, outs), self.composed(results, layout)

    def _merged(self, x: Tensor, outs: list[Tensor]) -> Tensor:
        if self.gate_proj is not None:
            gates = self._gates(self.gate_proj(x)).to(x.dtype)
            outs = [gate[..., None] * out for gate, out in zip(gates.unbind(-1), outs, strict=True)]
        y = sum(outs[1:], outs[0])
        return y / len(outs) if self.norms is not None else y

    def _gates(self, logits: Tensor) -> Tensor:
        """The weight of each branch [..., n]; 0 for those that a token does not use."""
        gates, top_k = logits.softmax(-1), self.config.top_k
        if top_k is None:
            return gates
        kept, chosen = gates.topk(top_k, -1)
        if top_k > 1:
            kept = kept / kept.sum(-1, keepdim=True)
        return torch.zeros_like(gates).scatter(-1, chosen, kept)


def _scaled(x: Tensor, scales: tuple[float, ...], i: int) -> Tensor:
    return x if not scales or scales[i] == 1.0 else scales[i] * x


def branched_flops(config: BranchedConfig, work: Workload) -> MixerFlops:
    """The operations of all branches, and a multiply-add per branch and channel."""
    flops, merge = composed_flops(config.branches, work), 2 * len(config.branches) * work.d_model
    return MixerFlops(flops.forward + merge, flops.decode + merge)
