"""Engines of a split model, one per process: tokens, states and failures. Threads stand for processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retnet.models.decode.sampling import Sampling
from retnet.serve.engine import Engine
from retnet.serve.request import Refused, Request
from retnet.serve.speculation import Speculation
from tests.models.parallel.tensor_checks import FUSED, HYBRID, Split, check_engine
from tests.models.parallel.threads import on_threads
from tests.small_models import prompt, small_model

GREEDY = Sampling(temperature=0)


def test_requests_have_the_tokens_of_one_process():
    on_threads(2, check_engine, FUSED[1:2])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"deferred_writes": 16}, {"speculation": Speculation(draft_tokens=3)}], ids=str)
@pytest.mark.parametrize("layers", [FUSED, HYBRID], ids=["fused", "hybrid"])
def test_options_change_no_token(options, layers):
    on_threads(2, check_engine, layers, **options)


def sampled(split: Split) -> None:
    part = split(small_model(FUSED[:1]))
    engine = Engine(part, num_slots=1)
    generation = engine.submit(Request(prompt(5), 12, Sampling(logprobs=0), ignore_eos=True))
    engine.run()
    reports = [report.logprob for report in generation.logprobs]
    own = torch.tensor([*generation.tokens, *reports], dtype=torch.float64)
    assert torch.equal(own, part.shard.first_(own.clone()))


def test_requests_without_a_seed_have_the_same_tokens_on_all_processes():
    on_threads(2, sampled)


def with_a_broken_head(split: Split) -> None:
    """One process alone has a decay that is not a number."""
    part = split(small_model(FUSED[1:2]))
    if part.shard.rank == 1:
        with torch.no_grad():
            part.layers[0].mixer.decay_proj.weight[0, 0] = torch.nan
    engine = Engine(part, num_slots=1, prefix_cache_bytes=1 << 20, prompt_chunk=8)
    generations = [engine.submit(Request(prompt(19), count, GREEDY)) for count in (4, 0)]
    engine.run()
    outcome = torch.tensor([generation.finish_reason == "failed" for generation in generations])
    kept = engine.stats().prefix.states
    assert outcome.all()
    assert kept == 0


def test_a_failure_of_one_process_is_that_of_all():
    on_threads(2, with_a_broken_head)


def with_snapshots(split: Split) -> None:
    model = small_model(FUSED[:1])
    part = split(small_model(FUSED[:1]))
    engine = Engine(part, num_slots=1)
    generation = engine.submit(Request(prompt(9), 5, GREEDY, keep_state=True, ignore_eos=True))
    engine.run()
    own, other = generation.snapshot, replace(generation.snapshot, model="of another process")
    continued = engine.submit(Request([], 3, GREEDY, ignore_eos=True), own)
    engine.run()
    assert len(continued.tokens) == 3
    with pytest.raises(Refused, match=f"this one is {part.shard} of a split model"):
        engine.submit(Request([], 3), other)
    with pytest.raises(Refused, match="another model"):
        Engine(model, num_slots=1).submit(Request([], 3), own)
    fingerprints = part.shard.all_gather(torch.tensor([int(engine.fingerprint[:12], 16)]))
    assert len(fingerprints.unique()) == 2


def test_snapshots_hold_the_heads_of_a_process_and_others_refuse_them():
    on_threads(2, with_snapshots)
