"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): the cache holds a latent per token.

    C = norm(X W_C)    K, V = C W_K, C W_V    Q = X W_Q    out = softmax(Q K^T / sqrt(K + R)) V W_O

C has `latent_dim` components, for all heads together. Positions, where there are any, are of two kinds:

- `rope_dim` R: each head of queries has R more components, and all heads share R components of keys, X W_R. They alone
  rotate, and are cached beside the latent (decoupled rotary).
- rotary without `rope_dim`: the keys themselves rotate.

Decoding need not make keys and values. Without a rotation or a norm between C and the keys, q (C W_K)^T is
(q W_K^T) C^T, and the weighted sum of values is that of the latents times W_V: queries and outputs absorb the two maps,
and attention reads the latents alone, once for all heads. With a rotation or a norm of the keys, that would be another
function, and each call makes the keys and values of its whole context again (`absorbs`).
"""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retnet.layers.growth import Growths
from retnet.layers.linear import is_plain_linear
from retnet.layers.mixer_base import MixerFlops, Workload
from retnet.layers.norm import check_eps, make_norm, normed_heads
from retnet.layers.rotary import rotate_heads
from retnet.layers.softmax_attention import Entries, SoftmaxAttention, SoftmaxConfig, TokenDraft
from retnet.layers.state import TokenCache, no_tokens
from retnet.layers.tensor_parallel import Part, Split, Splits, by_rows
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.attention import cached_attention


@dataclass(frozen=True)
class LatentAttentionConfig(SoftmaxConfig):
    """The fields of `SoftmaxConfig`, where no rotation is the default, and those of the latents.

    num_kv_heads: heads of keys and values that are made of a latent. qkv_bias: of the maps of x, as DeepSeek's
    `attention_bias`. latent_dim: components of the latent. rope_dim: components that rotate, beside head_dim ones that
    do not. q_rank: components of a latent of the queries (None: queries are one map of x). latent_norm: of both
    latents.
    """

    rotary: Literal["interleaved", "half", "none"] = "none"
    _: KW_ONLY
    latent_dim: int
    rope_dim: int | None = None
    q_rank: int | None = None
    latent_norm: Literal["rms", "none"] = "none"
    latent_norm_eps: float = 1e-6
    kind: Literal["latent_attention"] = "latent_attention"

    def __post_init__(self) -> None:
        for name in ("latent_dim", "rope_dim", "q_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted: a positive integer")
        if self.rope_dim is not None and self.rotary == "none":
            raise ValueError(f"rope_dim is {self.rope_dim} with rotary 'none'; accepted: 'half' or 'interleaved'")
        if self.rope_dim is not None and self.rotary_dim is not None:
            raise ValueError(
                f"rotary_dim is {self.rotary_dim} with rope_dim; accepted: None, as rope_dim rotates alone"
            )
        check_eps(self, "latent_norm_eps")
        super().__post_init__()

    @property
    def rotated(self) -> tuple[str, int]:
        return super().rotated if self.rope_dim is None else ("rope_dim", self.rope_dim)

    @property
    def query_dim(self) -> int:
        """K + R."""
        return self.head_dim + (self.rope_dim or 0)

    @property
    def entry_dim(self) -> int:
        """L + R, what is cached per token."""
        return self.latent_dim + (self.rope_dim or 0)

    @property
    def absorbs(self) -> bool:
        """Whether keys are a linear map of the latents, so that queries can absorb it."""
        return self.qk_norm == "none" and (self.rotary == "none" or self.rope_dim is not None)

    def on_device(self, work: Workload) -> str:
        if self.absorbs:
            return "latent attention: decoding is absorbed, each token reads the cached latents alone"
        reason = "they have a norm" if self.qk_norm != "none" else "they rotate as a whole, without rope_dim"
        return f"latent attention: keys are rebuilt from the latents of the whole context at each step, as {reason}"


@dataclass
class LatentState(TokenCache):
    """latents [N, capacity, L + R] of the real tokens seen: the latent, and the rotated part of the keys after it."""

    PER_TOKEN = ("latents",)

    latents: Tensor


@dataclass
class LatentDraft(TokenDraft):
    """latents [B, T, L + R]."""

    latents: Tensor


class LatentAttention(SoftmaxAttention):
    """x [B, T, D] -> y [B, T, D], latents of the tokens seen."""

    STATE, DRAFT = LatentState, LatentDraft
    WEIGHT_ROLES: ClassVar[WeightRoles] = {
        "q_down_proj": "query_key",
        "q_proj": "query_key",
        "latent_proj": "query_key",
        "rope_key_proj": "query_key",
        "k_proj": "query_key",
        "v_proj": "value",
        "gate_proj": "value",
        "out_proj": "output",
    }
    GROWTH: ClassVar[Growths] = {"rope_key_proj": "readout"}

    def __init__(self, config: LatentAttentionConfig, d_model: int):
        super().__init__(config)
        L, R, rank, bias = config.latent_dim, config.rope_dim, config.q_rank, config.qkv_bias
        norm, eps, keys = config.latent_norm, config.latent_norm_eps, config.num_kv_heads * config.head_dim
        self.q_down_proj = None if rank is None else nn.Linear(d_model, rank, bias=bias)
        self.q_latent_norm = nn.Identity() if rank is None else make_norm(norm, rank, eps)
        self.q_proj = nn.Linear(rank or d_model, config.num_heads * config.query_dim, bias=bias and rank is None)
        self.latent_proj = nn.Linear(d_model, L, bias=bias)
        self.latent_norm = make_norm(norm, L, eps)
        self.rope_key_proj = None if R is None else nn.Linear(d_model, R, bias=bias)
        self.k_proj = nn.Linear(L, keys, bias=False)
        self.v_proj = nn.Linear(L, keys, bias=False)
        self.add_output(d_model)

    def splits(self) -> Splits:
        """Every process holds the maps to latents, which are shared by its heads and those of others."""
        config = self.config
        queries, groups = Part(config.num_heads * config.query_dim), config.groups(config.head_dim)
        latent, rotated, rank = (Part(n or 0, False) for n in (config.latent_dim, config.rope_dim, config.q_rank))
        return {
            **super().splits(), **by_rows("q_proj", queries), **by_rows("k_proj", groups), **by_rows("v_proj", groups),
            **by_rows("q_down_proj", rank), **by_rows("latent_proj", latent), **by_rows("rope_key_proj", rotated),
            "q_latent_norm.weight": Split(0, (rank,)), "latent_norm.weight": Split(0, (latent,)),
        }  # fmt: skip

    def state_splits(self) -> Splits:
        return {"latents": Split(2, (Part(self.config.entry_dim, False),))}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> LatentState:
        """The state of `batch` sequences before their first token, with room for `num_tokens` each."""
        config = self.config
        room = config.room(num_tokens)
        latents = torch.zeros(batch, room, config.entry_dim, device=device, dtype=dtype)
        return LatentState(no_tokens(batch, device), latents, filled=0)

    def projected(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Entries]:
        config = self.config
        q = self.q_proj(x if self.q_down_proj is None else self.q_latent_norm(self.q_down_proj(x)))
        q, latent = q.unflatten(-1, (-1, config.query_dim)), self.latent_norm(self.latent_proj(x))
        q, rotated = q.split((config.head_dim, q.shape[-1] - config.head_dim), -1)
        q = normed_heads(q, config.qk_norm, config.qk_norm_eps, self.q_norm_weight)
        if self.rope_key_proj is None:
            (q,) = rotate_heads(config, layout, q)
            return q, {"latents": latent}
        rotated, key = rotate_heads(config, layout, rotated, self.rope_key_proj(x)[:, :, None])
        return torch.cat((q, rotated), -1), {"latents": torch.cat((latent, key[:, :, 0]), -1)}

    def keys_values(self, entries: Entries, positions: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        config = self.config
        latent, rotated = entries["latents"].split((config.latent_dim, config.rope_dim or 0), -1)
        k, v = (proj(latent).unflatten(-1, (-1, config.head_dim)) for proj in (self.k_proj, self.v_proj))
        k = normed_heads(k, config.qk_norm, config.qk_norm_eps, self.k_norm_weight)
        if config.rope_dim is None:
            return rotate_heads(config, layout, k, positions=positions)[0], v
        return torch.cat((k, rotated[:, :, None].expand(-1, -1, k.shape[2], -1)), -1), v

    def attend_to_entries(
        self, q: Tensor, entries: Entries, positions: Tensor, key_positions: Tensor, layout: TokenLayout
    ) -> Tensor:
        if not self._absorbs(q.shape[1]):
            return super().attend_to_entries(q, entries, positions, key_positions, layout)
        config = self.config
        groups, L, latents = config.num_kv_heads, config.latent_dim, entries["latents"][:, :, None]
        to_keys, to_values = (proj.weight.view(groups, -1, L) for proj in (self.k_proj, self.v_proj))
        q, rotated = q.split((config.head_dim, q.shape[-1] - config.head_dim), -1)
        q = torch.einsum("btghk,gkl->btghl", q.unflatten(2, (groups, -1)), to_keys).flatten(2, 3)
        options = self.options(q)
        options["scale"] = config.query_dim**-0.5
        read = torch.cat((q, rotated), -1), latents, latents[..., :L]
        out = cached_attention(*read, positions, key_positions, **options).unflatten(2, (groups, -1))
        return torch.einsum("btghl,gvl->btghv", out, to_values).flatten(2, 3)

    def _absorbs(self, num_queries: int) -> bool:
        """Whether these queries absorb the maps: one always, more as long as that costs less than making keys.

        Per key, a query costs a head 2 L - K - V products more than with keys; making them costs L (K + V) per group.
        Weights that only their module can apply (adapters, quantised ones) are not absorbed.
        """
        config = self.config
        if not (config.absorbs and is_plain_linear(self.k_proj) and is_plain_linear(self.v_proj)):
            return False
        L, widths = config.latent_dim, 2 * config.head_dim
        more = num_queries * config.num_heads * (2 * L - widths)
        return num_queries == 1 or more <= config.num_kv_heads * L * widths


def latent_attention_flops(config: LatentAttentionConfig, work: Workload) -> MixerFlops:
    """Beside the maps of one token: scores and sums of the pairs, and what making keys or absorbing maps adds.

    A sequence makes the keys of its tokens once. A step reads latents with absorbed queries, whose maps cost what those
    of keys and values do per head instead of per group, or makes the keys and values of all tokens before it.
    """
    of_sequence, of_next = config.pairs(work.context)
    heads, groups, L, R = config.num_heads, config.num_kv_heads, config.latent_dim, config.rope_dim or 0
    per_pair, maps = 2 * heads * (config.query_dim + config.head_dim), 2 * L * 2 * config.head_dim
    if config.absorbs:
        step = 2 * heads * (2 * L + R) * of_next + (heads - groups) * maps
    else:
        step = per_pair * of_next + groups * maps * (of_next - 1)
    return MixerFlops(per_pair * of_sequence, step)
