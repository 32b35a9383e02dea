"""A block: a mixer and a feed-forward on the residual stream, one after the other or side by side.

    pre:       a x + s f(norm(x))               post:  norm(a x + s f(x))
    shared:    a norm(x) + s f(norm(x))
    parallel:  a x + s (mixer(norm1 x) + feed_forward(norm2 x))

The paper's layer is pre-norm with s = a = 1; DeepNet's (deepnorm, arXiv 2203.00555) is post-norm with a = (2 L)^(1/4),
which torchscale's `deepnorm` option also combines with pre-norm. MiniMax-Text-01 (arXiv 2501.08313) adds the branch to
the norm's output, which its code calls post-norm: "shared". Hyper-connections (`hyper_connection.py`) put several
streams and learnt weights in place of a x.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.layers.feed_forward import FeedForward, FeedForwardConfig
from retnet.layers.hyper_connection import HyperConnection, HyperConnectionConfig, expand_streams, merge_streams
from retnet.layers.mixer_base import MixerConfig
from retnet.layers.moe import MoE, MoEConfig
from retnet.layers.norm import check_eps, make_norm
from retnet.layers.recompute import Branch, kept_results, recomputed
from retnet.layers.registry import mixer_configs, mixer_of
from retnet.layers.state import LayerState
from retnet.layers.token_layout import TokenLayout
from retnet.ops.norms import Norm
from retnet.system.choices import check_choices

# Each feed-forward: its config class, its module `(x, layout) -> y`.
FEED_FORWARDS = {FeedForwardConfig: FeedForward, MoEConfig: MoE}


@dataclass(frozen=True)
class BlockConfig:
    """One layer of a stack. residual_scale is s, skip_scale is a; dropout is on both branches.

    feed_forward_residual_scale, feed_forward_skip_scale: s and a of the feed-forward; those of the mixer if None.
    feed_forward None: the mixer alone, as in Mamba. keeps_state False: no state may be carried
    from call to call. hyper: several residual streams; with norm_position "pre", residual "sequential" and a = 1.
    """

    mixer: MixerConfig = field(metadata={"kinds": mixer_configs})
    feed_forward: FeedForwardConfig | MoEConfig | None
    norm: Norm | Literal["none"] = "layer"
    norm_eps: float = 1e-6
    norm_position: Literal["pre", "post", "shared"] = "pre"
    residual: Literal["sequential", "parallel"] = "sequential"
    residual_scale: float = 1.0
    skip_scale: float = 1.0
    feed_forward_residual_scale: float | None = None
    feed_forward_skip_scale: float | None = None
    dropout: float = 0.0
    keeps_state: bool = True
    hyper: HyperConnectionConfig | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_choices(self.mixer)  # one from outside the package may check nothing itself
        check_eps(self, "norm_eps")
        if self.norm_position != "pre" and self.residual == "parallel":
            raise ValueError(
                f"norm_position is {self.norm_position!r} with residual 'parallel'; accepted with parallel: 'pre'"
            )
        own = self.feed_forward_residual_scale, self.feed_forward_skip_scale
        if own != (None, None) and (self.feed_forward is None or self.residual == "parallel"):
            raise ValueError(
                f"feed_forward_residual_scale is {own[0]}, feed_forward_skip_scale {own[1]}; accepted without a "
                "feed_forward, or with residual 'parallel': None"
            )
        if self.feed_forward is None and self.residual == "parallel":
            raise ValueError("residual is 'parallel' without a feed_forward; accepted: 'sequential'")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; accepted: 0 <= dropout < 1")
        plain = {"norm_position": "pre", "residual": "sequential", "skip_scale": 1.0, "feed_forward_skip_scale": None}
        for name, accepted in plain.items() if self.hyper is not None else ():
            if getattr(self, name) != accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted with hyper-connections: {accepted!r}")

    @property
    def num_branches(self) -> int:
        """Those that read the residual stream and add to it."""
        return 1 if self.feed_forward is None else 2

    @property
    def mixer_scales(self) -> tuple[float, float]:
        """(a, s) of the mixer."""
        return self.skip_scale, self.residual_scale

    @property
    def feed_forward_scales(self) -> tuple[float, float]:
        """(a, s) of the feed-forward."""
        skip, branch = self.feed_forward_skip_scale, self.feed_forward_residual_scale
        return self.skip_scale if skip is None else skip, self.residual_scale if branch is None else branch


class Block(nn.Module):
    """x [B, T, D], state -> (x, state).

    takes_streams, gives_streams: with hyper-connections, whether x and the result are [B, T, n D], all streams side by
    side. A block alone takes and gives [B, T, D]; `connect_streams` sets both where a neighbour has as many streams.
    """

    def __init__(self, config: BlockConfig, d_model: int):
        super().__init__()
        self.config = config
        self.mixer_norm = make_norm(config.norm, d_model, config.norm_eps)
        self.mixer = mixer_of(config.mixer).module(config.mixer, d_model)
        self.feed_forward = None
        if config.feed_forward is not None:
            self.feed_forward_norm = make_norm(config.norm, d_model, config.norm_eps)
            self.feed_forward = FEED_FORWARDS[type(config.feed_forward)](config.feed_forward, d_model)
        self.d_model, self.takes_streams, self.gives_streams = d_model, False, False
        if config.hyper is not None:
            self.mixer_hyper = HyperConnection(config.hyper, d_model)
            if config.feed_forward is not None:
                self.feed_forward_hyper = HyperConnection(config.hyper, d_model)

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        """Compute what is shared with other layers and calls: a block compiled or recomputed alone only reads it."""
        self.mixer.prepare(layout, dtype)

    def forward(self, x: Tensor, state: LayerState | None, layout: TokenLayout) -> tuple[Tensor, LayerState | None]:
        """The second result is the mixer's: a state, or a draft with `layout.deferred`."""
        mixed, fed = self._mixed, self._fed
        if layout.recompute != "none" and not self.mixer.RECOMPUTES_ITSELF:
            of_mixer, of_feed_forward = kept_results(layout.recompute)
            mixed = partial(recomputed, self._mixed, of_mixer)
            fed = partial(recomputed, self._fed, of_feed_forward)
        config = self.config
        if config.hyper is not None:
            return self._through_streams(mixed, fed, x, state, layout)
        x = self._shared(self.mixer_norm, x)
        y, state = mixed(x, state, layout)
        if config.residual == "parallel" and self.feed_forward is not None:
            return self._residual(x, y + fed(x, None, layout)[0], *config.mixer_scales), state
        x = self._after(self.mixer_norm, self._residual(x, y, *config.mixer_scales))
        if self.feed_forward is not None:
            x = self._shared(self.feed_forward_norm, x)
            y = fed(x, None, layout)[0]
            x = self._after(self.feed_forward_norm, self._residual(x, y, *config.feed_forward_scales))
        return x, state

    def _through_streams(
        self, mixed: Branch, fed: Branch, x: Tensor, state: LayerState | None, layout: TokenLayout
    ) -> tuple[Tensor, LayerState | None]:
        config = self.config
        assert config.hyper is not None
        streams = x if self.takes_streams else expand_streams(x, config.hyper.num_streams)
        h, weights = self.mixer_hyper.read(streams)
        y, state = mixed(h, state, layout)
        streams = self.mixer_hyper.write(streams, self._residual(h, y, 0.0, config.mixer_scales[1]), weights)
        if self.feed_forward is not None:
            h, weights = self.feed_forward_hyper.read(streams)
            y = self._residual(h, fed(h, None, layout)[0], 0.0, config.feed_forward_scales[1])
            streams = self.feed_forward_hyper.write(streams, y, weights)
        return streams if self.gives_streams else merge_streams(streams, self.d_model), state

    def _mixed(self, x: Tensor, state: LayerState | None, layout: TokenLayout) -> tuple[Tensor, LayerState | None]:
        return self.mixer(self._before(self.mixer_norm, x), state, layout)

    def _fed(self, x: Tensor, state: None, layout: TokenLayout) -> tuple[Tensor, None]:
        assert self.feed_forward is not None
        return self.feed_forward(self._before(self.feed_forward_norm, x), layout), None

    def _shared(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.config.norm_position == "shared" else x

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.config.norm_position == "pre" else x

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.config.norm_position == "post" else x

    def _residual(self, x: Tensor, y: Tensor, skip: float, branch: float) -> Tensor:
        """skip x + branch y, without a pass over memory where skip is 1 or 0."""
        y = F.dropout(y, self.config.dropout, self.training)
        if skip == 0.0:
            return y if branch == 1.0 else branch * y
        return torch.add(x if skip == 1.0 else skip * x, y, alpha=branch)


def connect_streams(blocks: Iterable[nn.Module]) -> None:
    """Let consecutive blocks with equally many residual streams pass all of them on, rather than their mean."""
    for before, after in pairwise(blocks):
        assert isinstance(before, Block)
        assert isinstance(after, Block)
        here, there = before.config.hyper, after.config.hyper
        equal = here is not None and there is not None and here.num_streams == there.num_streams
        before.gives_streams = after.takes_streams = equal
