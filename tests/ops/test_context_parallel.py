"""Shards of long rows: exact on any number of processes, and what is refused.

Threads in lockstep stand for processes, except in one slow test: the mathematics is the same, and starts at once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from retnet.layers import softmax_attention
from retnet.layers.attention import Attention
from retnet.layers.recompute import Recompute
from retnet.ops import context_parallel, context_shard
from retnet.ops.context_shard import ContextShard
from tests.lockstep import Lockstep
from tests.small_models import ALIBI, EXPERTS, GATED, HYENA, NOPE, PAPER, VOCAB, WINDOW, small_model
from tests.torchrun import on_processes

from . import context_checks as checks
from .threads import ContextThread, on_shards

PLACES = [("rows", 2), ("rows", 4), ("over borders", 3), ("at borders", 4), ("one", 3), ("short", 2)]


@pytest.mark.parametrize(("packing", "size"), PLACES)
def test_retention_of_shards_is_that_of_the_row(packing, size):
    for per_token, masked in [(False, False), (True, packing == "rows"), (False, True)]:
        on_shards(size, checks.check_retention, packing, per_token, masked, size)


@pytest.mark.parametrize("exchange", ["during", "before"])
@pytest.mark.parametrize(("packing", "per_token"), [("rows", True), ("over borders", False), ("short", True)])
def test_the_exchange_before_the_output_and_during_it_gives_the_same(packing, per_token, exchange):
    on_shards(3, checks.check_retention, packing, per_token, packing == "rows", 3, exchange)


@pytest.mark.parametrize(("packing", "size"), PLACES)
def test_the_selective_scan_of_shards_is_that_of_the_row(packing, size):
    on_shards(size, checks.check_scan, packing, size)


@pytest.mark.parametrize(("packing", "size"), [("rows", 3), ("over borders", 2), ("at borders", 3), ("short", 2)])
def test_a_hybrid_on_shards_has_the_loss_and_gradients_of_one_process(packing, size):
    on_shards(size, checks.check_model, packing)


def by_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, slopes: Tensor | None, sinks: Tensor | None, before: int = 0
) -> Tensor:
    """`flex_causal_attention` in plain operators."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (before + i - j)
    seen = mask.mask_mod(torch.tensor(0), None, i, j)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(len(q), -1, q.shape[1], -1)), -1)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1)[..., : k.shape[1]], v)


@pytest.mark.parametrize(("packing", "size"), [("rows", 2), ("over borders", 3), ("short", 2)])
def test_masks_for_flex_attention_on_shards_separate_documents_and_windows(monkeypatch, packing, size):
    monkeypatch.setattr(softmax_attention, "flex_causal_attention", by_mask)
    for name, value in {"FLEX_DEVICES": ("cpu",), "FLEX_TOKENS": 1, "FLEX_HEAD_DIM": 1}.items():
        monkeypatch.setattr(Attention, name, value)
    on_shards(size, checks.check_model, packing, "none", (WINDOW, ALIBI, NOPE))


def test_parts_of_any_strides_are_summed(monkeypatch):
    """Of gradients that a product left in another order."""

    def alone(out: Tensor, parts: Tensor, group: None) -> None:
        out.copy_(parts.view(2, -1)[1])

    monkeypatch.setattr(context_shard, "reduce_scatter_single", alone)
    parts = torch.randn(3, 4, 2).permute(2, 1, 0)
    assert torch.equal(ContextShard(None, 1, 2, 3, (0, 0), None, 0, False).reduce_scatter(parts), parts[1])


@pytest.mark.parametrize("size", [2, 3])
def test_rows_in_another_order_are_noticed(size):
    with pytest.raises(AssertionError, match="loss differs"):
        on_shards(size, partial(checks.check_model, order=checks.head_to_tail), "rows")


@pytest.mark.parametrize("level", ["light", "medium", "layer"])
def test_layers_that_are_recomputed_exchange_again(level):
    on_shards(2, checks.check_model, "over borders", level)


def test_no_document_leaks_over_a_border():
    on_shards(3, checks.check_borders)


def nothing(shard: ContextShard, states: Tensor, totals: Tensor) -> Tensor:
    return torch.zeros_like(states[0])


MUTATIONS = {
    "no exchange": {"from_before": nothing},
    "no decay": {"_weight": lambda totals, before, rank: torch.ones_like(totals[rank])},
    "no backward": {"from_after": nothing},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("check", [(checks.check_retention, "rows", True, False, 7), (checks.check_model, "rows")])
def test_a_broken_exchange_is_noticed(monkeypatch, mutation, check):
    for name, broken in MUTATIONS[mutation].items():
        for module in (context_shard, context_parallel):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match="differs"):
        on_shards(3, *check)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_compute_what_one_does(processes):
    assert on_processes(processes, checks.__file__) == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["none", "light"])
def test_compiled_blocks_on_shards_are_one_graph_wherever_documents_begin(level):
    layers = (replace(PAPER, mixer=replace(PAPER.mixer, conv_width=4)), checks.GATED)
    model, compiled = (small_model(layers, dtype="float64").train() for _ in range(2))
    torch._dynamo.reset()
    for layer in compiled.layers:
        layer.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    model.recompute = compiled.recompute = Recompute(level)
    ids, seen = torch.randint(VOCAB, (1, 25), generator=torch.Generator().manual_seed(3)), set()
    for bounds in ([0, 7, 24], [0, 2, 24], [0, 23, 24]):
        losses = []
        for one in (model, compiled):
            one.zero_grad()
            shard = ContextThread.part(0, 1, 24, bounds, Lockstep(1))
            losses.append(one.loss(ids[:, :-1], ids[:, 1:], context=shard))
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
        seen.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(seen) == 1


WHOLE = ContextShard.part(0, 1, 12, None)  # needs no group until something is exchanged


@pytest.mark.parametrize("bounds", [[], [0], [1, 12], [0, 11], [0, 13], [0, 7, 5, 12]])
def test_bounds_that_are_not_those_of_the_row_are_refused(bounds):
    with pytest.raises(ValueError, match="accepted: rising from 0 to 12"):
        ContextShard.part(0, 2, 12, bounds)


@pytest.mark.parametrize("tokens", [0, -4, 1, 5])
def test_rows_that_do_not_split_evenly_are_refused(tokens):
    with pytest.raises(ValueError, match="accepted: a positive multiple of 2"):
        ContextShard.part(0, 2, tokens, None)


@pytest.mark.parametrize("packing", ["rows", "over borders", "short"])
def test_multi_token_prediction_on_shards_trains_as_on_whole_rows(packing):
    on_shards(3, partial(checks.check_model, layers=(checks.PAPER,), mtp=checks.MTP), packing)


@pytest.mark.parametrize(
    ("layer", "message"), [(HYENA, "as long as the row"), (replace(PAPER, feed_forward=EXPERTS), "mixture of experts")]
)
def test_layers_that_need_whole_rows_are_refused_by_name(layer, message):
    model = small_model((PAPER, layer))
    with pytest.raises(ValueError, match=f"layer 1 is .*{message}.*accepted with context"):
        model.hidden(torch.zeros(1, 12, dtype=torch.long), context=WHOLE)


@pytest.mark.parametrize(("shape", "bounds"), [((1, 10), None), ((2, 12), [0, 5, 12])])
def test_tokens_that_are_not_the_shard_are_refused(shape, bounds):
    with pytest.raises(ValueError, match="accepted: 12 tokens"):
        small_model().hidden(torch.zeros(shape, dtype=torch.long), context=ContextShard.part(0, 1, 12, bounds))


@pytest.mark.parametrize("given", ["mask", "cu_seqlens", "state", "carry"])
def test_arguments_that_the_shard_replaces_are_refused(given):
    model = small_model((GATED,))
    value = {
        "mask": torch.ones(1, 12, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 12]),
        "state": model.init_state(1),
        "carry": True,
    }[given]
    with pytest.raises(ValueError, match="accepted: context alone"):
        model.hidden(torch.randint(VOCAB, (1, 12)), context=WHOLE, **{given: value})
