"""Shards of long rows: which tokens a process has, and what it needs from the shards before its own.

Context parallelism cuts a row of T tokens into contiguous shards of equal length, one per process of a group, in order.
A recurrent layer needs one state from the shards before it, which follows from their final states S and total log
decays D, as in LASP-2 (arXiv 2502.07563), here with decays and documents:

    carry_r = sum_j exp(D_{j+1} + ... + D_{r-1}) S_j        over the shards j < r that hold the same document

Every process takes part in every exchange, forward and backward, also where nothing crosses its border: the collectives
of all processes must match. Derivatives of second order are not defined.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = TypeVar("Function", bound=Callable[..., Any])


def _outside_graphs(function: Function) -> Function:
    """The function, which torch.compile calls as it is: its graphs know no exchange under way."""
    return cast(Function, torch.compiler.disable(function))


@dataclass(frozen=True)
class ContextShard:
    """Shard `rank` of `size`, of rows of size * tokens tokens, or of one row of packed documents.

    origins: for each shard, the shard where its first sequence began. bounds: of the documents on this shard, 0 to
    tokens; None for rows that are one sequence each. start: tokens of the first sequence on earlier shards.
    """

    group: Any
    rank: int
    size: int
    tokens: int
    origins: tuple[int, ...]
    bounds: tuple[int, ...] | None
    start: int

    @classmethod
    def of(
        cls, num_tokens: int, cu_seqlens: Sequence[int] | Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> "ContextShard":
        """This process's shard of rows of num_tokens tokens, which the processes of the group share (None: all).

        cu_seqlens: bounds of the documents packed into the whole row, 0 to num_tokens; empty documents are dropped.
        Raises ValueError for rows that do not split evenly, and for bounds that are not such.
        """
        return cls.part(dist.get_rank(group), dist.get_world_size(group), num_tokens, cu_seqlens, group)

    @classmethod
    def part(
        cls, rank: int, size: int, num_tokens: int, cu_seqlens: Sequence[int] | Tensor | None, group: Any = None
    ) -> "ContextShard":
        """Shard `rank` of `size`; arguments as for `of`."""
        if num_tokens < size or num_tokens % size:
            raise ValueError(f"num_tokens is {num_tokens} on {size} processes; accepted: a positive multiple of {size}")
        tokens = num_tokens // size
        whole = [0, num_tokens] if cu_seqlens is None else [int(bound) for bound in cu_seqlens]
        if whole[:1] != [0] or whole[-1] != num_tokens or whole != sorted(whole):
            raise ValueError(
                f"cu_seqlens goes from {whole[:1]} to {whole[-1:]}; accepted: rising from 0 to {num_tokens}"
            )
        begins = [max(bound for bound in whole[:-1] if bound <= r * tokens) for r in range(size)]
        low = rank * tokens
        inside = sorted({0, tokens, *(bound - low for bound in whole if 0 < bound - low < tokens)})
        origins = tuple(begin // tokens for begin in begins)
        bounds = None if cu_seqlens is None else tuple(inside)
        return cls(group, rank, size, tokens, origins, bounds, low - begins[rank])

    @property
    def continues(self) -> bool:
        """Whether the first sequence began on an earlier shard."""
        return self.origins[self.rank] < self.rank

    @property
    def first_tokens(self) -> int:
        """Tokens of the first sequence on this shard."""
        return self.tokens if self.bounds is None else self.bounds[1]

    @property
    def last_tokens(self) -> int:
        """Tokens of the last sequence on this shard."""
        return self.tokens if self.bounds is None else self.bounds[-1] - self.bounds[-2]

    def sequences(self, num_rows: int, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Tokens of each of N sequences on earlier shards [N], and their bounds on this one [N + 1] if they are packed.

        Raises ValueError for tokens [num_rows, num_tokens] that are no such shard.
        """
        if num_tokens != self.tokens or (self.bounds is not None and num_rows != 1):
            rows = "" if self.bounds is None else " of one row"
            raise ValueError(
                f"a shard has {num_rows} rows of {num_tokens} tokens; accepted: {self.tokens} tokens{rows}"
            )
        if self.bounds is None:
            return torch.full((num_rows,), self.start, device=device), None
        starts = torch.zeros(len(self.bounds) - 1, dtype=torch.long)
        starts[0] = self.start
        return starts.to(device), torch.tensor(self.bounds, device=device)

    def first(self, x: Tensor) -> Tensor:
        """Of x [N, ...], that of the sequences that may go on from the shard before."""
        return x if self.bounds is None else x[:1]

    def last(self, x: Tensor) -> Tensor:
        """Of x [N, ...], that of the sequences that may go on in the next shard."""
        return x if self.bounds is None else x[-1:]

    def add_to_first(self, x: Tensor, more: Tensor) -> Tensor:
        """x [N, ...] with `more` added to the sequences of `first`."""
        return x + more if self.bounds is None else torch.cat([x[:1] + more, x[1:]])

    @_outside_graphs
    def exchange(self, final: Tensor, total: Tensor) -> "Exchange":
        """Begin the exchange of final states [B, ...] and total log decays, which broadcast to them."""
        return Exchange(self, final, total)

    @_outside_graphs
    def previous(self, x: Tensor) -> Tensor:
        """The x of the shard before, of the same shape; zeros where no sequence goes on from there."""
        return _Previous.apply(x, self)

    @_outside_graphs
    def gathered(self, x: Tensor) -> Tensor:
        """x [B, tokens, ...] of all shards in order, [B, size * tokens, ...]."""
        return _Gathered.apply(x, self)

    @_outside_graphs
    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all shards, without a derivative."""
        return self.all_gather(x.detach()).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        """x of all shards [size, ...]."""
        out, work = self.start_all_gather(x)
        work.wait()
        return out

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, Any]:
        """A tensor that holds x of all shards [size, ...] once the work has been waited for."""
        out = x.new_empty(self.size, *x.shape)
        return out, dist.all_gather(list(out), x.contiguous(), group=self.group, async_op=True)

    def reduce_scatter(self, parts: list[Tensor]) -> Tensor:
        """The sum over all shards of their parts for this one."""
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, [part.contiguous() for part in parts], group=self.group)
        return out


class Exchange:
    """An exchange under way, so that what does not need the carry can be computed meanwhile."""

    def __init__(self, shard: ContextShard, final: Tensor, total: Tensor):
        self.shard, self._final, self._total = shard, final, total
        joined = torch.cat([final.detach().flatten(), total.detach().to(final.dtype).flatten()])
        self._gathered, self._work = shard.start_all_gather(joined)

    @_outside_graphs
    def carry(self) -> Tensor:
        """The state before this shard's first token [B, ...]; zeros where a sequence begins there."""
        self._work.wait()
        return _Carry.apply(self._final, self._total, self._gathered, self.shard)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, final: Tensor, total: Tensor, gathered: Tensor, shard: ContextShard) -> Tensor:
        finals, totals = gathered.split((final.numel(), total.numel()), -1)
        finals, totals = finals.unflatten(-1, final.shape), totals.unflatten(-1, total.shape)
        ctx.save_for_backward(finals, totals)
        ctx.shard, ctx.total_dtype = shard, total.dtype
        carry = torch.zeros_like(final)
        for j in range(shard.origins[shard.rank], shard.rank):
            carry += _weight(totals, j, shard.rank) * finals[j]
        return carry

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shard, (finals, totals) = ctx.shard, ctx.saved_tensors
        grads = shard.all_gather(grad)  # of the carries of all shards
        own = shard.rank
        grad_final, grad_total = torch.zeros_like(finals[own]), torch.zeros_like(totals[own])
        for r in range(own + 1, shard.size):
            if shard.origins[r] <= own:
                grad_final += _weight(totals, own, r) * grads[r]
            for j in range(shard.origins[r], own):
                product = _weight(totals, j, r) * finals[j] * grads[r]
                grad_total += product.sum_to_size(grad_total.shape)
        return grad_final, grad_total.to(ctx.total_dtype), None, None


def _weight(totals: Tensor, before: int, rank: int) -> Tensor:
    """The decay of shard `before`'s final state on its way to shard `rank`."""
    return totals[before + 1 : rank].sum(0).exp()


class _Previous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: ContextShard) -> Tensor:
        ctx.shard = shard
        xs = shard.all_gather(x)
        return xs[shard.rank - 1].clone() if shard.continues else torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shard = ctx.shard
        grads, after = shard.all_gather(grad), shard.rank + 1
        goes_on = after < shard.size and shard.origins[after] < after
        return grads[after].clone() if goes_on else torch.zeros_like(grad), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: ContextShard) -> Tensor:
        ctx.shard = shard
        return torch.cat(shard.all_gather(x).unbind(), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.shard.reduce_scatter(list(grad.chunk(ctx.shard.size, 1))), None
