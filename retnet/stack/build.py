"""A checked stack to the `ModelConfig` that builds it: the one place where the schema's words become the model's.

Where the schema leaves something open, the choice is made here and in docs/stack.md: rotary positions of attention pair
halves of a head, the final norm is of the last layer's kind (none after a post-norm layer), a Mamba-2 head is the
widest of 64, 32, 16, ... that divides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.moe import MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.ops.norms import Norm

from .layers import Layer
from .load import Stack
from .scalars import LARGEST, init_std
from .schema import (
    BYTES,
    DEFAULT_ROPE_THETA,
    DOCUMENT_START,
    Attention,
    Hyena,
    Mamba,
    Retnet,
    RopeScaling,
    Spec,
    TrainingHints,
)

_NORMS: dict[str, Norm] = {"rmsnorm": "rms", "layernorm": "layer"}
_ACTIVATIONS: dict[str, Literal["gelu", "relu", "swish"]] = {"gelu": "gelu", "relu": "relu", "swiglu": "swish"}
_INITS: dict[str, Literal["paper", "torchscale"]] = {"paper": "paper", "torchscale": "torchscale"}
_DEFAULT_INIT_STD = 0.02


def model_config(stack: Stack) -> ModelConfig:
    """The configuration of a stack's model. Every valid stack has one."""
    spec = stack.spec
    hints = spec.training_hints or TrainingHints()
    std = init_std(hints.init)
    return ModelConfig(
        vocab_size=spec.model.vocab_size,
        d_model=spec.model.d_model,
        layers=tuple(_block(layer, spec, hints) for layer in stack.layers),
        name=spec.model.name or "stack",
        tie_embeddings=tied(spec),
        embedding_scale=spec.embedding.scale or 1.0,
        final_norm=_final_norm(stack.layers[-1]),
        logit_soft_cap=spec.head.logit_softcap,
        init=_INITS.get(hints.init, "normal"),
        init_std=_DEFAULT_INIT_STD if std is None else std,
        seed=hints.seed,
        dtype=spec.model.dtype,
        float32_norms=spec.compatibility is not None and spec.compatibility.dtype_policy == "layered_safe",
        gradient_checkpointing=hints.checkpointing,
        source=stack.text,
        bos_token_id=DOCUMENT_START if spec.tokenizer_contract.pretrained == BYTES else None,
    )


def tied(spec: Spec) -> bool:
    """Whether the head is the embedding: what the file says in one place or (the same) in both."""
    if "tie_word_embeddings" in spec.embedding.model_fields_set:
        return spec.embedding.tie_word_embeddings
    return spec.head.tie_weights


def _final_norm(last: Layer) -> Norm | Literal["none"]:
    return "none" if last.norm.position == "post" else _NORMS[last.norm.type]


def _block(layer: Layer, spec: Spec, hints: TrainingHints) -> BlockConfig:
    return BlockConfig(
        mixer=_MIXERS[type(layer.mixer)](layer.mixer, spec),
        feed_forward=_feed_forward(layer, spec, hints),
        norm=_NORMS[layer.norm.type],
        norm_position=layer.norm.position,
        residual=layer.residual.type,
        residual_scale=layer.residual.scaling,
        dropout=hints.dropout,
        keeps_state=layer.keeps_state,
    )


@dataclass(frozen=True)
class _Positions:
    """How attention and retention rotate. YaRN stretches to max_seq_len, from max_seq_len / factor."""

    base: float
    factor: float
    yarn_length: int | None

    @classmethod
    def of(cls, spec: Spec) -> "_Positions":
        scaling = spec.embedding.rope_scaling or RopeScaling()
        length = None
        if scaling.type == "yarn":
            length = max(1, round(min(spec.model.max_seq_len / scaling.factor, LARGEST)))
        return cls(spec.embedding.rope_theta or DEFAULT_ROPE_THETA, scaling.factor, length)


def _attention(mixer: Attention, spec: Spec) -> AttentionConfig:
    positional, positions = spec.embedding.positional, _Positions.of(spec)
    return AttentionConfig(
        num_heads=spec.model.n_heads,
        num_kv_heads=spec.model.kv_heads,
        head_dim=spec.model.head_dim,
        rotary="half" if positional == "rope" else "none",
        alibi=positional == "alibi",
        window=mixer.window,
        qkv_bias=mixer.qkv_bias,
        dropout=mixer.attn_drop,
        rotary_base=positions.base,
        rotary_factor=positions.factor,
        rotary_yarn_length=positions.yarn_length,
    )


def _retention(mixer: Retnet, spec: Spec) -> RetentionConfig:
    positions = _Positions.of(spec)
    return RetentionConfig(
        num_heads=spec.model.n_heads,
        key_dim=mixer.key_dim or spec.model.d_model,
        value_dim=mixer.value_dim or 2 * spec.model.d_model,
        decay=mixer.decay,
        learnable_decay=mixer.learnable_decay,
        decay_norm=mixer.decay_norm,
        rotary=mixer.rotary if mixer.rope else "none",
        gate=mixer.gate,
        head_norm=mixer.head_norm,
        head_norm_affine=mixer.head_norm_affine,
        head_norm_eps=mixer.head_norm_eps,
        mode="chunkwise" if mixer.chunkwise else "parallel",
        chunk_size=mixer.chunk_size,
        rotary_base=positions.base,
        rotary_factor=positions.factor,
        rotary_yarn_length=positions.yarn_length,
    )


def mamba2_head_dim(inner_dim: int) -> int:
    """The widest of 64, 32, 16, ... that divides: the schema has no key for it."""
    return next(width for width in (64, 32, 16, 8, 4, 2, 1) if inner_dim % width == 0)


def _mamba(mixer: Mamba, spec: Spec) -> Mamba1Config | Mamba2Config:
    inner_dim = spec.model.d_model * mixer.expand
    if mixer.variant == "mamba1":
        rank = math.ceil(spec.model.d_model / 16)  # as the paper's code has it
        return Mamba1Config(inner_dim, rank, state_dim=mixer.d_state, conv_width=mixer.d_conv)
    return Mamba2Config(
        inner_dim,
        head_dim=mixer.head_dim or mamba2_head_dim(inner_dim),
        state_dim=mixer.d_state,
        conv_width=mixer.d_conv,
    )


def _hyena(mixer: Hyena, spec: Spec) -> HyenaConfig:
    return HyenaConfig(order=mixer.depth, filter_hidden=mixer.filter_hidden, filter_decay=mixer.filter_decay)


_MIXERS: dict[type, Callable[[Any, Spec], Any]] = {
    Attention: _attention,
    Mamba: _mamba,
    Retnet: _retention,
    Hyena: _hyena,
}


def _feed_forward(layer: Layer, spec: Spec, hints: TrainingHints) -> FeedForwardConfig | MoEConfig:
    hidden, activation = spec.model.d_model * spec.model.mlp_ratio, _ACTIVATIONS[layer.activation]
    moe = layer.ffn.moe
    if moe is None:
        gated = layer.ffn.type == "gated_mlp"
        return FeedForwardConfig(hidden, gated=gated, activation=activation, bias=layer.ffn.bias)
    balance = hints.router_aux_loss_coef if moe.load_balance_coef is None else moe.load_balance_coef
    return MoEConfig(
        num_experts=moe.experts,
        top_k=moe.top_k,
        hidden_dim=hidden,
        gated=layer.activation == "swiglu",
        activation=activation,
        bias=layer.ffn.bias,
        router=moe.router,
        capacity_factor=moe.capacity_factor,
        capacity_policy=moe.capacity_drop_policy,
        load_balance_coef=balance,
        z_loss_coef=moe.z_loss,
        router_jitter=moe.router_jitter,
        router_init_std=moe.router_init_std,
    )
