"""FSDP2 on processors without accelerators, where accelerate would leave it out without a word.

PyTorch shards on the CPU through gloo as it does on GPUs through NCCL; accelerate asks for a kind of machine first. It
gets an answer that lets it go on, for as long as it decides. Slow, but a sharded run can be tested and its checkpoints
be read anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments


@contextmanager
def sharding_on_cpus(arguments: TrainingArguments) -> Iterator[None]:
    """Make the Trainer inside, where its arguments ask for FSDP on CPUs."""
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
        state.distributed_type = kind
