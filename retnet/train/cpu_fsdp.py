"""FSDP2 on machines without accelerators, where accelerate silently disables it.

PyTorch can shard on CPUs through gloo, as on GPUs through NCCL, but accelerate enables FSDP for several GPUs only.
While the Trainer is made, this module reports several GPUs. Training is slow, but a sharded run can be tested, and its
checkpoints can be read, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments


@contextmanager
def sharding_on_cpus(arguments: TrainingArguments) -> Iterator[None]:
    """A context to make the Trainer in. It has an effect only if the arguments ask for FSDP on CPUs."""
    state = PartialState()
    kind = state.distributed_type
    if not arguments.fsdp or arguments.device.type != "cpu":
        yield
        return
    if kind != DistributedType.MULTI_CPU:
        raise ValueError("fsdp is set for one process without torchrun; accepted: torchrun --nproc_per_node=N")
    state.distributed_type = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if state.distributed_type != DistributedType.FSDP:  # what accelerate makes of it, and reads whenever it saves
            state.distributed_type = kind
