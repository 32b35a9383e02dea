"""The `ModelConfig` of a checked stack. Each mixer's own mapping is in `mixers`.

The schema has no final norm: it is of the same type as the last layer's norm, and absent after a post-norm layer.
"""

from typing import Literal

from retnet.data.tokenizer import BYTES, DOCUMENT_START
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.moe import MoEConfig
from retnet.layers.multi_token import MultiTokenConfig
from retnet.layers.streams import StreamsConfig, streams_block
from retnet.models.config import ModelConfig
from retnet.models.mup import with_mup
from retnet.ops.norms import Norm

from .layers import Layer, multi_token_layer, one_per_entry
from .load import Stack
from .scalars import init_std
from .schema import Spec, TrainingHints

_NORMS: dict[str, Norm] = {"rmsnorm": "rms", "layernorm": "layer"}
_ACTIVATIONS: dict[str, Literal["gelu", "relu", "swish"]] = {"gelu": "gelu", "relu": "relu", "swiglu": "swish"}
_INITS: dict[str, Literal["paper", "torchscale"]] = {"paper": "paper", "torchscale": "torchscale"}
_DEFAULT_INIT_STD = 0.02


def model_config(stack: Stack) -> ModelConfig:
    """The configuration of a stack's model. It exists for every valid stack."""
    spec = stack.spec
    hints = spec.training_hints or TrainingHints()
    std = init_std(hints.init)
    blocks = {layer.entry: block_of(layer, spec) for layer in one_per_entry(stack.layers)}
    config = ModelConfig(
        vocab_size=spec.model.vocab_size,
        d_model=spec.model.d_model,
        layers=tuple(blocks[layer.entry] for layer in stack.layers),
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
        mtp=_multi_token(spec),
        source=stack.text,
        bos_token_id=DOCUMENT_START if spec.tokenizer_contract.pretrained == BYTES else None,
    )
    return config if hints.mup is None else with_mup(config, hints.mup.base_width, hints.mup.base_head_dim)


def tied(spec: Spec) -> bool:
    """Whether the head is the embedding, as the file says under `embedding` or under `head`."""
    if "tie_word_embeddings" in spec.embedding.model_fields_set:
        return spec.embedding.tie_word_embeddings
    return spec.head.tie_weights


def _final_norm(last: Layer) -> Norm | Literal["none"]:
    return "none" if last.norm.position == "post" else _NORMS[last.norm.type]


def _multi_token(spec: Spec) -> MultiTokenConfig | None:
    mtp, layer = spec.head.mtp, multi_token_layer(spec)
    if mtp is None or layer is None:
        return None
    return MultiTokenConfig(
        block_of(layer, spec),
        num_modules=mtp.n_predict,
        num_blocks=mtp.head_layers,
        loss_weight=mtp.train_loss_weight,
        norm=_NORMS[layer.norm.type],
    )


def block_of(layer: Layer, spec: Spec) -> BlockConfig:
    """The block that a layer is."""
    hints, mixer = spec.training_hints or TrainingHints(), layer.mixer.config(spec)
    if isinstance(mixer, StreamsConfig):
        return streams_block(mixer)
    hyper = layer.residual.hyper
    return BlockConfig(
        mixer=mixer,
        feed_forward=_feed_forward(layer, spec, hints),
        norm=_NORMS[layer.norm.type],
        norm_position=layer.norm.position,
        residual="parallel" if layer.residual.type == "parallel" else "sequential",
        residual_scale=layer.residual.scaling,
        dropout=hints.dropout,
        keeps_state=layer.keeps_state,
        hyper=hyper.config() if hyper else None,
    )


def _feed_forward(layer: Layer, spec: Spec, hints: TrainingHints) -> FeedForwardConfig | MoEConfig:
    assert layer.ffn is not None
    hidden, activation = spec.model.d_model * spec.model.mlp_ratio, _ACTIVATIONS[layer.activation]
    moe = layer.ffn.moe
    if moe is None:
        gated = layer.ffn.type == "gated_mlp"
        return FeedForwardConfig(hidden, gated=gated, activation=activation, bias=layer.ffn.bias)
    return moe.config(
        hidden_dim=hidden,
        balance_coef=hints.router_aux_loss_coef,
        gated=layer.activation == "swiglu",
        activation=activation,
        bias=layer.ffn.bias,
    )
