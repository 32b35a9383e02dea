"""Checks of shards of rows against the whole rows, in float64; the processes of a torchrun run them as a script.

Every shard computes the whole rows too and compares its own part: outputs, final states and gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from retnet import LanguageModel, retention
from retnet.layers.recompute import Level, Recompute
from retnet.layers.softmax_attention import SoftmaxAttention
from retnet.ops import context_attention
from retnet.ops.context_attention import has_ring_kernel
from retnet.ops.context_parallel import When, context_retention, context_scan
from retnet.ops.context_shard import ContextShard
from retnet.ops.selective_scan import selective_scan
from tests.small_models import (
    ALIBI,
    CONV,
    LATENT,
    LIGHTNING,
    MAMBA1,
    MAMBA2,
    MTP,
    NOPE,
    PAPER,
    REBUILT,
    VOCAB,
    WINDOW,
    small_model,
)

Shards = Callable[[int, list[int] | None], ContextShard]  # the shard of the caller


class Differences(threading.local):
    """Of one shard. They are raised when all exchanges of a check are over: otherwise the other shards would wait."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def compare(self, name: str, mine: Tensor, expected: Tensor) -> None:
        try:
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
        except AssertionError as error:
            self.found.append(f"{name} differs: {error}")

    def settle(self) -> None:
        found, self.found = "\n".join(self.found), []
        assert not found, found


DIFFERENCES = Differences()
compare, settle = DIFFERENCES.compare, DIFFERENCES.settle


def decays(generator: torch.Generator, *shape: int) -> Tensor:
    """Log decays in [-1, -1e-6], as many of each order of magnitude: what crosses a border must matter."""
    return -(10 ** (-6 * torch.rand(*shape, dtype=torch.float64, generator=generator)))


def bounds_of(packing: str, tokens: int, size: int) -> list[int] | None:
    """Documents of a row: none, over borders, at borders, one over several shards, many on one shard."""
    total = tokens * size
    return {
        "rows": None,
        "over borders": [0, tokens // 2, tokens + 3, total - 2, total],
        "at borders": sorted({0, tokens, tokens + 1, total - tokens, total}),
        "one": [0, total],
        "short": sorted({0, 1, 3, 4, tokens - 1, tokens, tokens + 2, total - 1, total}),
    }[packing]


class Whole:
    """Leaves of a whole row, and this process's parts of them as leaves of their own."""

    def __init__(self, shard: ContextShard, **tensors: Tensor):
        self.shard = shard
        low, high = shard.rank * shard.tokens, (shard.rank + 1) * shard.tokens
        self.tokens = slice(low, high)
        self.whole = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        self.part = {name: self.cut(name, x).clone().requires_grad_() for name, x in tensors.items()}

    def cut(self, name: str, x: Tensor) -> Tensor:
        return x if name in ("rate", "fixed_decay") else x[:, self.tokens]

    def compare(self, of_whole: Tensor, of_part: Tensor) -> None:
        """The gradients of two losses: shared leaves have the sum over the processes."""
        of_whole.backward()
        of_part.backward()
        for name, x in self.part.items():
            assert x.grad is not None
            assert self.whole[name].grad is not None
            grad = self.shard.total(x.grad) if self.cut(name, x) is x else x.grad
            compare(f"the gradient of {name}", grad, self.cut(name, self.whole[name].grad))


def last_of_each(bounds: list[int] | None, shard: ContextShard) -> list[int] | None:
    """Where the documents of this shard end on it, as tokens of the row; None for whole rows."""
    return None if shard.bounds is None else [shard.rank * shard.tokens + end for end in shard.bounds[1:]]


def check_retention(
    of: Shards, size: int, packing: str, per_token: bool, masked: bool, seed: int, exchange: When = "after"
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, B, G, H, K, V = 13, 1 if bounds_of(packing, 13, size) else 2, 2, 4, 3, 5
    bounds, T = bounds_of(packing, tokens, size), tokens * size
    shard = of(T, bounds)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = draw(B, T, G, K), draw(B, T, G, K), draw(B, T, H, V)
    decay = {"decay": decays(generator, B, T, H)} if per_token else {"fixed_decay": decays(generator, H)}
    if per_token:
        decay["decay"][:, T // 2 + 1, 0] = -torch.inf  # a hard reset of one head
    mask = torch.rand(B, T, generator=generator) < 0.8 if masked else None
    before = draw(B, H, K, V) if bounds is None else None
    both = Whole(shard, q=q, k=k, v=v, **decay)

    def call(function: Callable, leaves: dict[str, Tensor], *more: object, **options: object):
        log_decay = leaves.get("decay", leaves.get("fixed_decay"))
        return function(leaves["q"], leaves["k"], leaves["v"], log_decay, *more, **options)

    packed = None if bounds is None else torch.tensor(bounds)
    here = None if shard.bounds is None else torch.tensor(shard.bounds)
    out, final = call(retention, both.whole, state=before, mask=mask, cu_seqlens=packed, mode="recurrent")
    start = before if before is not None and shard.rank == 0 else None
    part_mask = None if mask is None else mask[:, both.tokens]
    mine, state = call(
        context_retention, both.part, shard, state=start, mask=part_mask, cu_seqlens=here, exchange=exchange
    )
    compare("out", mine, out[:, both.tokens])
    ends = last_of_each(bounds, shard)
    if ends is None and shard.rank == size - 1:
        compare("state", state, final)
    if ends is not None:
        for n, end in enumerate(ends):
            if end in bounds:
                compare(f"state {n}", state[n], final[bounds.index(end) - 1])
    weight, of_state = draw(*out.shape), draw(*final.shape)
    part = (mine * weight[:, both.tokens]).sum()
    whole = (out * weight).sum()
    if ends is None:  # a loss on the final state reaches back through every exchange
        whole = whole + (final * of_state).sum()
        part = part + (state * (of_state if shard.rank == size - 1 else 0)).sum()
    both.compare(whole, part)
    settle()


def check_scan(of: Shards, size: int, packing: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, D, N = 11, 3, 4
    bounds, T = bounds_of(packing, tokens, size), tokens * size
    B = 2 if bounds is None else 1
    shard = of(T, bounds)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    step = -decays(generator, B, T, D)
    both = Whole(shard, x=draw(B, T, D), step=step, rate=-draw(D, N).exp(), write=draw(B, T, N), read=draw(B, T, N))
    packed = None if bounds is None else torch.tensor(bounds)
    here = None if shard.bounds is None else torch.tensor(shard.bounds)
    y, final = selective_scan(*both.whole.values(), cu_seqlens=packed)
    mine, state = context_scan(*both.part.values(), shard, cu_seqlens=here)
    compare("y", mine, y[:, both.tokens])
    if shard.rank == size - 1:
        compare("state", state[-1], final[-1])
    weight = draw(*y.shape)
    both.compare((y * weight).sum(), (mine * weight[:, both.tokens]).sum())
    settle()


GATED = replace(PAPER, mixer=replace(PAPER.mixer, decay="gated", conv_width=4))
HYBRID = (MAMBA2, PAPER, WINDOW, MAMBA1, ALIBI, CONV, NOPE, GATED, LIGHTNING, LATENT, REBUILT)


IN_ORDER = context_attention._in_order
ROTARY = replace(NOPE, mixer=replace(NOPE.mixer, rotary="half"))
Order = Callable[[Tensor, int], Tensor]


def in_order(x: Tensor, size: int) -> Tensor:
    return x


def head_to_tail(x: Tensor, size: int) -> Tensor:
    """Rows [B, T] as PyTorch's context parallelism balances them: a piece of the head and one of the tail per shard."""
    pieces = x.chunk(2 * size, 1)
    return torch.cat([pieces[n] for r in range(size) for n in (r, 2 * size - 1 - r)], 1)


@contextmanager
def balanced(dtype: torch.dtype) -> Iterator[Any]:
    """`context_attention._in_order` with the balance that PyTorch has by default."""
    with IN_ORDER(dtype) as ring, patch.multiple(ring._cp_options, enable_load_balance=True):
        yield ring


def check_model(
    of: Shards, size: int, packing: str, level: Level = "none", layers=HYBRID, order: Order = in_order, mtp=None
) -> None:
    """Loss and gradients of a hybrid of every mixer that takes shards; labels were shifted on the whole row."""
    model = small_model(layers, dtype="float64", mtp=mtp).train()
    model.recompute = Recompute(level)
    tokens = 12
    bounds, T = bounds_of(packing, tokens, size), tokens * size
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCAB, (2 if bounds is None else 1, T + 1), generator=generator)
    ids, labels = rows[:, :-1], rows[:, 1:].clone()
    labels[:, ::5] = -100
    shard = of(T, bounds)
    mine = slice(shard.rank * tokens, (shard.rank + 1) * tokens)
    packed = None if bounds is None else torch.tensor(bounds)
    loss = model.loss(ids, labels, cu_seqlens=packed)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    part = model.loss(order(ids, size)[:, mine], order(labels, size)[:, mine], context=shard)
    part.backward()
    compare("loss", shard.total(part), loss.detach())
    for (name, p), grad in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None, name
        compare(f"the gradient of {name}", shard.total(p.grad), grad)
    settle()


def check_ring(of: Shards, size: int) -> None:
    """Rows of one document in a ring, whatever PyTorch's global options say; queries share keys."""
    # Keys that are wider than values have no ring; those of the other latents do.
    wide, rebuilt = replace(LATENT.mixer, rope_dim=8), replace(REBUILT.mixer, window=None)
    layers = (PAPER, ROTARY, NOPE, replace(LATENT, mixer=wide), replace(REBUILT, mixer=rebuilt))
    with patch.multiple(SoftmaxAttention, RING_DEVICES=("cpu",)):
        assert has_ring_kernel(torch.device("cpu"), torch.float64, 12, 2, 16)
        for level in ("none", "light"):
            check_model(of, size, "rows", level, layers=layers)
        with patch.multiple(context_attention, _in_order=balanced):
            try:
                check_model(of, size, "rows", layers=(PAPER, ROTARY, NOPE))
            except AssertionError:
                return
    raise AssertionError("rows reordered for balance pass the check")


def check_borders(of: Shards, size: int) -> None:
    """No document leaks over a border: other tokens before it change nothing on later shards."""
    model: LanguageModel = small_model(HYBRID, dtype="float64")
    tokens = 12
    ids = torch.randint(VOCAB, (1, size * tokens), generator=torch.Generator().manual_seed(2))
    shard = of(size * tokens, [r * tokens for r in range(size + 1)])
    others = (ids + 1) % VOCAB
    seen = [
        model.hidden(x[:, shard.rank * tokens : (shard.rank + 1) * tokens], context=shard)[0]
        for x in (ids, torch.cat([others[:, :tokens], ids[:, tokens:]], 1))
    ]
    assert torch.equal(*seen) == (shard.rank > 0)


PACKINGS = ("rows", "over borders", "at borders", "one", "short")


def check_all(of: Shards, size: int) -> None:
    for seed, packing in enumerate(PACKINGS):
        for per_token in (False, True):
            check_retention(of, size, packing, per_token, packing == "rows" and per_token, seed)
            for exchange in ("during", "before"):
                check_retention(of, size, packing, per_token, packing == "over borders", seed, exchange)
        check_retention(of, size, packing, False, True, seed)
        check_scan(of, size, packing, seed)
    for packing in PACKINGS:
        check_model(of, size, packing)
        check_model(of, size, packing, layers=(PAPER,), mtp=MTP)
    for level in ("light", "layer"):
        check_model(of, size, "rows", level)
    check_ring(of, size)
    check_borders(of, size)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    check_all(ContextShard.of, dist.get_world_size())
    dist.barrier()
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
