"""Shards of rows in threads that stand for processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retnet.ops.context_shard import ContextShard
from tests.lockstep import Lockstep, in_lockstep


class Done:
    def wait(self) -> None:
        """The exchange is over already."""


class ContextThread(ContextShard):
    """A shard whose group is a `Lockstep`."""

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, Done]:
        return torch.stack(self.group.all(self.rank, x.detach().clone())), Done()

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        return sum(other[self.rank] for other in self.group.all(self.rank, parts))


def on_shards(size: int, check: Callable[..., None], *options: object) -> None:
    """Run check(shards, size, *options) in as many threads; raises the first AssertionError."""

    def work(rank: int, lockstep: Lockstep) -> None:
        check(lambda tokens, bounds: ContextThread.part(rank, size, tokens, bounds, lockstep), size, *options)

    in_lockstep(size, work)
