"""Softmax attention with a KV cache: grouped queries, rotary or ALiBi positions, sliding windows.

    Q, K, V = X W_Q, X W_K, X W_V        out = softmax(rotary(Q) rotary(K)^T / sqrt(K) - alibi) V W_O

The KV cache holds rotated keys and values of real tokens (`TokenCache`); with a window it is a ring of at most the
window. Positions come from the layout, so padding, masked tokens and packing change no result.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from retnet.layers.draft import Draft, accepted
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.norm import HeadNorm, check_eps, head_norm_weight, normed_heads
from retnet.layers.recompute import last_product
from retnet.layers.rotary import check_rotary, prepare_rotation, rotate_heads
from retnet.layers.state import TokenCache, no_tokens
from retnet.layers.tensor_parallel import Part, Split, Splits, by_columns, by_rows, per_process
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.attention import (
    alibi_slopes,
    block_mask,
    cached_attention,
    causal_attention,
    flex_causal_attention,
)
from retnet.ops.context_attention import gathered_attention, row_attention
from retnet.ops.context_shard import ContextShard
from retnet.ops.ragged import equal_blocks
from retnet.ops.rotary import Llama3, Scaling, Yarn, scaling
from retnet.system.choices import check_choices


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """num_kv_heads: heads of keys and values, each read by num_heads / num_kv_heads heads of queries (1: multi-query).

    head_dim: width of a head. rotary: convention of `retnet.ops.rotary`, its frequencies from rotary_base, positions
    divided by rotary_factor, or stretched by it with YaRN from rotary_yarn_length tokens; rotary_scaling, in their
    place, scales frequencies. rotary_dim: first components of a head that rotate (None: all). qk_norm: norm over each
    head of q and k before the rotation; "rms" has learnt weights, "l2" has none. gate: "sigmoid" multiplies the heads'
    outputs by sigmoid(x W) (arXiv 2505.06708). alibi: a penalty linear in the distance. window: tokens that a query
    sees, itself included (None: all). dropout: of attention weights, in training.
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
    qkv_bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0
    kind: Literal["attention"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "num_kv_heads", "head_dim", "window", "rotary_yarn_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted: a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; accepted: a divisor of num_heads ({self.num_heads})"
            )
        if self.rotary != "none" and self.rotary_dim is None and self.head_dim % 2:
            raise ValueError(f"rotary turns pairs, but head_dim is {self.head_dim}; accepted: an even number")
        check_rotary(self, self.head_dim)
        check_eps(self, "qk_norm_eps")
        if self.rotary_scaling is not None:
            check_choices(self.rotary_scaling)
        if self.rotary_scaling is not None and (self.rotary_factor != 1.0 or self.rotary_yarn_length is not None):
            raise ValueError("rotary_scaling is given with rotary_factor or rotary_yarn_length; accepted: one of them")
        if self.rotary != "none" and self.alibi:
            raise ValueError(f"alibi is true with rotary {self.rotary!r}; accepted with alibi: 'none'")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; accepted: 0 <= dropout < 1")

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


@dataclass
class AttentionState(TokenCache):
    """keys, values [N, capacity, G, K] of the real tokens seen (with a window, the last ones).

    Keys are normed and rotated.
    """

    PER_TOKEN = ("keys", "values")

    keys: Tensor
    values: Tensor


@dataclass
class AttentionDraft(Draft):
    """keys, values [B, T, G, K], rotated as in the cache, which has room for at least T tokens."""

    keys: Tensor
    values: Tensor

    def _write_(self, state: AttentionState, counts: Tensor) -> None:
        (B, T), capacity = self.keys.shape[:2], state.keys.shape[1]
        mask = accepted(counts, T).flatten()[:, None, None]
        device = counts.device
        places = (state.position[:, None] + torch.arange(T, device=device)) % capacity
        index = (torch.arange(B, device=device)[:, None] * capacity + places).flatten()
        for slots, new in ((state.keys.flatten(0, 1), self.keys), (state.values.flatten(0, 1), self.values)):
            slots.index_copy_(0, index, torch.where(mask, new.flatten(0, 1).to(slots.dtype), slots[index]))


class Attention(MixerModule):
    """x [B, T, D] -> y [B, T, D], keys and values of the tokens seen."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {
        "q_proj": "query_key",
        "k_proj": "query_key",
        "v_proj": "value",
        "gate_proj": "value",
        "out_proj": "output",
    }
    FLEX_DEVICES = RING_DEVICES = ("cuda",)
    FLEX_TOKENS = 128  # for fewer tokens, compiling and masking blocks costs more than it saves
    FLEX_HEAD_DIM = 16  # flex attention does not support narrower heads

    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(d_model, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d_model, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d_model, keys, bias=config.qkv_bias)
        self.q_norm_weight = head_norm_weight(config.qk_norm, config.head_dim)
        self.k_norm_weight = head_norm_weight(config.qk_norm, config.head_dim)
        self.gate_proj = nn.Linear(d_model, queries, bias=False) if config.gate == "sigmoid" else None
        self.out_proj = nn.Linear(queries, d_model, bias=config.out_bias)

    def splits(self) -> Splits:
        config = self.config
        queries, groups = Part(config.num_heads * config.head_dim), _groups(config, config.head_dim)
        norm = Split(0, (Part(config.head_dim, False),))
        return {
            **by_rows("q_proj", queries), **by_rows("k_proj", groups), **by_rows("v_proj", groups),
            **by_rows("gate_proj", queries), **by_columns("out_proj", queries.size),
            "q_norm_weight": norm, "k_norm_weight": norm,
        }  # fmt: skip

    def state_splits(self) -> Splits:
        heads = Split(2, (_groups(self.config, 1),))
        return {"keys": heads, "values": heads}

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        """Compute rotary angles and block masks that layers share."""
        if layout.mask is None:
            prepare_rotation(self.config, layout, self.config.head_dim, dtype)
            if not layout.carry:  # with other keys to attend to, it would not be used
                self._flex_mask(layout)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> AttentionState:
        """The state of `batch` sequences before their first token, with room for `num_tokens` each."""
        config = self.config
        room = num_tokens if config.window is None else min(num_tokens, config.window)
        keys = torch.zeros(batch, room, config.num_kv_heads, config.head_dim, device=device, dtype=dtype)
        return AttentionState(no_tokens(batch, device), keys, torch.zeros_like(keys), filled=0)

    def forward(
        self, x: Tensor, state: AttentionState | None, layout: TokenLayout
    ) -> tuple[Tensor, AttentionState | AttentionDraft | None]:
        if layout.must_pack(state):
            return layout.on_real_tokens(self, x, state)
        config, x = self.config, self.entered(x)
        q, k, v = (proj(x).unflatten(-1, (-1, config.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = normed_heads(q, config.qk_norm, config.qk_norm_eps, self.q_norm_weight)
        k = normed_heads(k, config.qk_norm, config.qk_norm_eps, self.k_norm_weight)
        q, k = rotate_heads(config, layout, q, k)
        if state is not None and layout.one_per_row and not layout.deferred:
            state = AttentionState.append(state, {"keys": k, "values": v}, layout, config.window)
            out = cached_attention(
                q, state.keys, state.values, layout.positions, state.slot_positions(layout), **self._options(q)
            )
            if layout.mask is not None:
                out = out.masked_fill(~layout.mask[..., None, None], 0)
        else:
            if layout.context is not None:
                out = self._on_shard(q, k, v, layout, layout.context)
            else:
                out = self._fresh(q, k, v, layout) if state is None else self._continued(q, k, v, state, layout)
            if layout.carry:
                state = AttentionState.append(state, {"keys": k, "values": v}, layout, config.window)
        out = out.flatten(-2)
        if self.gate_proj is not None:
            out = torch.sigmoid(self.gate_proj(x)) * out
        out = last_product(self.out_proj, out)
        if layout.deferred:
            return out, AttentionDraft(k, v)
        return out, state if layout.carry else None

    def _on_shard(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, shard: ContextShard) -> Tensor:
        """The first sequence attends to its keys on earlier shards too, in a form of `ops/context_attention.py`."""
        options, mask = self._options(q), self._flex_mask(layout)
        if mask is not None:
            keys, values = shard.gathered(k), shard.gathered(v)
            return flex_causal_attention(q, keys, values, mask, options["slopes"], shard.rank * shard.tokens)
        plain = options["window"] is None and options["slopes"] is None and not options["dropout"]
        rows = shard.bounds is None and q.device.type in self.RING_DEVICES
        if plain and rows:
            return row_attention(q, k, v, layout.positions, shard)
        return gathered_attention(q, k, v, layout.positions, shard, **options)

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        options, mask = self._options(q), self._flex_mask(layout)
        if mask is not None:
            return flex_causal_attention(q, k, v, mask, options["slopes"])
        bounds = layout.bounds
        if bounds is None:
            return causal_attention(q, k, v, **options)
        documents = [slice(start, end) for start, end in pairwise(bounds)]
        return torch.cat([q[:, :0], *(causal_attention(q[:, d], k[:, d], v[:, d], **options) for d in documents)], 1)

    def _flex_mask(self, layout: TokenLayout):
        """The blocks that flex attention may skip; None where flex attention is not used."""
        config, positions = self.config, layout.positions
        skips = layout.cu_seqlens is not None or config.window is not None or config.alibi
        flexible = config.head_dim >= self.FLEX_HEAD_DIM and not (config.dropout and self.training)
        fits = positions.device.type in self.FLEX_DEVICES and positions.shape[1] >= self.FLEX_TOKENS
        if not (skips and flexible and fits):
            return None
        window, shard = config.window, layout.context
        places = (0, None) if shard is None else (shard.rank * shard.tokens, shard.size * shard.tokens)
        return layout.shared(("block_mask", window), lambda: block_mask(layout.first_seen(window), *places))

    def _continued(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, layout: TokenLayout) -> Tensor:
        """Several tokens after cached ones: each sequence attends to its cache and to its new tokens."""
        options, cached = self._options(q), state.slot_positions()
        out = [q[:, :0]]
        for rows, tokens, sequences in equal_blocks(q.shape[0], q.shape[1], layout.bounds):
            positions = layout.positions[rows, tokens]
            out.append(
                cached_attention(
                    q[rows, tokens],
                    torch.cat([state.keys[sequences], k[rows, tokens]], 1),
                    torch.cat([state.values[sequences], v[rows, tokens]], 1),
                    positions,
                    torch.cat([cached[sequences], positions], 1),
                    **options,
                )
            )
        return torch.cat(out, 1)

    def _options(self, q: Tensor) -> dict:
        config, slopes = self.config, None
        if config.alibi and self.shard is None:
            slopes = alibi_slopes(config.num_heads, q.device)
        elif config.alibi and self.shard is not None:
            every = config.num_heads * self.shard.size
            slopes = alibi_slopes(every, q.device)[self.shard.span(every)]
        return {"window": config.window, "slopes": slopes, "dropout": config.dropout if self.training else 0.0}


def _groups(config: AttentionConfig, width: int) -> Part:
    """Heads of keys and values, `width` places each, as processes divide them: a single head is held by all."""
    return Part(config.num_kv_heads * width, config.num_kv_heads > 1)


def attention_flops(config: AttentionConfig, work: Workload) -> MixerFlops:
    """q K^T and the weighted sum of values cost 4 K per pair and head. A query sees half the context on average; with
    a window, at most the window."""
    H, K, T = config.num_heads, config.head_dim, work.context
    seen = min(T, config.window or T)
    pairs = seen * (T - seen) + seen * (seen + 1) / 2  # of the whole sequence: full windows, and the ramp before them
    return MixerFlops(4 * H * K * pairs / T, 4 * H * K * seen)
