"""What a model costs: parameters, floating-point operations a token, bytes of state, and how far each head sees.

A multiply-add is two operations. Every weight matrix costs 2 operations an element and token forward, and twice that
again backward. What a mixer does beside its projections is counted by one function a mixer, below.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from retnet.layers.attention import AttentionConfig
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


def retention_cost(mixer: RetentionConfig, context: int, value_bytes: int) -> MixerCost:
    """H heads: S += k^T v and q S are 4 K V; inside a chunk of C tokens the causal half costs C (K + V)."""
    H, K, V = mixer.num_heads, mixer.head_key_dim, mixer.head_value_dim
    chunk = min(context, mixer.chunk_size or 128)
    if mixer.mode == "parallel":
        forward = H * context * (K + V)
    else:
        forward = H * (4 * K * V + chunk * (K + V))
    return MixerCost(forward, H * 4 * K * V, H * K * V * max(4, value_bytes) + POSITION_BYTES)


def attention_cost(mixer: AttentionConfig, context: int, value_bytes: int) -> MixerCost:
    """H heads: q K^T and the weighted sum of values are 4 K a pair; a query meets half the context, or its window."""
    H, K = mixer.num_heads, mixer.head_dim
    seen = min(context, mixer.window or context)
    pairs = seen * (context - seen) + seen * (seen + 1) / 2  # of the whole sequence: full windows, then the ramp before
    kept = 2 * mixer.num_kv_heads * K * seen * value_bytes
    return MixerCost(4 * H * K * pairs / context, 4 * H * K * seen, kept + POSITION_BYTES)


# mixer's config class -> its cost at a context, with activations of so many bytes; extended by each mixer
MIXER_COSTS: dict[type, Callable[..., MixerCost]] = {
    RetentionConfig: retention_cost,
    AttentionConfig: attention_cost,
}


def mixer_costs(config: ModelConfig, context: int) -> list[MixerCost]:
    """The cost of every layer's mixer at a context of `context` tokens."""
    value_bytes = config.torch_dtype.itemsize
    return [MIXER_COSTS[type(layer.mixer)](layer.mixer, context, value_bytes) for layer in config.layers]


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


def model_cost(config: ModelConfig, context: int) -> ModelCost:
    """Costs at a context of `context` tokens."""
    counts = parameter_counts(config)
    mixers = mixer_costs(config, context)
    weights = 2 * (counts["layers"] + config.vocab_size * config.d_model)
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
    """Keys and values that a Transformer of this width and depth keeps (multi-head, no sharing): 2 D a token and layer."""
    return 2 * len(config.layers) * config.d_model * context * bytes_per_value


def head_windows(config: ModelConfig) -> list[list[float]]:
    """For each retention layer, tokens until each head's decay passes 1%; inf without decay. Gated layers give []."""
    windows = []
    for layer in config.layers:
        if isinstance(layer.mixer, RetentionConfig):
            log_decay = layer.mixer.log_decay
            windows.append([] if log_decay is None else [window(x) for x in log_decay.tolist()])
    return windows
