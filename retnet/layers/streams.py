"""Parallel streams of blocks: each reads the same input, and one layer's output is what they are merged to.

    h_i = blocks_i(x)        concat  y = [h_1, ..., h_n] W        add  y = sum_i h_i
                             gate    y = sum_i g_i h_i            g = softmax(x W_g)
                             cross   y = h_q + attention of h_q's tokens to those of h_s before and at them

The blocks have residuals of their own, so a block whose mixer this is adds nothing to the merge: its `skip_scale` is 0
and its `norm` "none" (`streams_block`). To the rest of the package the streams are one mixer, made of the mixers of all
their blocks, with the feed-forwards among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from retnet.layers.attention import Attention, AttentionConfig
from retnet.layers.block import Block, BlockConfig, connect_streams
from retnet.layers.composed import ComposedConfig, ComposedDraft, ComposedModule, ComposedState, composed_flops
from retnet.layers.growth import Growths
from retnet.layers.hyper_connection import hyper_connection_flops
from retnet.layers.linear import WideLinear
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.moe import MoEConfig
from retnet.layers.softmax_attention import Entries
from retnet.layers.tensor_parallel import Splits, TensorParallel
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.tensor_shard import TensorShard

MOST_BLOCKS = 4096


@dataclass(frozen=True)
class StreamsConfig(ComposedConfig):
    """streams: the blocks of each, in the order of their states. merge: of the streams' outputs.

    cross, cross_streams: with merge "cross", the attention, and the numbers (q, s) of the streams that its queries, and
    its keys and values, are of. Its positions are those of the streams: rotary "none", and no alibi.
    """

    streams: tuple[tuple[BlockConfig, ...], ...]
    merge: Literal["concat", "add", "gate", "cross"] = "concat"
    cross: AttentionConfig | None = None
    cross_streams: tuple[int, ...] = ()
    kind: Literal["streams"] = "streams"

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", tuple(map(tuple, self.streams)))
        if len(self.streams) < 2 or not all(self.streams):
            lengths = [len(stream) for stream in self.streams]
            raise ValueError(f"streams have {lengths} blocks; accepted: at least two streams of at least one block")
        if len(self.blocks) > MOST_BLOCKS:
            raise ValueError(f"streams have {len(self.blocks)} blocks together; accepted: at most {MOST_BLOCKS}")
        for block in self.blocks:
            if isinstance(block.mixer, StreamsConfig):
                raise ValueError("a stream has streams in it; accepted: blocks of other mixers")
        object.__setattr__(self, "cross_streams", tuple(self.cross_streams))
        self._check_cross()
        super().__post_init__()
        if any(isinstance(block.feed_forward, MoEConfig) for block in self.blocks):
            reasons = {
                "refused_on_shards": "it contains a mixture of experts, whose balance is that of whole rows",
                "refused_when_split": "it contains a mixture of experts, which is not divided",
            }
            for name, reason in reasons.items():
                object.__setattr__(self, name, getattr(self, name) or reason)

    def _check_cross(self) -> None:
        cross, pair = self.cross, self.cross_streams
        if (cross is not None) != (self.merge == "cross"):
            given = "given" if cross is not None else "None"
            raise ValueError(f"cross is {given} with merge {self.merge!r}; accepted: attention with 'cross' alone")
        known = len(set(pair)) == 2 == len(pair) and all(0 <= i < len(self.streams) for i in pair)
        if known != (cross is not None) or (pair and cross is None):
            raise ValueError(
                f"cross_streams is {pair} with merge {self.merge!r}; accepted: two numbers of streams with 'cross', ()"
            )
        if cross is None:
            return
        if cross.rotary != "none" or cross.alibi or cross.qk_norm != "none" or cross.gate != "none":
            raise ValueError(
                f"cross has rotary {cross.rotary!r}, alibi {cross.alibi}, qk_norm {cross.qk_norm!r}, gate "
                f"{cross.gate!r}; accepted between streams: 'none', False, 'none', 'none'"
            )

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        return tuple(block for stream in self.streams for block in stream)

    @property
    def inside(self) -> tuple[MixerConfig, ...]:
        return tuple(block.mixer for block in self.blocks) + (() if self.cross is None else (self.cross,))

    @property
    def depth(self) -> int:
        return max(map(len, self.streams))

    def idle_parameters(self, d_model: int) -> int:
        feed_forwards = (block.feed_forward for block in self.blocks)
        return sum(each.idle_parameters(d_model) for each in feed_forwards if each is not None)

    def with_blocks(self, blocks: Iterator[BlockConfig]) -> Self:
        """These streams of other blocks, given in the order of `blocks`."""
        return replace(self, streams=tuple(tuple(next(blocks) for _ in stream) for stream in self.streams))

    def part(self, rank: int, size: int) -> Self:
        def own(block: BlockConfig) -> BlockConfig:
            feed_forward = block.feed_forward
            if isinstance(feed_forward, MoEConfig):
                raise ValueError(self.refused_when_split)
            part = None if feed_forward is None else feed_forward.part(rank, size)
            return replace(block, mixer=block.mixer.part(rank, size), feed_forward=part)

        cross = None if self.cross is None else self.cross.part(rank, size)
        return replace(self.with_blocks(map(own, self.blocks)), cross=cross)

    def for_export(self, one_token: bool) -> Self | None:
        mixers = [block.mixer.for_export(one_token) for block in self.blocks]
        if None in mixers or self.cross is not None:
            return None
        pairs = zip(self.blocks, cast(list[MixerConfig], mixers), strict=True)
        return self.with_blocks(replace(block, mixer=mixer) for block, mixer in pairs)


def streams_block(config: StreamsConfig) -> BlockConfig:
    """The layer whose output is the merge of the streams."""
    keeps_state = all(block.keeps_state for block in config.blocks)
    return BlockConfig(config, None, norm="none", skip_scale=0.0, keeps_state=keeps_state)


class StreamsState(ComposedState):
    """The states of all blocks, stream after stream."""


class StreamsDraft(ComposedDraft):
    """The drafts of all blocks, stream after stream."""


class CrossAttention(Attention):
    """x [B, T, 2 D], two streams side by side -> y [B, T, D]: queries of the first, keys and values of the second."""

    def projected(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Entries]:
        target, source = x.chunk(2, -1)
        q, k, v = self.q_proj(target), self.k_proj(source), self.v_proj(source)
        q, k, v = (z.unflatten(-1, (-1, self.config.head_dim)) for z in (q, k, v))
        return q, {"keys": k, "values": v}


class Streams(ComposedModule):
    """x [B, T, D] -> y [B, T, D], the states of all blocks."""

    STATE, DRAFT = StreamsState, StreamsDraft
    RECOMPUTES_ITSELF = True
    WEIGHT_ROLES: ClassVar[WeightRoles] = {"merge_proj": "other"}  # a gate is as a router: AdamW trains it
    GROWTH: ClassVar[Growths] = {"gate_proj": "readout"}

    def __init__(self, config: StreamsConfig, d_model: int):
        super().__init__()
        self.config = config
        count = len(config.streams)
        self.streams = nn.ModuleList(
            nn.ModuleList(Block(block, d_model) for block in stream) for stream in config.streams
        )
        for stream in cast(Any, self.streams):
            connect_streams(stream)
        self.merge_proj = nn.Linear(count * d_model, d_model, bias=False) if config.merge == "concat" else None
        self.gate_proj = WideLinear(d_model, count, bias=False) if config.merge == "gate" else None
        self.cross = None if config.cross is None else CrossAttention(config.cross, d_model)

    def inside(self) -> dict[str, MixerModule]:
        mixers: dict[str, MixerModule] = {f"{path}.mixer": block.mixer for path, block in self._blocks().items()}
        return mixers if self.cross is None else {**mixers, "cross": self.cross}

    def _blocks(self) -> dict[str, Block]:
        streams = enumerate(cast(Any, self.streams))
        return {f"streams.{i}.{j}": block for i, stream in streams for j, block in enumerate(stream)}

    def _feed_forwards(self) -> dict[str, TensorParallel]:
        """Those that can be divided."""
        found = {f"{path}.feed_forward": block.feed_forward for path, block in self._blocks().items()}
        return {path: module for path, module in found.items() if isinstance(module, TensorParallel)}

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        for block in self._blocks().values():
            block.prepare(layout, dtype)
        if self.cross is not None:
            self.cross.prepare(layout, dtype)

    def splits(self) -> Splits:
        fed = self._feed_forwards().items()
        return {
            **super().splits(),
            **{f"{path}.{name}": split for path, m in fed for name, split in m.splits().items()},
        }

    def split_(self, shard: TensorShard) -> None:
        super().split_(shard)
        for module in self._feed_forwards().values():
            module.split_(shard)

    def forward(
        self, x: Tensor, state: StreamsState | None, layout: TokenLayout
    ) -> tuple[Tensor, ComposedState | ComposedDraft | None]:
        outs, results = [], []
        for stream in cast(Any, self.streams):
            h = x
            for block in stream:
                h, result = block(h, None if state is None else state.states[len(results)], layout)
                results.append(result)
            outs.append(h)
        if self.cross is None:
            return self._merged(x, outs), self.composed(results, layout)
        target, source = (outs[i] for i in self.config.cross_streams)
        before = None if state is None else state.states[len(results)]
        y, result = self.cross(torch.cat([target, source], -1), before, layout)
        return target + y, self.composed([*results, result], layout)

    def _merged(self, x: Tensor, outs: list[Tensor]) -> Tensor:
        if self.merge_proj is not None:
            return self.merge_proj(torch.cat(outs, -1))
        if self.gate_proj is not None:
            gates = self.gate_proj(x).softmax(-1).to(x.dtype)
            outs = [gate[..., None] * out for gate, out in zip(gates.unbind(-1), outs, strict=True)]
        return sum(outs[1:], outs[0])


def streams_flops(config: StreamsConfig, work: Workload) -> MixerFlops:
    """The operations of all mixers and hyper-connections, and a multiply-add per stream and channel."""
    flops, more = composed_flops(config.inside, work), 2 * len(config.streams) * work.d_model
    if config.merge == "concat":  # a product, which counts as the weight that it is
        more = 0
    more += sum(hyper_connection_flops(block.hyper, block.num_branches, work.d_model) for block in config.blocks)
    return MixerFlops(flops.forward + more, flops.decode + more)
