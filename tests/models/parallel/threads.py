"""Split models in threads that stand for processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retnet.models.parallel.plan import split_
from retnet.ops.tensor_shard import TensorShard
from tests.lockstep import Lockstep, in_lockstep


class TensorThread(TensorShard):
    """A part whose group is a `Lockstep`."""

    def sum_(self, x: Tensor) -> Tensor:
        return x.copy_(self.all_gather(x).sum(0))

    def largest_(self, x: Tensor) -> Tensor:
        return x.copy_(self.all_gather(x).amax(0))

    def first_(self, x: Tensor) -> Tensor:
        return x.copy_(self.all_gather(x)[0])

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.group.all(self.rank, x.detach().clone()))


def on_threads(size: int, check: Callable[..., None], *options: object, **more: object) -> None:
    """Run check(split, *options) in as many threads."""

    def work(rank: int, lockstep: Lockstep) -> None:
        check(lambda model: split_(model, TensorThread(lockstep, rank, size)), *options, **more)

    in_lockstep(size, work)
