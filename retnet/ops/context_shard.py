"""Shards of long rows: the tokens of each process, and what it needs from the shards before its own.

Context parallelism cuts a row of T tokens into contiguous shards of equal length, one per process of a group, in order.
A recurrent layer needs one state from the shards before it, which follows from their final states S and total log
decays D, as in LASP-2 (arXiv 2502.07563), here with decays and documents:

    carry_r = sum_j exp(D_{j+1} + ... + D_{r-1}) S_j        over the shards j < r that hold the same document

Every process takes part in every exchange, forward and backward, also where nothing crosses its border: the collectives
of all processes must match. Derivatives of second order are not defined.

Exchanges are torch.library operators, so that torch.compile and selective checkpointing see them as single operators.
An operator takes a shard as its `handle`: a compiled graph then is that of all shards, wherever documents begin.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retnet.ops.collectives import all_gather_single, outside_graphs, reduce_scatter_single

# Shards by handle. A graph holds handles alone, and its backward may run when nobody else has the shard.
_SHARDS: "OrderedDict[int, ContextShard]" = OrderedDict()
_MOST_SHARDS = 4096
_numbers, _lock = count(), Lock()


def shard_of(handle: Tensor) -> "ContextShard":
    """The shard of a handle. Raises ValueError if thousands were made after it."""
    shard = _SHARDS.get(int(handle))
    if shard is None:
        raise ValueError(f"a backward needs a shard after {_MOST_SHARDS} newer ones; accepted: one of the last of them")
    return shard


@dataclass(frozen=True)
class ContextShard:
    """Shard `rank` of `size`, of rows of size * tokens tokens, or of one row of packed documents.

    origins: for each shard, the shard where its first sequence began. bounds: of the documents on this shard, 0 to
    tokens; None for rows that are one sequence each. start: tokens of the first sequence on earlier shards. one_row:
    whether the rows are one, as bounds were given; a row of a single document has none here.
    """

    group: Any
    rank: int
    size: int
    tokens: int
    origins: tuple[int, ...]
    bounds: tuple[int, ...] | None
    start: int
    one_row: bool
    handle: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        with _lock:
            number = next(_numbers)
            _SHARDS[number] = self
            if len(_SHARDS) > _MOST_SHARDS:
                _SHARDS.popitem(last=False)
        object.__setattr__(self, "handle", torch.tensor(number, device="cpu"))

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
        packed = len(set(whole)) > 2
        return cls(
            group, rank, size, tokens, origins, tuple(inside) if packed else None, low - begins[rank],
            one_row=cu_seqlens is not None,
        )  # fmt: skip

    @property
    def continues(self) -> bool:
        """Whether the first sequence began on an earlier shard."""
        return self.origins[self.rank] < self.rank

    @property
    def goes_on(self) -> bool:
        """Whether the last sequence goes on in the next shard."""
        after = self.rank + 1
        return after < self.size and self.origins[after] < after

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
        if num_tokens != self.tokens or (self.one_row and num_rows != 1):
            rows = " of one row" if self.one_row else ""
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

    def add_to_last(self, x: Tensor, more: Tensor) -> Tensor:
        """x [N, ...] with `more` added to the sequences of `last`."""
        return x + more if self.bounds is None else torch.cat([x[:-1], x[-1:] + more])

    def carry(self, final: Tensor, total: Tensor) -> Tensor:
        """The state before this shard's first token, from final states [B, ...] and total log decays, which broadcast.

        Zeros where a sequence begins there.
        """
        return torch.ops.retnet.shard_carry(final, total.to(final.dtype), self.handle, self.size)[0]

    def recent(self, ends: Tensor, num_sequences: int) -> Tensor:
        """The tokens before each sequence of this shard [N, W, ...], zeros where it begins on it.

        ends: the last W tokens of this shard [B, W, ...].
        """
        return torch.ops.retnet.shard_recent(ends, self.handle, num_sequences)

    def gathered(self, x: Tensor) -> Tensor:
        """x [B, tokens, ...] of all shards in order, [B, size * tokens, ...]."""
        return torch.ops.retnet.shard_gathered(x, self.handle, self.size)

    @outside_graphs
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
        return out, all_gather_single(out.view(-1), x.contiguous().view(-1), group=self.group, async_op=True)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """The sum over all shards of their parts [size, ...] for this one."""
        out = parts.new_empty(parts.shape[1:])  # contiguous, whatever the strides of the parts
        reduce_scatter_single(out.view(-1), parts.contiguous().view(-1), group=self.group)
        return out


class Exchange:
    """States [B, ...] and total log decays of all shards, under way while what does not need them is computed.

    total: of this shard; None: `totals` of all shards are known from an earlier exchange.
    """

    def __init__(self, shard: ContextShard, state: Tensor, total: Tensor | None, totals: Tensor | None = None):
        self.shard, self._shape, self._totals = shard, state.shape, totals
        self._total_shape = None if total is None else total.shape
        parts = [state] if total is None else [state, total.to(state.dtype)]
        self._all, self._work = shard.start_all_gather(torch.cat([part.detach().flatten() for part in parts]))

    def wait(self) -> tuple[Tensor, Tensor]:
        """The states and totals of all shards [size, B, ...]. On a GPU the stream waits, and not the host."""
        self._work.wait()
        count = self._shape.numel()
        states = self._all[:, :count].unflatten(-1, self._shape)
        if self._total_shape is not None:
            self._totals = self._all[:, count:].unflatten(-1, self._total_shape)
        assert self._totals is not None
        return states, self._totals


def from_before(shard: ContextShard, states: Tensor, totals: Tensor) -> Tensor:
    """The state before this shard's first token, from final states of all shards; zeros if a sequence begins there."""
    carry = torch.zeros_like(states[0])
    for j in range(shard.origins[shard.rank], shard.rank):
        carry.addcmul_(_weight(totals, j, shard.rank), states[j])
    return carry


def from_after(shard: ContextShard, grads: Tensor, totals: Tensor) -> Tensor:
    """The gradient of this shard's final state, from those of the states before the shards after it."""
    found = torch.zeros_like(grads[0])
    for r in range(shard.rank + 1, shard.size):
        if shard.origins[r] <= shard.rank:
            found.addcmul_(_weight(totals, shard.rank, r), grads[r])
    return found


def _weight(totals: Tensor, before: int, rank: int) -> Tensor:
    """The decay of shard `before`'s final state on its way to shard `rank`."""
    return totals[before + 1 : rank].sum(0).exp()


@torch.library.custom_op("retnet::shard_carry", mutates_args=())
def _carry(final: Tensor, total: Tensor, handle: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The carry, and the final states and totals of all shards."""
    shard = shard_of(handle)
    finals, totals = Exchange(shard, final, total).wait()
    return from_before(shard, finals, totals), finals.clone(), totals.clone()


@torch.library.custom_op("retnet::shard_carry_backward", mutates_args=())
def _carry_backward(grad: Tensor, finals: Tensor, totals: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of this shard's final state and total."""
    shard = shard_of(handle)
    grads, _ = Exchange(shard, grad, None, totals).wait()  # of the carries of all shards
    own = shard.rank
    grad_total = torch.zeros_like(totals[own])
    for r in range(own + 1, shard.size):
        for j in range(shard.origins[r], own):
            product = _weight(totals, j, r) * finals[j] * grads[r]
            grad_total += product.sum_to_size(grad_total.shape)
    return from_after(shard, grads, totals), grad_total


@_carry.register_fake
def _(final: Tensor, total: Tensor, handle: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return final.new_empty(final.shape), final.new_empty(size, *final.shape), final.new_empty(size, *total.shape)


@_carry_backward.register_fake
def _(grad: Tensor, finals: Tensor, totals: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    return finals.new_empty(finals.shape[1:]), totals.new_empty(totals.shape[1:])


def _save_carry(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, finals, totals = output
    ctx.save_for_backward(finals, totals, inputs[2])


def _carry_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *torch.ops.retnet.shard_carry_backward(grad, *ctx.saved_tensors), None, None


_carry.register_autograd(_carry_gradient, setup_context=_save_carry)


@torch.library.custom_op("retnet::shard_recent", mutates_args=())
def _recent(ends: Tensor, handle: Tensor, num_sequences: int) -> Tensor:
    shard = shard_of(handle)
    found = shard.all_gather(_of_last_sequence(ends, shard))
    out = ends.new_zeros(num_sequences, *ends.shape[1:])
    if shard.continues:
        shard.first(out).copy_(found[shard.rank - 1])
    return out


@torch.library.custom_op("retnet::shard_recent_backward", mutates_args=())
def _recent_backward(grad: Tensor, handle: Tensor, num_rows: int) -> Tensor:
    """The gradient of the ends [num_rows, W, ...] of this shard."""
    shard = shard_of(handle)
    grads = shard.all_gather(shard.first(grad))
    return _of_last_sequence(grads[shard.rank + 1], shard) if shard.goes_on else torch.zeros_like(grads[0])


def _of_last_sequence(ends: Tensor, shard: ContextShard) -> Tensor:
    """The ends with zeros at tokens before the last sequence."""
    others = max(0, ends.shape[1] - shard.last_tokens)
    return torch.cat([torch.zeros_like(ends[:, :others]), ends[:, others:]], 1)


@torch.library.custom_op("retnet::shard_gathered", mutates_args=())
def _gathered(x: Tensor, handle: Tensor, size: int) -> Tensor:
    return shard_of(handle).all_gather(x).transpose(0, 1).flatten(1, 2)


@torch.library.custom_op("retnet::shard_gathered_backward", mutates_args=())
def _gathered_backward(grad: Tensor, handle: Tensor, size: int) -> Tensor:
    return shard_of(handle).reduce_scatter(grad.unflatten(1, (size, -1)).transpose(0, 1))


@_recent.register_fake
def _(ends: Tensor, handle: Tensor, num_sequences: int) -> Tensor:
    return ends.new_empty(num_sequences, *ends.shape[1:])


@_recent_backward.register_fake
def _(grad: Tensor, handle: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(num_rows, *grad.shape[1:])


@_gathered.register_fake
def _(x: Tensor, handle: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape[0], size * x.shape[1], *x.shape[2:])


@_gathered_backward.register_fake
def _(grad: Tensor, handle: Tensor, size: int) -> Tensor:
    return grad.new_empty(grad.shape[0], grad.shape[1] // size, *grad.shape[2:])


def _save_handle(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, _ = inputs
    ctx.save_for_backward(handle)
    ctx.num_rows, ctx.size = x.shape[0], output.shape[1] // x.shape[1]


def _recent_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.retnet.shard_recent_backward(grad, *ctx.saved_tensors, ctx.num_rows), None, None


def _gathered_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.retnet.shard_gathered_backward(grad, *ctx.saved_tensors, ctx.size), None, None


_recent.register_autograd(_recent_gradient, setup_context=_save_handle)
_gathered.register_autograd(_gathered_gradient, setup_context=_save_handle)
