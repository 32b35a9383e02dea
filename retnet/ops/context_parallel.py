"""Retention and the selective scan on one shard of a long row, exactly as on the whole row.

Both are linear in the state before the first token. So a shard computes its own part from an empty state, the shards
exchange their final states, and what the carried state adds comes last. `When` lists when the exchange of retention may
run; benchmarks/bench_context_parallel.py measures each. In the backward, one matrix product makes the gradient of the
carried state, which the shards exchange first. Then the operator's own backward runs once, with the true gradient of
the final state; to run it before the exchange has ended would take three more passes over the tokens.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops.context_shard import ContextShard, Exchange, from_after, from_before, shard_of
from retnet.ops.context_states import Decays, weighted, weighted_state
from retnet.ops.dtypes import wide_dtype
from retnet.ops.retention import checked_call
from retnet.ops.selective_scan import selective_scan

# When a shard exchanges states:
#   after    its output from an empty state; the exchange, while queries are weighted; what the carried state adds
#   during   its final state, by a product of its own; the exchange, while the output is computed; what the state adds
#   before   its final state, by a product of its own; the exchange; the output, once, from the carried state
When = Literal["after", "during", "before"]


def context_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    shard: ContextShard,
    *,
    state: Tensor | None = None,
    exchange: When = "after",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`retention` of the tokens of one shard; arguments and results as there, of this shard.

    state: of the sequences that begin on this shard (a sequence that goes on from the shard before has zeros there).
    cu_seqlens: the shard's own bounds. The returned state is that after the last token of each sequence on the shard.
    exchange: when the states are exchanged; in float16 always before, as a state in float16 may overflow.
    """
    p, plan = checked_call(q, k, v, log_decay, state=state, **options)
    if p.v.dtype == torch.float16:
        exchange = "before"
    tensors = p.q, p.k, p.v, p.log_decay, p.state, p.mask, p.cu_seqlens, shard.handle
    out, final, _, _ = torch.ops.retnet.context_retention(
        *tensors, shard.size, p.scale, plan.chunk_size, plan.mode, exchange
    )
    return out, final


@torch.library.custom_op("retnet::context_retention", mutates_args=())
def _context_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    handle: Tensor,
    size: int,
    scale: float,
    chunk_size: int,
    mode: str,
    exchange: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, the final states [N, H, K, V], the states before each sequence, and the total decays of all shards."""
    problem = RetentionProblem(q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size)
    part = _ShardProblem(problem, shard_of(handle))
    out, final, carried, totals = _ORDERS[exchange](part, mode)
    if carried is None:
        carried = torch.zeros_like(final)
    elif carried is state:
        carried = carried.to(final.dtype, copy=True)
    return out, final, carried, totals.clone()


@_context_retention.register_fake
def _(q, k, v, log_decay, state, mask, cu_seqlens, handle, size, scale, chunk_size, mode, exchange):
    problem = RetentionProblem(q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size)
    final = v.new_empty(problem.state_shape, dtype=wide_dtype(v.dtype))
    return v.new_empty(v.shape), final, torch.empty_like(final), final.new_empty(size, q.shape[0], v.shape[2], 1, 1)


@torch.library.custom_op("retnet::context_retention_backward", mutates_args=())
def _context_retention_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    carried: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    totals: Tensor,
    handle: Tensor,
    scale: float,
    chunk_size: int,
    given: bool,
    need_dlog_decay: bool,
    need_dstate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `retnet::retention_backward`, with the gradients that other shards have of this one's final state.

    given: whether a state was given beside the carried one.
    """
    shard = shard_of(handle)
    state = carried if shard.continues or given else None  # otherwise zeros
    problem = RetentionProblem(q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size)
    dcarry = _ShardProblem(problem, shard).carry_gradient(dout, dfinal)
    grads, _ = Exchange(shard, dcarry, None, totals).wait()
    if shard.goes_on:
        more = from_after(shard, grads, totals)
        dfinal = more.new_zeros(problem.state_shape) if dfinal is None else dfinal
        dfinal = shard.add_to_last(dfinal, more)
    *grads, dlog, dstate = torch.ops.retnet.retention_backward(
        dout, dfinal, *problem.arguments, need_dlog_decay, need_dstate
    )
    nothing = [log_decay.new_empty(0) for _ in range(2)]  # results of an operator may not be one tensor
    return *grads, dlog if need_dlog_decay else nothing[0], dstate if need_dstate else nothing[1]


@_context_retention_backward.register_fake
def _(dout, dfinal, q, k, v, log_decay, carried, mask, cu_seqlens, totals, handle, scale, chunk_size, given, need_dlog,
      need_dstate):  # fmt: skip
    dlog = log_decay.new_empty(log_decay.shape if need_dlog else 0)
    dstate = carried.new_empty(carried.shape if need_dstate else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog, dstate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, log_decay, state, mask, cu_seqlens, handle, _, ctx.scale, ctx.chunk_size, _, _ = inputs
    _, _, carried, totals = output
    ctx.save_for_backward(q, k, v, log_decay, carried, mask, cu_seqlens, totals, handle)
    ctx.state_dtype = None if state is None else state.dtype


def _gradients(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad  # checkpointing allows one look
    dout = torch.zeros_like(saved[2]) if dout is None else dout
    dq, dk, dv, dlog, dstate = torch.ops.retnet.context_retention_backward(
        dout, dfinal, *saved, ctx.scale, ctx.chunk_size, ctx.state_dtype is not None, *needed[3:5]
    )
    dstate = dstate.to(ctx.state_dtype) if needed[4] else None
    return dq, dk, dv, dlog if needed[3] else None, dstate, *[None] * 8


_context_retention.register_autograd(_gradients, setup_context=_save)


class _ShardProblem:
    """A problem of one shard, with the parts that cross its borders: the first sequence and the last one."""

    def __init__(self, problem: RetentionProblem, shard: ContextShard):
        self.problem, self.shard = problem, shard
        self.first = slice(0, shard.first_tokens)
        self.last = slice(shard.tokens - shard.last_tokens, shard.tokens)

    def decays(self, tokens: slice) -> Decays:
        log_decay, mask = self.problem.log_decay, self.problem.mask
        part = log_decay[:, tokens] if self.problem.per_token else log_decay
        return Decays(part, self.problem.q[:, tokens].shape[1], None if mask is None else mask[:, tokens])

    def real(self, x: Tensor, tokens: slice) -> Tensor:
        """x [B, T, ...] of the tokens, with zeros at masked ones, where x may be NaN."""
        mask = self.problem.mask
        return x[:, tokens] if mask is None else x[:, tokens].masked_fill(~mask[:, tokens, None, None], 0)

    def total(self) -> Tensor:
        """The total log decay of this shard's tokens [B, H, 1, 1]."""
        total = self.decays(slice(None)).total()
        return total.expand(self.problem.q.shape[0], *total.shape[1:])

    def final_state(self) -> Tensor:
        """The final state of the last sequence from this shard's tokens alone; zeros where it ends here."""
        p, shard, last = self.problem, self.shard, self.last
        if not shard.goes_on:  # nobody reads it
            return p.v.new_zeros(p.q.shape[0], *p.state_shape[1:], dtype=wide_dtype(p.v.dtype))
        decays = self.decays(last)
        own = weighted_state(self.real(p.k, last), self.real(p.v, last), decays.after())
        return own if p.state is None else own + decays.total().exp() * shard.last(p.state)

    def run(self, state: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
        """The operator on this shard, from a state before each sequence."""
        p = self.problem
        given = RetentionProblem(p.q, p.k, p.v, p.log_decay, p.scale, state, p.mask, p.cu_seqlens, p.chunk_size)
        return torch.ops.retnet.retention(*given.arguments, mode, wide_dtype(p.v.dtype), True)

    def with_carry(self, carry: Tensor) -> Tensor | None:
        """The state before each sequence: the given one, and the carry of the first sequence."""
        given = self.problem.state
        if not self.shard.continues:
            return given
        if given is None:
            given = carry.new_zeros(self.problem.state_shape)
        return self.shard.add_to_first(given.to(carry.dtype), carry)

    def carry_gradient(self, dout: Tensor, dfinal: Tensor | None) -> Tensor:
        """The gradient of the carry from this shard's output and final states alone."""
        p, shard = self.problem, self.shard
        if not shard.continues:  # nobody reads it
            return p.v.new_zeros(p.q.shape[0], *p.state_shape[1:], dtype=wide_dtype(p.v.dtype))
        decays = self.decays(self.first)
        grad = weighted_state(self.real(p.q, self.first), self.real(dout, self.first), decays.upto(), p.scale)
        if dfinal is not None:
            grad = grad + decays.total().exp() * shard.first(dfinal)
        return grad


def _exchange_after(part: _ShardProblem, mode: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """out, the final states, the states before each sequence, and the total decays of all shards."""
    out, final = part.run(part.problem.state, mode)
    return _with_carry(part, out, final, Exchange(part.shard, part.shard.last(final), part.total()))


def _exchange_during(part: _ShardProblem, mode: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    exchange = Exchange(part.shard, part.final_state(), part.total())
    return _with_carry(part, *part.run(part.problem.state, mode), exchange)


def _with_carry(
    part: _ShardProblem, out: Tensor, final: Tensor, exchange: Exchange
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The results, from those of empty states."""
    problem, shard = part.problem, part.shard
    queries, kept = out, final
    if shard.continues:
        decays = part.decays(part.first)
        kept = decays.total().exp()
        queries = weighted(part.real(problem.q, part.first), decays.upto(), problem.scale)
    states, totals = exchange.wait()
    carry = from_before(shard, states, totals)
    if shard.continues:
        out = _with_reads(out, queries, carry.to(out.dtype))
        final = shard.add_to_first(final, kept * carry)
    return out, final, part.with_carry(carry), totals


def _with_reads(out: Tensor, queries: Tensor, carry: Tensor) -> Tensor:
    """out [B, T, H, V] plus what queries [B, t, H, K] of the first t tokens read from the carry [B, H, K, V].

    `out` is left as it is: selective checkpointing may hold it.
    """
    t, out = queries.shape[1], out.clone()
    for row, reads, state in zip(out, queries, carry, strict=True):
        row[:t].transpose(0, 1).baddbmm_(reads.transpose(0, 1), state)
    return out


def _exchange_before(part: _ShardProblem, mode: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    states, totals = Exchange(part.shard, part.final_state(), part.total()).wait()
    state = part.with_carry(from_before(part.shard, states, totals))
    return *part.run(state, mode), state, totals


_ORDERS = {"after": _exchange_after, "during": _exchange_during, "before": _exchange_before}


def context_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    shard: ContextShard,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of the tokens of one shard; arguments and results as there, of this shard."""
    y, final = selective_scan(x, step, rate, write, read, cu_seqlens=cu_seqlens)
    wide = wide_dtype(x.dtype)
    first = slice(0, shard.first_tokens)

    def decay(tokens: slice) -> Tensor:
        return step[:, tokens].to(wide).sum(1)[..., None] * rate.to(wide)

    carry = shard.carry(shard.last(final), decay(slice(None)))
    more, _ = selective_scan(
        torch.zeros_like(x[:, first]), step[:, first], rate, write[:, first], read[:, first], state=carry
    )
    y = torch.cat([y[:, first] + more, y[:, shard.first_tokens :]], 1)
    return y, shard.add_to_first(final, decay(first).exp() * carry)
