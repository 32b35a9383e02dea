"""Tensor parallelism: the processes that share the heads of each layer, and the sums between them.

Every process has all tokens and a part of the heads (Megatron-LM, arXiv 1909.08053, section 3):

    y = total(f_r(share(x)))        share: x itself, and the sum of its gradients over the processes r
                                    total: the sum over the processes, whose gradient goes to each of them

So x and y, and their gradients, are the same on all processes. Every process takes part in every sum: the calls of all
processes must match. Derivatives of second order are not defined.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retnet.ops.collectives import all_gather_single, outside_graphs


@dataclass(frozen=True)
class TensorShard:
    """Part `rank` of `size` of a model, whose other parts the processes of the group have."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> "TensorShard":
        """This process's part in the group (None: all processes)."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def __deepcopy__(self, memo: dict) -> "TensorShard":
        """Copies of a model have the same processes."""
        return self

    def __str__(self) -> str:
        return f"part {self.rank} of {self.size}"

    def span(self, count: int) -> slice:
        """This process's contiguous part of `count` places; the last parts are smaller where they do not divide."""
        per = -(-count // self.size)
        return slice(min(count, self.rank * per), min(count, (self.rank + 1) * per))

    @outside_graphs
    def share(self, x: Tensor) -> Tensor:
        """x, equal on all processes, whose gradient is the sum of theirs."""
        return _Share.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else x

    @outside_graphs
    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the processes. Without gradients x itself is overwritten with it."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Total.apply(x, self)
        return self.sum_(x)

    @outside_graphs
    def gathered(self, x: Tensor, count: int) -> Tensor:
        """The parts [..., span] of all processes as [..., count]. Its gradient must be equal on all of them."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Gathered.apply(x, count, self)
        return self._joined(x, count)

    def _joined(self, x: Tensor, count: int) -> Tensor:
        missing = -(-count // self.size) - x.shape[-1]
        parts = self.all_gather(F.pad(x, (0, missing)) if missing else x)
        return parts.movedim(0, -2).flatten(-2)[..., :count]

    def sum_(self, x: Tensor) -> Tensor:
        """x overwritten with its sum over the processes, without a derivative. x is contiguous."""
        dist.all_reduce(x, group=self.group)
        return x

    def largest_(self, x: Tensor) -> Tensor:
        """x overwritten with its maximum over the processes, without a derivative."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def first_(self, x: Tensor) -> Tensor:
        """x overwritten with that of process 0, without a derivative."""
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x of all processes [size, ...], without a derivative; their shapes are equal."""
        out = x.new_empty(self.size * x.numel())
        all_gather_single(out, x.contiguous().view(-1), group=self.group)
        return out.view(self.size, *x.shape)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: TensorShard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.shard.sum_(grad.clone(memory_format=torch.contiguous_format)), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: TensorShard) -> Tensor:
        return shard.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, shard: TensorShard) -> Tensor:
        ctx.part = shard.span(count)
        return shard._joined(x, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad[..., ctx.part], None, None
