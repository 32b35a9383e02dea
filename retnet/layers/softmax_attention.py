"""Softmax attention with a cache per token: what attention over keys and over latents share.

A mixer here gives its queries, what it caches per token, and the keys and values that these entries stand for. This
file computes attention from them in every path: whole rows, packed documents, shards of rows, one token per sequence,
and several tokens after cached ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from retnet.layers.draft import Draft, accepted
from retnet.layers.mixer_base import MixerConfig, MixerModule
from retnet.layers.norm import HeadNorm, check_eps, head_norm_weight
from retnet.layers.recompute import last_product
from retnet.layers.rotary import check_rotary, check_rotary_scaling, prepare_rotation
from retnet.layers.state import TokenCache, context_error
from retnet.layers.tensor_parallel import Part, Split, Splits, by_columns, by_rows, per_process
from retnet.layers.token_layout import TokenLayout
from retnet.ops.attention import (
    ScoreOptions,
    alibi_slopes,
    block_mask,
    cached_attention,
    causal_attention,
    flex_causal_attention,
)
from retnet.ops.context_attention import gathered_attention, row_attention
from retnet.ops.context_shard import ContextShard
from retnet.ops.dtypes import wide_dtype
from retnet.ops.ragged import equal_blocks
from retnet.ops.rotary import Llama3, Scaling, Yarn, scaling

Entries = Mapping[str, Tensor]  # what is cached of each token, by the field of the state: [B, T, ...]


@dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
    """num_kv_heads: heads of keys and values, each read by num_heads / num_kv_heads heads of queries (1: multi-query).

    head_dim: width of a head. rotary: convention of `retnet.ops.rotary`, its frequencies from rotary_base, positions
    divided by rotary_factor, or stretched by it with YaRN from rotary_yarn_length tokens; rotary_scaling, in their
    place, scales frequencies. rotary_dim: first components of a head that rotate (None: all). qk_norm: norm over each
    head of q and k before the rotation; "rms" has learnt weights, "l2" has none. gate: "sigmoid" multiplies the heads'
    outputs by sigmoid(x W) (arXiv 2505.06708). alibi: a penalty linear in the distance. window: tokens that a query
    sees, itself included (None: all). max_context: tokens of the longest sequence that the layer is defined for; longer
    ones raise ValueError. num_sinks: logits per head whose exponentials are added to the sum that divides
    the weights (`retnet.ops.attention`); learnable_sinks false: they stay 0. dropout: of attention weights, in
    training.
    """

    refused_when_split = ""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Literal["interleaved", "half", "none"] = "half"
    rotary_base: float = 10000.0
    rotary_factor: float = 1.0
    rotary_yarn_length: int | None = None
    rotary_scaling: Yarn | Llama3 | None = None
    rotary_dim: int | None = None
    qk_norm: HeadNorm = "none"
    qk_norm_eps: float = 1e-6
    gate: Literal["sigmoid", "none"] = "none"
    alibi: bool = False
    window: int | None = None
    max_context: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0
    num_sinks: int = 0
    learnable_sinks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "num_kv_heads", "head_dim", "window", "rotary_yarn_length", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted: a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; accepted: a divisor of num_heads ({self.num_heads})"
            )
        name, width = self.rotated
        if self.rotary != "none" and self.rotary_dim is None and width % 2:
            raise ValueError(f"rotary turns pairs, but {name} is {width}; accepted: an even number")
        check_rotary(self, width)
        check_eps(self, "qk_norm_eps")
        check_rotary_scaling(self.rotary_scaling, self.rotary_factor, self.rotary_yarn_length)
        if self.rotary != "none" and self.alibi:
            raise ValueError(f"alibi is true with rotary {self.rotary!r}; accepted with alibi: 'none'")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; accepted: 0 <= dropout < 1")
        if self.max_context is not None and self.window is not None:
            raise ValueError(f"max_context is {self.max_context} with window {self.window}; accepted: one of them")
        if self.num_sinks < 0:
            raise ValueError(f"num_sinks is {self.num_sinks}; accepted: 0 or more logits per head")

    @property
    def rotated(self) -> tuple[str, int]:
        """The field that is the width of what rotates in a head, and the width."""
        return "head_dim", self.head_dim

    def part(self, rank: int, size: int) -> Self:
        heads = per_process("num_heads", self.num_heads, size)
        groups = per_process("num_kv_heads", self.num_kv_heads, size, or_one=True)
        return replace(self, num_heads=heads, num_kv_heads=groups)

    @property
    def position_scaling(self) -> Scaling:
        return self.rotary_scaling or scaling(self.rotary_factor, self.rotary_yarn_length)

    @property
    def kept_tokens(self) -> float:
        return math.inf if self.window is None else self.window

    @property
    def longest_context(self) -> float:
        return math.inf if self.max_context is None else self.max_context

    def room(self, num_tokens: int) -> int:
        """Tokens that a cache for sequences of `num_tokens` has room for. Raises ValueError above max_context."""
        if num_tokens > self.longest_context:
            raise ValueError(context_error(num_tokens, int(self.longest_context)))
        return num_tokens if self.window is None else min(num_tokens, self.window)

    def groups(self, width: int) -> Part:
        """Keys or values, `width` places per head, as processes divide them: a single head is held by all."""
        return Part(self.num_kv_heads * width, self.num_kv_heads > 1)

    def pairs(self, context: int) -> tuple[float, float]:
        """Keys that a query sees: on average over a sequence of `context` tokens, and the token after it.

        Half the context on average; with a window, at most the window.
        """
        seen = min(context, self.window or context)
        whole = seen * (context - seen) + seen * (seen + 1) / 2  # full windows, and the ramp before them
        return whole / context, seen


@dataclass
class TokenDraft(Draft):
    """Base of drafts with a field [B, T, ...] per PER_TOKEN field of the state, which has room for T tokens."""

    def _write_(self, state: TokenCache, counts: Tensor) -> None:
        for name in state.PER_TOKEN:
            new: Tensor = getattr(self, name)
            stored: Tensor = getattr(state, name)
            (B, T), capacity = new.shape[:2], stored.shape[1]
            mask = accepted(counts, T).flatten().view(-1, *[1] * (new.dim() - 2))
            places = (state.position[:, None] + torch.arange(T, device=counts.device)) % capacity
            index = (torch.arange(B, device=counts.device)[:, None] * capacity + places).flatten()
            slots = stored.flatten(0, 1)
            slots.index_copy_(0, index, torch.where(mask, new.flatten(0, 1).to(slots.dtype), slots[index]))


class SoftmaxAttention(MixerModule):
    """Base of mixers x [B, T, D] -> y [B, T, D] that keep an entry per token seen. STATE, DRAFT: their classes."""

    STATE: ClassVar[type[TokenCache]]
    DRAFT: ClassVar[type[TokenDraft]]
    FLEX_DEVICES = RING_DEVICES = ("cuda",)
    FLEX_TOKENS = 128  # for fewer tokens, compiling and masking blocks costs more than it saves
    FLEX_HEAD_DIM = 16  # flex attention does not support narrower heads

    gate_proj: nn.Linear | None
    out_proj: nn.Linear

    def __init__(self, config: SoftmaxConfig):
        super().__init__()
        self.config = config
        logits = config.num_heads, config.num_sinks
        self.q_norm_weight = head_norm_weight(config.qk_norm, config.head_dim)
        self.k_norm_weight = head_norm_weight(config.qk_norm, config.head_dim)
        self.sink_logits = nn.Parameter(torch.zeros(logits)) if config.num_sinks and config.learnable_sinks else None

    def add_output(self, d_model: int) -> None:
        """Make the gate and the output projection; after the others, as weights are drawn in the order of modules."""
        config = self.config
        outputs = config.num_heads * config.head_dim
        self.gate_proj = nn.Linear(d_model, outputs, bias=False) if config.gate == "sigmoid" else None
        self.out_proj = nn.Linear(outputs, d_model, bias=config.out_bias)

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    def splits(self) -> Splits:
        config = self.config
        norm, outputs = Split(0, (Part(config.head_dim, False),)), Part(config.num_heads * config.head_dim)
        return {
            **by_rows("gate_proj", outputs), **by_columns("out_proj", outputs.size),
            "q_norm_weight": norm, "k_norm_weight": norm, "sink_logits": Split(0, (Part(config.num_heads),)),
        }  # fmt: skip

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        """Compute rotary angles and block masks that layers share."""
        if layout.mask is None:
            prepare_rotation(self.config, layout, self.config.rotated[1], dtype)
            if not layout.carry:  # with other keys to attend to, it would not be used
                self._flex_mask(layout)

    def projected(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Entries]:
        """Queries [B, T, H, K], rotated, and what is cached of these tokens."""
        raise NotImplementedError

    def keys_values(self, entries: Entries, positions: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Keys [B, S, G, K] and values [B, S, G, V] of entries [B, S, ...] at these positions."""
        raise NotImplementedError

    def attend_to_entries(
        self, q: Tensor, entries: Entries, positions: Tensor, key_positions: Tensor, layout: TokenLayout
    ) -> Tensor:
        """`cached_attention` to entries in any order: [B, T, H, V]."""
        k, v = self.keys_values(entries, key_positions, layout)
        return cached_attention(q, k, v, positions, key_positions, **self.options(q))

    def forward(
        self, x: Tensor, state: TokenCache | None, layout: TokenLayout
    ) -> tuple[Tensor, TokenCache | TokenDraft | None]:
        if layout.must_pack(state):
            return layout.on_real_tokens(self, x, state)
        self._check_context(state, layout)
        config, x = self.config, self.entered(x)
        q, new = self.projected(x, layout)
        if state is not None and layout.one_per_row and not layout.deferred:
            state = type(state).append(state, dict(new), layout, config.window, config.max_context)
            cached = {name: getattr(state, name) for name in state.PER_TOKEN}
            out = self.attend_to_entries(q, cached, layout.positions, state.slot_positions(layout), layout)
            if layout.mask is not None:
                out = out.masked_fill(~layout.mask[..., None, None], 0)
        else:
            if layout.context is not None:
                out = self._on_shard(q, *self.keys_values(new, layout.positions, layout), layout, layout.context)
            elif state is None:
                out = self._fresh(q, *self.keys_values(new, layout.positions, layout), layout)
            else:
                out = self._continued(q, new, state, layout)
            if layout.carry:
                state = self.STATE.append(state, dict(new), layout, config.window, config.max_context)
        out = out.flatten(-2)
        if self.gate_proj is not None:
            out = torch.sigmoid(self.gate_proj(x)) * out
        out = last_product(self.out_proj, out)
        if layout.deferred:
            return out, self.DRAFT(**new)
        return out, state if layout.carry else None

    def _check_context(self, state: TokenCache | None, layout: TokenLayout) -> None:
        """Raise ValueError for sequences of more than max_context tokens.

        Steps of one token need no look at the device: a cache does not grow past the limit. Drafts have their room.
        """
        limit = self.config.max_context
        if limit is None or layout.deferred or (state is not None and layout.one_per_row):
            return
        longest = layout.longest + (0 if state is None else state.bound)
        if longest > limit and state is not None:
            longest = layout.longest + state.exact_bound()
        if longest > limit:
            raise ValueError(context_error(longest, limit))

    def _on_shard(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, shard: ContextShard) -> Tensor:
        """The first sequence attends to its keys on earlier shards too, in a form of `ops/context_attention.py`."""
        options, mask = self.options(q), self._flex_mask(layout)
        if mask is not None:
            keys, values, before = shard.gathered(k), shard.gathered(v), shard.rank * shard.tokens
            return flex_causal_attention(q, keys, values, mask, options.get("slopes"), options.get("sinks"), before)
        plain = all(options.get(name) is None for name in ("window", "slopes", "sinks")) and not options.get("dropout")
        rows = shard.bounds is None and q.device.type in self.RING_DEVICES and k.shape[-1] == v.shape[-1]
        if plain and rows:
            return row_attention(q, k, v, layout.positions, shard)
        return gathered_attention(q, k, v, layout.positions, shard, **options)

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        options, mask = self.options(q), self._flex_mask(layout)
        if mask is not None:
            return flex_causal_attention(q, k, v, mask, options.get("slopes"), options.get("sinks"))
        bounds = layout.bounds
        if bounds is None:
            return causal_attention(q, k, v, **options)
        documents = [slice(start, end) for start, end in pairwise(bounds)]
        none = v.new_zeros(*q[:, :0].shape[:3], v.shape[3])
        return torch.cat([none, *(causal_attention(q[:, d], k[:, d], v[:, d], **options) for d in documents)], 1)

    def _flex_mask(self, layout: TokenLayout) -> Any:
        """The blocks that flex attention may skip; None where flex attention is not used."""
        config, positions = self.config, layout.positions
        skips = layout.cu_seqlens is not None or config.window is not None or config.alibi or config.num_sinks > 0
        flexible = config.head_dim >= self.FLEX_HEAD_DIM and not (config.dropout and self.training)
        fits = positions.device.type in self.FLEX_DEVICES and positions.shape[1] >= self.FLEX_TOKENS
        if not (skips and flexible and fits):
            return None
        window, shard = config.window, layout.context
        places = (0, None) if shard is None else (shard.rank * shard.tokens, shard.size * shard.tokens)
        return layout.shared(("block_mask", window), lambda: block_mask(layout.first_seen(window), *places))

    def _continued(self, q: Tensor, new: Entries, state: TokenCache, layout: TokenLayout) -> Tensor:
        """Several tokens after cached ones: each sequence attends to its cache and to its new tokens."""
        cached = state.slot_positions()
        out = [q.new_zeros(q.shape[0], 0, q.shape[2], self.config.head_dim)]
        for rows, tokens, sequences in equal_blocks(q.shape[0], q.shape[1], layout.bounds):
            positions = layout.positions[rows, tokens]
            entries = {
                name: torch.cat([getattr(state, name)[sequences], x[rows, tokens]], 1) for name, x in new.items()
            }
            seen = torch.cat([cached[sequences], positions], 1)
            out.append(self.attend_to_entries(q[rows, tokens], entries, positions, seen, layout))
        return torch.cat(out, 1)

    def options(self, q: Tensor) -> ScoreOptions:
        """The options of `retnet.ops.attention`."""
        config, slopes = self.config, None
        if config.alibi and self.shard is None:
            slopes = alibi_slopes(config.num_heads, q.device)
        elif config.alibi and self.shard is not None:
            every = config.num_heads * self.shard.size
            slopes = alibi_slopes(every, q.device)[self.shard.span(every)]
        dropout = config.dropout if self.training else 0.0
        return {"window": config.window, "slopes": slopes, "sinks": self._sinks(q), "dropout": dropout}

    def _sinks(self, q: Tensor) -> Tensor | None:
        """The log of the sum of a head's sinks, [H]."""
        config = self.config
        if not config.num_sinks:
            return None
        if self.sink_logits is not None:
            return self.sink_logits.to(wide_dtype(q.dtype)).logsumexp(-1)
        return torch.full((config.num_heads,), math.log(config.num_sinks), dtype=wide_dtype(q.dtype), device=q.device)
