"""Hyper-connections: n residual streams S_1 .. S_n in place of one, and learnt weights between them and each branch.

    x    = sum_j r_j S_j                      what a branch f, a mixer or a feed-forward, reads (before its norm)
    S_i <- sum_j M_ij S_j + w_i f(x)          what it leaves behind

(Zhu et al. 2024, arXiv 2409.19606). r [n], w [n] and M [n, n] are functions of logits z, which have a fixed part and,
if they are dynamic, one that depends on the token through all of its streams s [n D]:

    z = b + a (W s) / rms(s)                  a: one learnt number each for the logits of r, w and M

    birkhoff           r = 2 sigmoid(z)   w = 2 sigmoid(z)   M = sinkhorn(z)      mHC (arXiv 2512.24880)
    unconstrained      r, w, M = z, with the tanh of the dynamic part             the paper's
    learned_lowrank    r, w as unconstrained; M = 1 + U V^T, of rank n / 2; the logits are U and V

Sinkhorn's iterations bring M close to a doubly stochastic matrix, which keeps the mean of the streams and makes none of
them larger, however many layers follow one another. Their last step makes the rows sum to 1.

The streams begin as n copies of the hidden state and end as their mean. (The papers take the sum, which differs by the
factor n that the final norm takes out.) A model begins as the one with plain residuals: W is 0, r sums to 1, w is 1 and
the rows of M sum to 1, so all streams are equal. They would stay so if every branch read them alike: r is drawn anew
for each. mHC reads sigmoid(z); the factor 2, which the branch's norm takes out too, lets one stream alone be read as it
is.

Weights are computed in float32 or wider and streams mixed in their own dtype. The norm and W read the streams where
they are, and the backward reads those that the forward read: no copy of them is held.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.layers.float32_parameters import Float32Parameters
from retnet.layers.growth import Growths
from retnet.ops.derivatives import transforms_active
from retnet.ops.dtypes import wide_dtype
from retnet.system.choices import check_choices

MOST_STREAMS = 64
MOST_ITERATIONS = 1000
OWN_LOGIT = 4.0  # at the start, of a stream in its own row of M: of 4 streams it keeps 95% of itself
START_SCALE = 0.01  # of the dynamic part
NORM_EPS = 1e-6
LEAST_LOGIT = -60.0  # below the largest of its row: exp of it is a normal number, and no column vanishes


@dataclass(frozen=True)
class HyperConnectionConfig:
    """num_streams: n. mixing: a row of this module's table. sinkhorn_iters: of birkhoff; 0: rows alone sum to 1.

    dynamic: the weights depend on the token.
    """

    num_streams: int
    mixing: Literal["birkhoff", "unconstrained", "learned_lowrank"] = "birkhoff"
    sinkhorn_iters: int = 3
    dynamic: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        for name, low, high in (("num_streams", 1, MOST_STREAMS), ("sinkhorn_iters", 0, MOST_ITERATIONS)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: {low} to {high}")

    @property
    def rank(self) -> int:
        """Of M - 1, with learned_lowrank."""
        return max(1, self.num_streams // 2)

    @property
    def num_logits(self) -> tuple[int, int, int]:
        """Of r, w and M."""
        n = self.num_streams
        return n, n, 2 * n * self.rank if self.mixing == "learned_lowrank" else n * n


class StreamWeights(NamedTuple):
    """write [..., n], mix [..., n, n]: in the dtype of the streams; of all tokens alike unless they are dynamic."""

    write: Tensor
    mix: Tensor


class HyperConnection(Float32Parameters):
    """The weights between the streams [..., n D] and one branch."""

    FLOAT32_PARAMETERS = ("stream_bias", "stream_scale")
    GROWTH: ClassVar[Growths] = {"stream_weight": "readout"}

    def __init__(self, config: HyperConnectionConfig, d_model: int):
        super().__init__()
        self.config = config
        count, width = sum(config.num_logits), config.num_streams * d_model
        self.stream_bias = nn.Parameter(torch.empty(count))
        self.stream_weight = nn.Parameter(torch.empty(count, width)) if config.dynamic else None
        self.stream_scale = nn.Parameter(torch.empty(3)) if config.dynamic else None
        self.reset_own()

    @torch.no_grad()
    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Weights at which equal streams stay equal, and r that differs between the branches of a model."""
        n, mixing = self.config.num_streams, self.config.mixing
        read, write, mix = self.stream_bias.split(self.config.num_logits)
        share = torch.empty_like(read).normal_(generator=generator).softmax(-1)
        read.copy_((share / 2).logit() if mixing == "birkhoff" else share)
        write.fill_(0.0 if mixing == "birkhoff" else 1.0)
        if mixing == "learned_lowrank":
            mix[: n * self.config.rank].normal_(std=n**-0.5, generator=generator)
            mix[n * self.config.rank :].zero_()
        else:
            own = OWN_LOGIT if mixing == "birkhoff" else 1.0
            mix.copy_(own * torch.eye(n, device=mix.device, dtype=mix.dtype).flatten())
        if self.stream_weight is not None and self.stream_scale is not None:
            nn.init.zeros_(self.stream_weight)
            nn.init.constant_(self.stream_scale, START_SCALE)

    def read(self, streams: Tensor) -> tuple[Tensor, StreamWeights]:
        """streams [..., n D] -> the branch's input [..., D], and the weights with which `write` takes its output."""
        n = self.config.num_streams
        read, write, mix = self._logits(streams)
        if self.config.mixing == "birkhoff":
            read, write = 2 * read.sigmoid(), 2 * write.sigmoid()
            matrix = sinkhorn(mix.unflatten(0, (n, n)), self.config.sinkhorn_iters)
        elif self.config.mixing == "unconstrained":
            matrix = mix.unflatten(0, (n, n))
        else:
            left, right = mix.unflatten(0, (2, n, self.config.rank))
            one = torch.eye(n, device=mix.device, dtype=mix.dtype).view(n, n, *(1,) * (mix.dim() - 1))
            matrix = one + torch.einsum("ir...,jr...->ij...", left, right)
        dtype = streams.dtype
        with torch.autocast(streams.device.type, enabled=False):
            x = torch.matmul(read.movedim(0, -1).to(dtype).unsqueeze(-2), streams.unflatten(-1, (n, -1))).squeeze(-2)
        return x, StreamWeights(write.movedim(0, -1).to(dtype), matrix.movedim((0, 1), (-2, -1)).to(dtype))

    def write(self, streams: Tensor, y: Tensor, weights: StreamWeights) -> Tensor:
        """The streams [..., n D] after the branch's output y [..., D]."""
        with torch.autocast(streams.device.type, enabled=False):
            mixed = torch.matmul(weights.mix, streams.unflatten(-1, (self.config.num_streams, -1)))
            outer = weights.write.unsqueeze(-1), y.to(mixed.dtype).unsqueeze(-2)
            return (mixed.addcmul(*outer) if transforms_active() else mixed.addcmul_(*outer)).flatten(-2)

    def _logits(self, streams: Tensor) -> list[Tensor]:
        """Those of r, w and M, each [number, ...]: sums over few numbers are fast where tokens lie side by side."""
        wide = torch.promote_types(wide_dtype(streams.dtype), wide_dtype(self.stream_bias.dtype))
        sizes = list(self.config.num_logits)
        fixed = self.stream_bias.to(wide).view(-1, *(1,) * (streams.dim() - 1)).split(sizes)
        if self.stream_weight is None or self.stream_scale is None:
            return list(fixed)
        with torch.autocast(streams.device.type, enabled=False):
            product = F.linear(streams, self.stream_weight.to(streams.dtype)).to(wide).movedim(-1, 0).contiguous()
        norm = torch.linalg.vector_norm(streams, dim=-1, dtype=wide)
        dynamic = product * (norm.square() / streams.shape[-1] + NORM_EPS).rsqrt()
        if self.config.mixing != "birkhoff":
            dynamic = dynamic.tanh()
        scales = self.stream_scale.to(wide)
        return [b + a * z for b, a, z in zip(fixed, scales.unbind(), dynamic.split(sizes), strict=True)]


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Positive matrices [n, n, ...] with rows that sum to 1, and columns that come closer to it with each iteration."""
    relative = (logits - logits.detach().amax(1, keepdim=True)).clamp_min(LEAST_LOGIT)
    matrix = relative.softmax(1)
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix


def expand_streams(x: Tensor, num_streams: int) -> Tensor:
    """[..., D] -> [..., n D]: n copies."""
    return x.repeat(*(1,) * (x.dim() - 1), num_streams)


def merge_streams(streams: Tensor, d_model: int) -> Tensor:
    """[..., n D] -> [..., D]: their mean, and one stream as it is."""
    return streams if streams.shape[-1] == d_model else streams.unflatten(-1, (-1, d_model)).mean(-2)


def hyper_connection_flops(config: HyperConnectionConfig | None, branches: int, d_model: int) -> float:
    """Operations per token of reading, mixing and writing, and of the weights, beside the product with W."""
    if config is None:
        return 0.0
    n, iterations = config.num_streams, config.sinkhorn_iters if config.mixing == "birkhoff" else 0
    of_streams = 2 * n * d_model * (1 + n + 1) + (2 * n * d_model if config.dynamic else 0)
    return branches * (of_streams + 4 * iterations * n * n)
