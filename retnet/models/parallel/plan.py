"""The plan of tensor parallelism for torch's `parallelize_module`, and the layers that it refuses.

    mesh = init_device_mesh("cuda", (2,))
    parallelize_module(model, mesh, tensor_parallel_plan(model.config, mesh.size()))

Mixers are split by heads, feed-forwards by hidden channels, embedding and head by vocabulary. Weights become ordinary
tensors of the process's own share, not DTensors: kernels and packed decoding read them as those of whole models.
"""

from collections.abc import Callable
from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from retnet.layers.mixers import MIXERS
from retnet.layers.moe import MoEConfig
from retnet.layers.tensor_parallel import TensorParallel, check_plain
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.parallel.vocabulary import split_vocabulary_
from retnet.ops.tensor_shard import TensorShard


class ByVocabulary(ParallelStyle):
    """Splits a language model's embedding and head; all weights become those of process src_data_rank before.

    src_data_rank None: every process has the same weights already.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        model, shard = cast(LanguageModel, module), TensorShard.of(device_mesh.get_group())
        if self.src_data_rank is not None:
            for weight in model.parameters():
                shard.first_(weight.data)
        split_embeddings_(model, shard)
        return model


class ByHeads(ParallelStyle):
    """Splits a mixer by heads, or a feed-forward by hidden channels."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        cast(TensorParallel, module).split_(TensorShard.of(device_mesh.get_group()))
        return module


def tensor_parallel_plan(config: ModelConfig, size: int) -> dict[str, ParallelStyle]:
    """The styles of a language model's modules on `size` processes.

    Raises ValueError that names the first layer which cannot be divided, and what is accepted.
    """
    check_splits(config, size)
    plan: dict[str, ParallelStyle] = {"": ByVocabulary()}
    for i, layer in enumerate(config.layers):
        plan[f"layers.{i}.mixer"] = ByHeads()
        if layer.feed_forward is not None:
            plan[f"layers.{i}.feed_forward"] = ByHeads()
    return plan


def tensor_parallel_(model: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """Split a model over the processes of a mesh of one dimension, in place. All of them call it, with equal weights.

    Do it before an optimizer, adapters and quantisation. Raises ValueError as `tensor_parallel_plan` does.
    """
    plan = tensor_parallel_plan(model.config, mesh.size())
    check_weights(model)
    return cast(LanguageModel, parallelize_module(model, mesh, plan))


def split_(model: LanguageModel, shard: TensorShard) -> LanguageModel:
    """As `tensor_parallel_`, for processes that a `TensorShard` names and that have equal weights."""
    check_splits(model.config, shard.size)
    check_weights(model)
    split_embeddings_(model, shard)
    for module in model.modules():
        if isinstance(module, TensorParallel) and module.shard is None:  # one inside another is split by that
            module.split_(shard)
    return model


def split_embeddings_(model: LanguageModel, shard: TensorShard) -> None:
    """Split a model's embedding and head, and note that the model is split."""
    if model.shard is not None:
        raise ValueError(f"the model is {model.shard} already; accepted: a whole model")
    split_vocabulary_(model.embedding, model.head, shard)
    model.shard = shard


def check_weights(model: LanguageModel) -> None:
    """Raise ValueError unless the model's linear layers are plain, before anything is split."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            check_plain(module, f"{name}.weight")


def check_splits(config: ModelConfig, size: int) -> None:
    """Raise ValueError for the first layer that cannot be divided by `size` processes."""
    if config.mtp is not None:
        raise ValueError("the model has multi-token prediction, which is not divided; accepted when split: mtp None")
    accepted = ", ".join(name for name, mixer in MIXERS.items() if not mixer.config.refused_when_split)
    for i, layer in enumerate(config.layers):
        mixer, feed_forward = layer.mixer, layer.feed_forward
        if mixer.refused_when_split:
            raise ValueError(f"layer {i} is {mixer.kind}: {mixer.refused_when_split}; accepted when split: {accepted}")
        _check(f"layer {i} is {mixer.kind}", lambda mixer=mixer: mixer.part(0, size))
        if isinstance(feed_forward, MoEConfig):
            raise ValueError(
                f"layer {i} is a mixture of experts, which is not divided; accepted when split: one expert"
            )
        if feed_forward is not None:
            _check(f"layer {i} has a feed-forward", lambda block=feed_forward: block.part(0, size))


def _check(where: str, divide: Callable[[], object]) -> None:
    try:
        divide()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
