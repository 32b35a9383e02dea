"""Cost of a model: parameters, floating-point operations per token, bytes of state, how far each head sees.

A multiply-add is two operations. Every weight matrix that a token uses costs 2 operations per element forward and
twice that again backward. The operations of a mixer beside its projections are counted in the mixer's file.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from retnet.layers.block import BlockConfig
from retnet.layers.hyper_connection import hyper_connection_flops
from retnet.layers.mixer_base import MixerFlops, Workload
from retnet.layers.mixers import mixer_of
from retnet.layers.retention import RetentionConfig
from retnet.layers.streams import StreamsConfig
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.ops.decay import window


@dataclass(frozen=True)
class MixerCost:
    """One layer's mixing beside its projections, and its hyper-connections, at a context of T tokens.

    forward_flops: per token of a whole sequence. decode_flops: for the next token. state_bytes: carried.
    """

    forward_flops: float
    decode_flops: float
    state_bytes: int


@dataclass(frozen=True)
class ModelCost:
    """Totals of a model at a context of T tokens; operations are for one token of one sequence.

    Multi-token prediction counts in training alone.
    """

    parameters: int
    forward_flops: float
    training_flops: float
    decode_flops: float
    state_bytes: int


def mixer_costs(config: ModelConfig, context: int, device: str = "cpu") -> list[MixerCost]:
    """The cost of every layer's mixer at a context of `context` tokens, in the form that runs on `device`."""
    work = Workload(config.d_model, context, config.torch_dtype, device)
    layers = _distinct_layers(config)
    flops = {layer: _flops(layer, work) for layer in layers}
    states = _empty_model(replace(config, layers=layers)).init_state(1, num_tokens=context)
    costs = {layer: MixerCost(*flops[layer], state.nbytes) for layer, state in zip(layers, states, strict=True)}
    return [costs[layer] for layer in config.layers]


def _flops(layer: BlockConfig, work: Workload) -> MixerFlops:
    flops = mixer_of(layer.mixer).flops(layer.mixer, work)
    streams = hyper_connection_flops(layer.hyper, layer.num_branches, work.d_model)
    return MixerFlops(flops.forward + streams, flops.decode + streams)


def device_notes(config: ModelConfig, context: int, device: str) -> list[str]:
    """Sentences about how the layers run on a device, each once, where the configuration does not determine it."""
    work = Workload(config.d_model, context, config.torch_dtype, device)
    notes = (layer.mixer.on_device(work) for layer in _distinct_layers(config))
    return list(dict.fromkeys(note for note in notes if note))


def _distinct_layers(config: ModelConfig) -> tuple[BlockConfig, ...]:
    """Each layer of the model once: equal layers have equal sizes, and a deep model takes seconds to build."""
    return tuple(dict.fromkeys(config.layers))


@lru_cache(maxsize=64)
def _empty_model(config: ModelConfig) -> LanguageModel:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LanguageModel(config)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, counted from the model built on the meta device: embedding, layers, head, total, and those of
    multi-token prediction (mtp) if there is any.

    A tied head is counted once, under embedding.
    """
    layers = _distinct_layers(config)
    model = _empty_model(replace(config, layers=layers))
    sizes = {layer: _size(block) for layer, block in zip(layers, model.layers, strict=True)}
    counts = {
        "embedding": model.embedding.weight.numel(),
        "layers": _size(model.embedding_norm) + sum(sizes[layer] for layer in config.layers) + _size(model.final_norm),
        "head": 0 if config.tie_embeddings else model.head.weight.numel(),
    }
    if model.mtp is not None:
        counts["mtp"] = _size(model.mtp)
    return counts | {"total": sum(counts.values())}


def idle_parameters(config: ModelConfig) -> int:
    """Weights that a token does not use: those of the experts not chosen for it."""
    feed_forwards = (layer.feed_forward for layer in config.layers)
    inside = sum(layer.mixer.idle_parameters(config.d_model) for layer in config.layers)
    return inside + sum(each.idle_parameters(config.d_model) for each in feed_forwards if each is not None)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def model_cost(config: ModelConfig, context: int, device: str = "cpu") -> ModelCost:
    """Costs at a context of `context` tokens, on a device of that type."""
    counts = parameter_counts(config)
    mixers = mixer_costs(config, context, device)
    weights = 2 * (counts["layers"] - idle_parameters(config) + config.vocab_size * config.d_model)
    forward = weights + sum(m.forward_flops for m in mixers)
    return ModelCost(
        parameters=counts["total"],
        forward_flops=forward,
        training_flops=3 * (forward + _ahead_flops(config, context, device)),
        decode_flops=weights + sum(m.decode_flops for m in mixers),
        state_bytes=sum(m.state_bytes for m in mixers),
    )


def _ahead_flops(config: ModelConfig, context: int, device: str) -> float:
    """Forward operations per token of multi-token prediction, each module with the head."""
    mtp = config.mtp
    if mtp is None:
        return 0.0
    one = replace(config, layers=(mtp.block,), mtp=None)
    weights = parameter_counts(config)["mtp"] - mtp.num_modules * mtp.num_blocks * idle_parameters(one)
    mixing = mtp.num_modules * mtp.num_blocks * mixer_costs(one, context, device)[0].forward_flops
    return 2 * (weights + mtp.num_modules * config.vocab_size * config.d_model) + mixing


def residual_streams(layer: BlockConfig) -> int:
    """The residual streams of a layer: 1 without hyper-connections; the most that a layer inside it has."""
    own = 1 if layer.hyper is None else layer.hyper.num_streams
    inside = layer.mixer.blocks if isinstance(layer.mixer, StreamsConfig) else ()
    return max(own, *map(residual_streams, inside), 1)


def hyper_connection_cost(config: ModelConfig) -> float:
    """Forward operations per token of all hyper-connections: those that the model with plain residuals does without."""
    return model_cost(config, 1).forward_flops - model_cost(_plain(config), 1).forward_flops


def _plain(config: ModelConfig) -> ModelConfig:
    def without(layer: BlockConfig) -> BlockConfig:
        if isinstance(layer.mixer, StreamsConfig):
            layer = replace(layer, mixer=layer.mixer.with_blocks(map(without, layer.mixer.blocks)))
        return replace(layer, hyper=None)

    return replace(config, layers=tuple(map(without, config.layers)))


def transformer_cache_bytes(config: ModelConfig, context: int) -> int:
    """A multi-head Transformer of this width and depth: 2 D keys and values per token and layer, 2 bytes each."""
    return 2 * 2 * config.d_model * sum(layer.mixer.depth for layer in config.layers) * context


def retention_layers(config: ModelConfig) -> list[int]:
    """The numbers of the layers of retention, which are those of `head_windows`; a layer of several comes as often."""
    layers = enumerate(config.layers)
    return [i for i, layer in layers for mixer in layer.mixer.leaves if isinstance(mixer, RetentionConfig)]


def head_windows(config: ModelConfig) -> list[list[float]]:
    """For each retention layer, tokens until each head's decay passes 1%; inf without decay. Gated layers give []."""
    windows = []
    known: dict[RetentionConfig, list[float]] = {}
    for mixer in (mixer for layer in config.layers for mixer in layer.mixer.leaves):
        if isinstance(mixer, RetentionConfig):
            if mixer not in known:
                known[mixer] = [] if mixer.log_decay is None else [window(x) for x in mixer.log_decay.tolist()]
            windows.append(known[mixer])
    return windows
