"""What a model costs: parameters, floating-point operations a token, bytes of state, how far each head sees.

A multiply-add is two operations. Every weight matrix that a token meets costs 2 operations an element forward and twice
that again backward. What a mixer does beside its projections is counted by one function a mixer, below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.moe import MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.ops.decay import window

POSITION_BYTES = 8  # every layer's state counts tokens in int64


@dataclass(frozen=True)
class MixerCost:
    """One layer's mixing beside its projections, at a context of T tokens.

    forward_flops: a token, in training over a whole sequence. decode_flops: for the next token. state_bytes: carried.
    """

    forward_flops: float
    decode_flops: float
    state_bytes: int


@dataclass(frozen=True)
class ModelCost:
    """Totals of a model at a context of T tokens; operations are for one token of one sequence."""

    parameters: int
    embedding_parameters: int
    forward_flops: float
    training_flops: float
    decode_flops: float
    state_bytes: int


def retention_cost(mixer: RetentionConfig, d_model: int, context: int, value_bytes: int) -> MixerCost:
    """H heads: S += k^T v and q S are 4 K V; inside a chunk of C tokens the causal half costs C (K + V)."""
    H, K, V = mixer.num_heads, mixer.head_key_dim, mixer.head_value_dim
    chunk = min(context, mixer.chunk_size or 128)
    if mixer.mode == "parallel":
        forward = H * context * (K + V)
    else:
        forward = H * (4 * K * V + chunk * (K + V))
    return MixerCost(forward, H * 4 * K * V, H * K * V * max(4, value_bytes) + POSITION_BYTES)


def attention_cost(mixer: AttentionConfig, d_model: int, context: int, value_bytes: int) -> MixerCost:
    """H heads: q K^T and the weighted sum of values are 4 K a pair; a query meets half the context, or its window."""
    H, K = mixer.num_heads, mixer.head_dim
    seen = min(context, mixer.window or context)
    pairs = seen * (context - seen) + seen * (seen + 1) / 2  # of the whole sequence: full windows, then the ramp before
    kept = 2 * mixer.num_kv_heads * K * seen * value_bytes
    return MixerCost(4 * H * K * pairs / context, 4 * H * K * seen, kept + POSITION_BYTES)


def mamba2_cost(mixer: Mamba2Config, d_model: int, context: int, value_bytes: int) -> MixerCost:
    """Retention of H heads, K = state_dim and V = head_dim, after a short convolution of W taps on every channel."""
    H, K, V, W = mixer.num_heads, mixer.state_dim, mixer.head_dim, mixer.conv_width
    chunk = min(context, mixer.chunk_size or 128)
    taps = 2 * W * mixer.conv_dim
    recent = (W - 1) * mixer.conv_dim * value_bytes
    state = H * K * V * max(4, value_bytes) + recent + POSITION_BYTES
    return MixerCost(H * (4 * K * V + chunk * (K + V)) + taps, H * 4 * K * V + taps, state)


def mamba1_cost(mixer: Mamba1Config, d_model: int, context: int, value_bytes: int) -> MixerCost:
    """N states for each of D channels, two multiply-adds and a product each, after a short convolution of W taps."""
    D, N, W = mixer.inner_dim, mixer.state_dim, mixer.conv_width
    flops = 6 * D * N + 2 * W * D
    return MixerCost(flops, flops, D * N * max(4, value_bytes) + (W - 1) * D * value_bytes + POSITION_BYTES)


def hyena_cost(mixer: HyenaConfig, d_model: int, context: int, value_bytes: int) -> MixerCost:
    """`order` long convolutions of every channel: three Fourier transforms of 2 T points (2.5 n log2 n operations each)
    over a sequence of T, a dot product with the whole past for a new token. Its filters are made once for all sequences
    and not counted."""
    long, short = mixer.order * d_model, (mixer.order + 1) * d_model
    taps = 2 * mixer.conv_width * short
    forward = long * 15 * math.log2(2 * context) + taps
    kept = (long * context + (mixer.conv_width - 1) * short) * value_bytes
    return MixerCost(forward, 2 * long * context + taps, kept + POSITION_BYTES)


# mixer's config class -> its cost in a model of width D, at a context, with activations of so many bytes each
MIXER_COSTS: dict[type, Callable[..., MixerCost]] = {
    RetentionConfig: retention_cost,
    AttentionConfig: attention_cost,
    Mamba1Config: mamba1_cost,
    Mamba2Config: mamba2_cost,
    HyenaConfig: hyena_cost,
}


def mixer_costs(config: ModelConfig, context: int) -> list[MixerCost]:
    """The cost of every layer's mixer at a context of `context` tokens."""
    D, value_bytes = config.d_model, config.torch_dtype.itemsize
    return [MIXER_COSTS[type(layer.mixer)](layer.mixer, D, context, value_bytes) for layer in config.layers]


@lru_cache(maxsize=64)
def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, counted from the model built on the meta device: embedding, layers, head, total.

    A tied head is counted once, under embedding.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    between = (model.embedding_norm, model.layers, model.final_norm)
    counts = {
        "embedding": model.embedding.weight.numel(),
        "layers": sum(p.numel() for part in between for p in part.parameters()),
        "head": 0 if config.tie_embeddings else model.head.weight.numel(),
    }
    return counts | {"total": sum(counts.values())}


def idle_parameters(config: ModelConfig) -> int:
    """Weights that a token does not meet: those of the experts not chosen for it."""
    idle = 0
    for layer in config.layers:
        moe = layer.feed_forward
        if isinstance(moe, MoEConfig):
            ups = 2 if moe.gated else 1
            expert = (ups + 1) * config.d_model * moe.hidden_dim
            if moe.bias:
                expert += ups * moe.hidden_dim + config.d_model
            idle += (moe.num_experts - moe.top_k) * expert
    return idle


def model_cost(config: ModelConfig, context: int) -> ModelCost:
    """Costs at a context of `context` tokens."""
    counts = parameter_counts(config)
    mixers = mixer_costs(config, context)
    weights = 2 * (counts["layers"] - idle_parameters(config) + config.vocab_size * config.d_model)
    forward = weights + sum(m.forward_flops for m in mixers)
    return ModelCost(
        parameters=counts["total"],
        embedding_parameters=counts["embedding"] + counts["head"],
        forward_flops=forward,
        training_flops=3 * forward,
        decode_flops=weights + sum(m.decode_flops for m in mixers),
        state_bytes=sum(m.state_bytes for m in mixers),
    )


def transformer_cache_bytes(config: ModelConfig, context: int, bytes_per_value: int = 2) -> int:
    """Keys and values that a multi-head Transformer of this width and depth keeps: 2 D a token and layer."""
    return 2 * len(config.layers) * config.d_model * context * bytes_per_value


def head_windows(config: ModelConfig) -> list[list[float]]:
    """For each retention layer, tokens until each head's decay passes 1%; inf without decay. Gated layers give []."""
    windows = []
    for layer in config.layers:
        if isinstance(layer.mixer, RetentionConfig):
            log_decay = layer.mixer.log_decay
            windows.append([] if log_decay is None else [window(x) for x in log_decay.tolist()])
    return windows
