"""Softmax attention with a KV cache: grouped queries, rotary or ALiBi positions, sliding windows.

    Q, K, V = X W_Q, X W_K, X W_V        out = softmax(rotary(Q) rotary(K)^T / sqrt(K) - alibi) V W_O

The KV cache holds rotated keys and values of real tokens (`TokenCache`); with a window it is a ring of at most the
window. Positions come from the layout, so padding, masked tokens and packing change no result.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retnet.layers.mixer_base import MixerFlops, Workload
from retnet.layers.norm import normed_heads
from retnet.layers.rotary import rotate_heads
from retnet.layers.softmax_attention import Entries, SoftmaxAttention, SoftmaxConfig, TokenDraft
from retnet.layers.state import TokenCache, no_tokens
from retnet.layers.tensor_parallel import Part, Split, Splits, by_rows
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles


@dataclass(frozen=True)
class AttentionConfig(SoftmaxConfig):
    """Attention to keys and values of every token; the fields are those of `SoftmaxConfig`.

    scale: of the products of queries and keys (None: head_dim ** -0.5).
    """

    scale: float | None = None
    kind: Literal["attention"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale is {self.scale}; accepted: a positive number, or None for head_dim ** -0.5")


@dataclass
class AttentionState(TokenCache):
    """keys, values [N, capacity, G, K] of the real tokens seen (with a window, the last ones).

    Keys are normed and rotated.
    """

    PER_TOKEN = ("keys", "values")

    keys: Tensor
    values: Tensor


@dataclass
class AttentionDraft(TokenDraft):
    """keys, values [B, T, G, K], rotated as in the cache."""

    keys: Tensor
    values: Tensor


class Attention(SoftmaxAttention):
    """x [B, T, D] -> y [B, T, D], keys and values of the tokens seen."""

    STATE, DRAFT = AttentionState, AttentionDraft
    WEIGHT_ROLES: ClassVar[WeightRoles] = {
        "q_proj": "query_key",
        "k_proj": "query_key",
        "v_proj": "value",
        "gate_proj": "value",
        "out_proj": "output",
    }

    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__(config)
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(d_model, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d_model, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d_model, keys, bias=config.qkv_bias)
        self.add_output(d_model)

    def splits(self) -> Splits:
        config = self.config
        queries, groups = Part(config.num_heads * config.head_dim), config.groups(config.head_dim)
        rows = {**by_rows("q_proj", queries), **by_rows("k_proj", groups), **by_rows("v_proj", groups)}
        return {**super().splits(), **rows}

    def state_splits(self) -> Splits:
        heads = Split(2, (self.config.groups(1),))
        return {"keys": heads, "values": heads}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> AttentionState:
        """The state of `batch` sequences before their first token, with room for `num_tokens` each."""
        config = self.config
        room = config.room(num_tokens)
        keys = torch.zeros(batch, room, config.num_kv_heads, config.head_dim, device=device, dtype=dtype)
        return AttentionState(no_tokens(batch, device), keys, torch.zeros_like(keys), filled=0)

    def projected(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Entries]:
        config = self.config
        q, k, v = (proj(x).unflatten(-1, (-1, config.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = normed_heads(q, config.qk_norm, config.qk_norm_eps, self.q_norm_weight)
        k = normed_heads(k, config.qk_norm, config.qk_norm_eps, self.k_norm_weight)
        q, k = rotate_heads(config, layout, q, k)
        if config.scale is not None:  # on the queries, which the operators multiply by head_dim ** -0.5
            q = q * (config.scale * config.head_dim**0.5)
        return q, {"keys": k, "values": v}

    def keys_values(self, entries: Entries, positions: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        return entries["keys"], entries["values"]


def attention_flops(config: AttentionConfig, work: Workload) -> MixerFlops:
    """q K^T and the weighted sum of values cost 4 K per pair and head."""
    of_sequence, of_next = config.pairs(work.context)
    cost = 4 * config.num_heads * config.head_dim
    return MixerFlops(cost * of_sequence, cost * of_next)
