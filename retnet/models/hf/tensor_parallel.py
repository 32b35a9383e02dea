"""Tensor parallelism through transformers: the styles of our `tp_plan`, and loading and saving of split models.

    torchrun --nproc_per_node=2 script.py      # AutoModelForCausalLM.from_pretrained(path, distributed_config=...)

transformers' own styles shard each linear layer alone. Ours split whole layers by heads, feed-forwards by channels, and
the vocabulary (`retnet.models.parallel.plan`). A weight that is one map is read from the files in parts. One that is
several maps (Mamba-2's projection, short convolutions) is read whole, and split after loading.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from retnet.layers.tensor_parallel import Split, TensorParallel, owned
from retnet.models.lm import LanguageModel
from retnet.models.parallel.plan import split_
from retnet.models.parallel.whole import whole_weights
from retnet.ops.tensor_shard import TensorShard

# Of the wrapped language model. transformers reads it from the class and from `config.base_model_tp_plan`.
TP_PLAN = {
    "model.embedding": "retnet_vocabulary",
    "model.layers.*.mixer": "retnet_heads",
    "model.layers.*.feed_forward": "retnet_heads",
    "model.head": "retnet_vocabulary",
}


class ByHeads(TensorParallelLayer):
    """Reads a mixer or a feed-forward in parts."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Put placeholders of parts where transformers will load weights. Raises ValueError for what is not divided."""
        if not isinstance(module, TensorParallel):
            raise ValueError(f"the model has a {type(module).__name__}, which is not divided; accepted: tp_size 1")
        try:
            cast(Any, module).config.part(0, mesh.size())
        except ValueError as error:
            raise ValueError(f"{type(module).__name__}: {error}") from error
        for name, split in module.splits().items():
            path, _, attribute = name.rpartition(".")
            if owned(module, name) is not None and _is_one_map(split):
                place_part(module.get_submodule(path), attribute, split.dim, mesh)
        return module


class ByVocabulary(TensorParallelLayer):
    """Reads an embedding or a head in parts."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        place_part(module, "weight", 0, mesh)
        return module


ALL_PARALLEL_STYLES.register("retnet_heads", ByHeads())  # pyright: ignore[reportArgumentType]
ALL_PARALLEL_STYLES.register("retnet_vocabulary", ByVocabulary())  # pyright: ignore[reportArgumentType]


def place_part(owner: nn.Module, attribute: str, dim: int, mesh: Any) -> None:
    """Let a parameter be a DTensor split along `dim`, whose part alone transformers reads from a file."""
    whole = owner.get_parameter(attribute)
    part = distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
    owner.register_parameter(attribute, nn.Parameter(part, requires_grad=whole.requires_grad))


def _is_one_map(split: Split) -> bool:
    return len(split.parts) == 1 and split.parts[0].divided


def finish_split(model: Any) -> None:
    """Make a model that transformers has loaded in parts a split model: parts become plain tensors, sums are added."""
    if getattr(model, "_tp_size", None) in (None, 1):
        return
    if getattr(model, "_fsdp_size", None) not in (None, 1):
        raise ValueError("the model is sharded by FSDP as well; accepted with tensor parallelism: fsdp_size 1")
    mesh, core = model._device_mesh, cast(LanguageModel, model.model)
    for module in core.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter.data, DTensor):
                part = parameter.data.to_local().clone(memory_format=torch.contiguous_format)
                module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    if core.head is not None and core.config.tie_embeddings:
        core.head.weight = core.embedding.weight
    split_(core, TensorShard.of(mesh["tp"].get_group() if mesh.ndim > 1 else mesh.get_group()))


def whole_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict of the whole model, for `save_pretrained`; every process calls it."""
    core = cast(LanguageModel, model.model)
    return model.state_dict() | {f"model.{name}": x for name, x in whole_weights(core).items()}
