"""Whole weights, gradients and states of a split model, and its own part of whole ones.

All processes call these functions together.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from retnet.layers.block import Block
from retnet.layers.tensor_parallel import Split, TensorParallel
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops.tensor_shard import TensorShard

BY_VOCABULARY = ("embedding.weight", "head.weight")


def whole_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The state dict of the whole model, on every process."""
    return _joined(model, model.state_dict())


def whole_gradients(model: LanguageModel) -> dict[str, Tensor]:
    """The gradients of the whole model by the names of their parameters, on every process."""
    return _joined(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def part_of_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of weights, or gradients, of the whole model. `load_state_dict` of the split one takes it."""
    shard, splits = _shard(model), _weight_splits(model)
    parts = {}
    for name, x in weights.items():
        if name in splits:
            parts[name] = splits[name].take(x, shard)
        else:
            parts[name] = x[shard.span(len(x))] if name in BY_VOCABULARY else x
    return parts


def whole_model(model: LanguageModel) -> LanguageModel:
    """A whole model with the weights of a split one, on every process."""
    with torch.device("meta"):
        whole = LanguageModel(model.config)
    whole.load_state_dict(whole_weights(model), assign=True)
    if model.config.tie_embeddings:
        whole.head.weight = whole.embedding.weight
    whole.generation_config, whole.directory = model.generation_config, model.directory
    return whole.train(model.training)


def whole_state(model: LanguageModel, state: ModelState) -> ModelState:
    """The states of all heads, on every process."""
    shard = _shard(model)
    return _with_heads(model, state, lambda split, x: split.join(x, shard))


def part_of_state(model: LanguageModel, state: ModelState) -> ModelState:
    """The states of this process's heads, from those of all heads."""
    shard = _shard(model)
    return _with_heads(model, state, lambda split, x: split.take(x, shard))


def _joined(model: LanguageModel, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shard, splits, vocab_size = _shard(model), _weight_splits(model), model.config.vocab_size
    whole = dict(parts)
    for name, x in parts.items():
        if name in splits:
            whole[name] = splits[name].join(x, shard)
        elif name in BY_VOCABULARY:
            whole[name] = shard.gathered(x.detach().T, vocab_size).T.contiguous()
    return whole


def _with_heads(model: LanguageModel, state: ModelState, change: Callable[[Split, Tensor], Tensor]) -> ModelState:
    layers = []
    for block, layer in zip(model.layers, state, strict=True):
        splits, tensors = cast(Block, block).mixer.states_split_by, layer.tensors()
        changed = {name: change(split, tensors[name]) for name, split in splits.items() if name in tensors}
        layers.append(type(layer).from_tensors(tensors | changed))
    return ModelState(tuple(layers))


def _weight_splits(model: LanguageModel) -> dict[str, Split]:
    """The splits of the model's weights by heads and channels."""
    layers = {place: module for place, module in model.named_modules() if isinstance(module, TensorParallel)}
    return {f"{place}.{name}": split for place, module in layers.items() for name, split in module.split_by.items()}


def _shard(model: LanguageModel) -> TensorShard:
    if model.shard is None:
        raise ValueError("the model is whole; accepted: one split by tensor_parallel_")
    return model.shard
