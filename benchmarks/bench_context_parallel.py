"""The exchange of states between the shards of a long row: three forms, with and without overlap, beside attention's.

    torchrun --nproc_per_node=2 benchmarks/bench_context_parallel.py [--tokens 8192 32768 131072] [--csv FILE]
    torchrun --nproc_per_node=2 benchmarks/bench_context_parallel.py --tiny                CPU, gloo

Sizes are those of a layer of retnet-1.3b (8 heads, 256 keys, 512 values; states in float32, tokens in bfloat16), on any
number of GPUs of one process each. Forms of the exchange, each for one direction:

    all-gather   every process receives all states and sums those before it
    ring         a chain: a process receives the carry, adds its own state, and sends it on
    all-to-all   every process sums the states of some heads for all, in two exchanges

"exchange" rows time it alone. "forward" and "step" (forward and backward) rows time retention of one shard:

    local        without an exchange
    after, during, before    when the states are exchanged (`retnet/ops/context_parallel.py`): the first two overlap it

A row has the time of the slowest process, the time beyond "local", and the bytes that a process receives per layer and
direction. Each form's results are compared with the all-gather's before it is timed.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.distributed as dist
from runner import Point, arguments, join_processes, report
from torch import Tensor

from retnet import retention
from retnet.ops import context_parallel, context_shard
from retnet.ops.attention import causal_attention
from retnet.ops.context_attention import gathered_attention, has_ring_kernel, ring_attention
from retnet.ops.context_parallel import When, context_retention
from retnet.ops.context_shard import ContextShard, Exchange
from retnet.ops.decay import paper_log_decay


@dataclass(frozen=True)
class Sizes:
    """heads, keys, values: of retention. attention_heads, head_dim: of a Llama of the same size. width: of the short
    convolution."""

    heads: int = 8
    keys: int = 256
    values: int = 512
    attention_heads: int = 16
    head_dim: int = 128
    width: int = 4


TINY = Sizes(2, 8, 16, 2, 16)


class Ring:
    """The exchange as a chain. It cannot begin before the carry arrives, so nothing of it is under way meanwhile."""

    def __init__(self, shard: ContextShard, state: Tensor, total: Tensor | None, totals: Tensor | None = None):
        self._shard, self._state, self._backward = shard, state.contiguous(), total is None
        self._totals = shard.all_gather(total) if total is not None else totals

    def wait(self) -> tuple[Tensor, Tensor]:
        """(the carry, total decays of all shards)"""
        shard, step, totals = self._shard, -1 if self._backward else 1, self._totals
        assert totals is not None
        carry = torch.zeros_like(self._state)
        if 0 <= shard.rank - step < shard.size:
            dist.recv(carry, shard.rank - step, group=shard.group)
        if 0 <= shard.rank + step < shard.size:
            dist.send(torch.addcmul(self._state, totals[shard.rank].exp(), carry), shard.rank + step, group=shard.group)
        return carry, totals


class AllToAll:
    """The exchange by heads: a process gets its heads' states of all shards, and returns the carries of all shards."""

    def __init__(self, shard: ContextShard, state: Tensor, total: Tensor | None, totals: Tensor | None = None):
        self._shard, self._shape, self._backward = shard, state.shape, total is None
        self._totals = shard.all_gather(total) if total is not None else totals
        H = state.shape[1]
        if H % shard.size:
            raise ValueError(f"{H} heads on {shard.size} processes; accepted: a number of processes that divides them")
        parts = state.unflatten(1, (shard.size, -1)).transpose(0, 1).contiguous()
        self._given = torch.empty_like(parts)
        self._work = dist.all_to_all_single(self._given, parts, group=shard.group, async_op=True)

    def wait(self) -> tuple[Tensor, Tensor]:
        """(the carry, total decays of all shards)"""
        self._work.wait()
        shard, totals = self._shard, self._totals
        assert totals is not None
        heads = totals.expand(-1, -1, self._shape[1], -1, -1).unflatten(2, (shard.size, -1))[:, :, shard.rank]
        carries, order = torch.empty_like(self._given), range(shard.size)
        carry = torch.zeros_like(self._given[0])
        for r in reversed(order) if self._backward else order:
            carries[r] = carry
            carry = torch.addcmul(self._given[r], heads[r].exp(), carry)
        mine = torch.empty_like(carries)
        dist.all_to_all_single(mine, carries, group=shard.group)
        return mine.transpose(0, 1).reshape(self._shape), totals


def own(shard: ContextShard, carry: Tensor, totals: Tensor) -> Tensor:
    return carry


FORMS: dict[str, type] = {"all-gather": Exchange, "ring": Ring, "all-to-all": AllToAll}


def exchanged_by(form: str) -> AbstractContextManager[object]:
    """Retention of shards with this form of exchange."""
    if form == "all-gather":
        return nullcontext()
    return patch.multiple(context_parallel, Exchange=FORMS[form], from_before=own, from_after=own)


class Bench:
    """One process of the benchmark."""

    def __init__(self, options: argparse.Namespace):
        self.device = join_processes(on_cpu=options.tiny)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.sizes = TINY if options.tiny else Sizes()
        self.repeats = 2 if options.tiny else options.repeats
        self.size, self.csv = dist.get_world_size(), options.csv

    def microseconds(self, run: Callable[[], object]) -> float:
        """Mean time of a call on the slowest process. All processes make the same number of calls."""
        for _ in range(3):
            run()
        self._wait()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(self.repeats):
            run()
        self._wait()
        spent = torch.tensor([1e6 * (time.perf_counter() - begin) / self.repeats], device=self.device)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        return spent.item()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def point(self, case: str, form: str, what: str, spent: float, received: float | None, note: str = "") -> None:
        """A row, printed and written by the first process."""
        if dist.get_rank() == 0:
            facts = f"{spent:.0f} us {note}".strip()
            report([Point("context", case, form, what, spent / 1e3, extra_bytes=received, note=facts)], self.csv)

    def received(self, form: str, state_bytes: int) -> float:
        """Bytes that a process receives in one exchange of states."""
        share = (self.size - 1) / self.size
        return {"all-gather": (self.size - 1), "ring": 1, "all-to-all": 2 * share}[form] * state_bytes


def exchanges(bench: Bench) -> None:
    """The exchange alone."""
    s, shard = bench.sizes, ContextShard.of(bench.size)
    state = torch.randn(1, s.heads, s.keys, s.values, device=bench.device)
    total = torch.full((1, s.heads, 1, 1), -0.1, device=bench.device)

    def carry(form: str, backward: bool) -> Tensor:
        totals = shard.all_gather(total) if backward else None
        states, totals = FORMS[form](shard, state, None if backward else total, totals).wait()
        if form != "all-gather":
            return states
        return (context_shard.from_after if backward else context_shard.from_before)(shard, states, totals)

    for form in forms_for(bench):
        for backward in (False, True):
            torch.testing.assert_close(carry(form, backward), carry("all-gather", backward))
        spent = bench.microseconds(partial(carry, form, False))
        bench.point("one state per head", form, "exchange", spent, bench.received(form, state.nbytes))
    ends = torch.randn(
        1, s.width - 1, 2 * s.heads * s.keys + s.heads * s.values, device=bench.device, dtype=bench.dtype
    )
    spent = bench.microseconds(lambda: shard.recent(ends, 1))
    bench.point(f"last {s.width - 1} inputs", "all-gather", "exchange", spent, (bench.size - 1) * ends.nbytes)


def forms_for(bench: Bench) -> list[str]:
    return [form for form in FORMS if form != "all-to-all" or bench.sizes.heads % bench.size == 0]


def retention_of_shards(bench: Bench, tokens: int) -> None:
    """Retention of one layer, forward, and forward with backward."""
    s, shard = bench.sizes, ContextShard.of(tokens * bench.size)
    shapes = [(s.heads, s.keys), (s.heads, s.keys), (s.heads, s.values)]
    q, k, v = (torch.randn(1, tokens, *x, device=bench.device, dtype=bench.dtype).requires_grad_() for x in shapes)
    decay = paper_log_decay(s.heads).to(bench.device, torch.float32)
    weight, case = torch.randn_like(v), f"{tokens} tokens per shard"
    state_bytes = 4 * s.heads * s.keys * s.values

    def forward(call: Callable[..., tuple[Tensor, Any]]) -> Tensor:
        with torch.no_grad():
            return call(q, k, v, decay)[0]

    def step(call: Callable[..., tuple[Tensor, Any]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(q, k, v, decay)[0], (q, k, v), weight)

    local = partial(retention, return_state=False)
    alone = {what: bench.microseconds(partial(run, local)) for what, run in (("forward", forward), ("step", step))}
    for what, spent in alone.items():
        bench.point(case, "local", what, spent, 0.0)
    expected = forward(partial(context_retention, shard=shard))
    gradients = step(partial(context_retention, shard=shard))
    for form in forms_for(bench):
        with exchanged_by(form):
            for when in get_args(When):
                call = partial(context_retention, shard=shard, exchange=when)
                close = {"rtol": 5e-2, "atol": 5e-1} if bench.cuda else {"rtol": 1e-3, "atol": 1e-3}
                torch.testing.assert_close(forward(call), expected, **close)
                torch.testing.assert_close(step(call), gradients, **close)
                name = f"{form}, {when}"
                for what, run in (("forward", forward), ("step", step)):
                    spent = bench.microseconds(partial(run, call))
                    received = bench.received(form, state_bytes) * (1 if what == "forward" else 2)
                    bench.point(case, name, what, spent, received, f"{spent - alone[what]:+.0f} us")


def attention_of_shards(bench: Bench, tokens: int) -> None:
    """Attention of a layer of a Llama of the same size, whose keys and values are exchanged."""
    s, shard = bench.sizes, ContextShard.of(tokens * bench.size)
    shape = 1, tokens, s.attention_heads, s.head_dim
    q, k, v = (torch.randn(*shape, device=bench.device, dtype=bench.dtype).requires_grad_() for _ in range(3))
    weight, case = torch.randn_like(v), f"{tokens} tokens per shard"
    received, positions = 2 * (bench.size - 1) * k.nbytes, shard.start + torch.arange(tokens, device=bench.device)[None]

    def step(call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(q, k, v), (q, k, v), weight)

    def gather() -> None:
        with torch.no_grad():
            shard.gathered(k), shard.gathered(v)

    bench.point(case, "attention, gather", "exchange", bench.microseconds(gather), received)
    alone = bench.microseconds(partial(step, causal_attention))
    bench.point(case, "attention, local", "step", alone, 0.0)
    forms: dict[str, Callable[..., Tensor]] = {}
    if has_ring_kernel(q.device, q.dtype, *q.shape[1:]):
        forms["attention, ring"] = partial(ring_attention, shard=shard)
    if not bench.cuda:  # on a GPU, blocks of queries with masks of whole rows would take minutes
        forms["attention, gathered"] = partial(gathered_attention, positions=positions, shard=shard, window=None)
    for name, call in forms.items():
        spent = bench.microseconds(partial(step, call))
        bench.point(case, name, "step", spent, 2 * received, f"{spent - alone:+.0f} us")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="per shard (default: 8192 32768 131072)")
    parser.add_argument("--attention-tokens", type=int, nargs="*", default=None, help="(default: 8192 32768)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small sizes on CPUs")
    options = parser.parse_args()
    bench, given = Bench(options), options.tokens
    exchanges(bench)
    for tokens in given or ([64] if options.tiny else [8192, 32768, 131072]):
        retention_of_shards(bench, tokens)
    short = [64] if options.tiny else [8192, 32768]
    for tokens in short if options.attention_tokens is None else options.attention_tokens:
        attention_of_shards(bench, tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
