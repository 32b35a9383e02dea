"""Rows of a step over the processes of a run: which process reads which rows, and the part of them that it holds.

The processes form a mesh of groups x context_parallel. The processes of a group are consecutive; they read the same
rows and hold contiguous shards of them (`ops/context_shard.py`). The rows of a micro-batch lie end to end, so a shard
is a part of a row, or one or more rows. Gradients are summed over all processes, by DDP or FSDP2.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh
from transformers import TrainingArguments

from retnet.data import IGNORED
from retnet.models.config import ModelConfig
from retnet.models.parallel.context import check_layers_on_shards
from retnet.ops.context_shard import ContextShard
from retnet.system.sizes import quantity
from retnet.train.batches import FACTS, BatchFacts
from retnet.train.recipe import Recipe

ENABLED = "ACCELERATE_USE_PARALLELISM_CONFIG"  # set by `accelerate launch` with sizes of its own, read by accelerate


@dataclass(frozen=True)
class RowShards:
    """Process `rank` of `size` that share the rows of group `index` of `groups`. context: their process group."""

    index: int = 0
    groups: int = 1
    rank: int = 0
    size: int = 1
    context: Any = None

    @classmethod
    def of(cls, size: int, arguments: TrainingArguments) -> RowShards:
        """This process's place where `size` processes share rows. All processes call this together."""
        groups = arguments.world_size // size
        index, rank = divmod(arguments.process_index, size)
        if size == 1:
            return cls(index, groups)
        mesh = init_device_mesh(arguments.device.type, (groups, size), mesh_dim_names=("data", "context"))
        return cls(index, groups, rank, size, mesh.get_group("context"))

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The part of a batch (`batches.collate`) that this process holds, with its own facts.

        input_ids, labels, shift_labels [1, B T / size]: labels were shifted before. context: the shard, which takes the
        place of cu_seq_lens_q. The squared lengths of documents count by the share of the tokens.
        """
        if self.size == 1:
            return batch
        part = {name: x for name, x in batch.items() if name != "cu_seq_lens_q"}
        num_tokens = batch["input_ids"].numel()
        shard = ContextShard.part(self.rank, self.size, num_tokens, batch["cu_seq_lens_q"].tolist(), self.context)
        mine = slice(shard.rank * shard.tokens, (shard.rank + 1) * shard.tokens)
        for name in ("input_ids", "labels", "shift_labels"):
            part[name] = batch[name].reshape(1, -1)[:, mine]
        facts: BatchFacts = batch[FACTS]
        num_targets = int((part["shift_labels"] != IGNORED).sum())
        own = replace(facts, num_targets=num_targets, seen=facts.seen // self.size, num_tokens=shard.tokens)
        return {**part, "context": shard, FACTS: own}

    def check_same_data(self, data: object, device: torch.device) -> None:
        """Raise ValueError if a process of the group would read other rows. All processes call this together."""
        if self.size == 1:
            return
        digest = hashlib.sha256(repr(data).encode()).digest()[:7]
        mine = torch.tensor(int.from_bytes(digest), device=device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.context)
        if other := [rank for rank, digest in enumerate(found) if digest != found[0]]:
            raise ValueError(
                f"processes {other} of the {self.size} that share rows opened other data than process 0; accepted: the "
                "same documents on all machines"
            )


def check_row_shards(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raise ValueError for settings that do not go with `context_parallel`, and for accelerate's own sizes of it."""
    size, world = recipe.context_parallel, arguments.world_size
    parallelism = arguments.parallelism_config
    if parallelism is None and os.environ.get(ENABLED, "false").lower() == "true":
        parallelism = ParallelismConfig()  # reads the environment, as accelerate does
    names = ("cp_size", "sp_size", "tp_size")
    sizes = {} if parallelism is None else {name: int(getattr(parallelism, name)) for name in names}
    for name in names[:2]:
        if (other := sizes.get(name, 1)) > 1:
            raise ValueError(
                f"{name} of accelerate's parallelism_config is {other}, which cuts rows for attention alone; accepted: "
                f"context_parallel={other} without it"
            )
    if size == 1:
        return
    given = f"context_parallel is {size}"
    if world % size:
        fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"{given} with {quantity(world, 'process', 'processes')}; accepted: a divisor of the number of processes "
            f"({fitting}), or torchrun --nproc_per_node=N with a multiple of {size}"
        )
    if recipe.length % size:
        below, above = recipe.length // size * size, -(-recipe.length // size) * size
        near = f"{below:,} or {above:,}" if below else f"{above:,}"
        raise ValueError(f"{given} with length {recipe.length:,}; accepted: a multiple of {size}, such as {near}")
    if recipe.carry_state:
        raise ValueError(f"{given} with carry_state; accepted: carry_state=false, with rows as long as a document")
    if not arguments.average_tokens_across_devices:
        raise ValueError(
            f"{given} with average_tokens_across_devices=false; accepted: true, as the loss is the mean over whole rows"
        )
    if arguments.deepspeed is not None or sizes.get("tp_size", 1) > 1:
        other = "deepspeed" if arguments.deepspeed is not None else "tp_size of parallelism_config"
        raise ValueError(f"{given} with {other}; accepted: DDP, or fsdp=true")


def check_shared_layers(recipe: Recipe, config: ModelConfig) -> None:
    """Raise ValueError for layers that need whole rows."""
    if recipe.context_parallel > 1:
        try:
            check_layers_on_shards(config)
        except ValueError as error:
            raise ValueError(f"context_parallel is {recipe.context_parallel} with {recipe.model}: {error}") from error
