"""The fused step computes what the model's modules do, in the model's own memory; deferred writes and NaN states."""

from dataclasses import replace

import pytest
import torch

from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.decode.fused import FusedBlock, FusedModel
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_model, save_model
from retnet.models.lm import LanguageModel
from retnet.serve.engine import Engine
from retnet.serve.pool import SlotPool
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from tests.small_models import PAPER, prompt, small_model

GREEDY = Sampling(temperature=0, logprobs=2)
MLP, GLU = FeedForwardConfig(24, bias=True), FeedForwardConfig(24, gated=True, activation="swish")
SHAPES = {
    "paper": BlockConfig(RetentionConfig(2, 16, 32), FeedForwardConfig(32)),
    "gated": BlockConfig(RetentionConfig(2, 16, 32, decay="gated", bias=True), MLP, residual_scale=0.5, skip_scale=1.5),
    "fla": BlockConfig(
        RetentionConfig(4, 32, 64, rotary="half", head_norm="rms", head_norm_affine="shared", num_kv_heads=2),
        GLU,
        norm="rms",
    ),
    "learnt": BlockConfig(
        RetentionConfig(2, 16, 32, learnable_decay=True, head_norm_affine="per_head", gate="none", rotary="none"), None
    ),
    "convolution": BlockConfig(
        RetentionConfig(2, 16, 32, decay="gated", gated_start="paper", conv_width=4, gate="sigmoid"), GLU, norm="rms"
    ),
    "convolution of q and v": BlockConfig(
        RetentionConfig(4, 32, 64, conv_width=3, conv_on=("q", "v"), conv_activation="none", num_kv_heads=2), MLP
    ),
    "head norm over all heads": BlockConfig(
        RetentionConfig(
            4,
            32,
            64,
            decay="alibi",
            decay_scale=0.5,
            rotary="half",
            gate="sigmoid",
            head_norm="rms",
            head_norm_affine="per_head",
            head_norm_groups=1,
        ),
        GLU,
        norm="rms",
        residual_scale=0.7,
        feed_forward_residual_scale=0.4,
        feed_forward_skip_scale=1.2,
    ),
    "yarn": BlockConfig(RetentionConfig(2, 16, 32, decay=(0.3, 0.99), rotary_factor=4.0, rotary_yarn_length=32), MLP),
}


def shaped_model(shape: str) -> LanguageModel:
    model = small_model((SHAPES[shape],) * 2, logit_scale=1.25, logit_soft_cap=20.0)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "norm.bias", "norm_weight", "_proj.bias")):
            torch.nn.init.normal_(weight, 0.5, 0.5, generator)
    return model


def engine_of(model, **options) -> Engine:
    return Engine(model, **{"num_slots": 4, "max_tokens": 200, "prompt_chunk": 8, "prompt_budget": 8, **options})


def run(engine: Engine, *requests: Request) -> list:
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return generations


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_fused_blocks_compute_what_their_modules_do(shape):
    model = shaped_model(shape)
    assert all(FusedBlock.supports(block) for block in model.layers)
    state = SlotPool(model, num_slots=4).state
    expected, fused = state.clone(), FusedModel(model)
    for step in range(5):
        tokens = torch.tensor([step, 7, 3 * step, 11])
        active = torch.tensor([True, step % 2 == 0, step != 3, True])
        out, _ = model.hidden(tokens[:, None], expected, mask=active[:, None], carry=True, in_place=True)
        logits = model.logits(out[:, 0])
        ours, _ = fused(tokens, state, active)
        torch.testing.assert_close(ours[active], logits[active], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(state, expected, strict=True):
        assert torch.equal(mine.position, theirs.position)
        # Relative to the norm: a value near 0 has the rounding error of its neighbours.
        for name, x in theirs.tensors().items():
            assert (getattr(mine, name) - x).double().norm() <= 1e-5 * x.double().norm(), name


def test_packing_moves_weights_and_copies_none(tmp_path):
    model = small_model(tie_embeddings=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = run(engine_of(model), Request(prompt(9), 8, GREEDY))[0].tokens
    assert model.head.weight is model.embedding.weight
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    mixer = model.layers[0].mixer
    assert mixer.k_proj.weight.data_ptr() == mixer.q_proj.weight.data_ptr() + mixer.q_proj.weight.nbytes
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert run(engine_of(model), Request(prompt(9), 8, GREEDY))[0].tokens == expected
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
    save_model(model, tmp_path)
    assert run(engine_of(load_model(tmp_path)), Request(prompt(9), 8, GREEDY))[0].tokens == expected


def test_feed_forwards_with_factors_run_as_their_own_modules():
    factors = replace(SHAPES["fla"], feed_forward=replace(GLU, gate_scale=2.0, down_scale=0.25))
    model = small_model((SHAPES["fla"], factors))
    assert [FusedBlock.supports(block) for block in model.layers] == [True, False]
    ids = torch.tensor([prompt(5)])
    with torch.no_grad():
        x = model.layers[1].feed_forward_norm(torch.randn(3, model.config.d_model))
        hidden = torch.nn.functional.silu(2 * model.layers[1].feed_forward.gate_proj(x))
        hidden = hidden * model.layers[1].feed_forward.up_proj(x)
        expected = 0.25 * model.layers[1].feed_forward.down_proj(hidden)
        torch.testing.assert_close(model.layers[1].feed_forward(x), expected)
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert run(engine_of(model), Request(prompt(5), 6, GREEDY))[0].tokens == ids[0, 5:].tolist()


def test_a_wrapped_projection_runs_as_its_own_module():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = small_model()
    plain = run(engine_of(model), Request(prompt(5), 6, GREEDY))[0]
    model = small_model()
    old = model.layers[1].mixer.out_proj
    model.layers[1].mixer.out_proj = Doubled(old.in_features, old.out_features, bias=False)
    model.layers[1].mixer.out_proj.weight = old.weight
    assert not FusedBlock.supports(model.layers[1])
    changed = run(engine_of(model), Request(prompt(5), 6, GREEDY))[0]
    with torch.no_grad():
        expected = int(model(torch.tensor([prompt(5)])).logits[0, -1].argmax())
    assert changed.tokens[0] == expected
    assert changed.logprobs != plain.logprobs


def test_retention_with_a_partial_rotation_runs_as_its_own_module():
    model = small_model([replace(PAPER, mixer=replace(PAPER.mixer, rotary_dim=4))] * 2)
    assert not any(map(FusedBlock.supports, model.layers))
    generated = run(engine_of(model), Request(prompt(5), 6, GREEDY))[0].tokens
    with torch.no_grad():
        logits = model(torch.tensor([prompt(5) + list(generated)])).logits[0, 4:-1]
    assert list(generated) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("stack", ["retention", "gated", "convolution", "hybrid"])
def test_deferred_writes_change_only_the_rounding(stack):
    model = small_model(stack)
    requests = [Request(prompt(5 + 8 * n, n), 40, Sampling(temperature=0, logprobs=0)) for n in range(4)]
    for at_once, late in zip(run(engine_of(model), *requests), run(engine_of(model, deferred_writes=16), *requests)):
        assert late.tokens == at_once.tokens
        for a, b in zip(late.logprobs, at_once.logprobs):
            assert a.logprob == pytest.approx(b.logprob, abs=2e-4)


def test_deferred_writes_do_not_depend_on_when_other_requests_came():
    model = small_model()
    request = Request(prompt(11), 30, Sampling(temperature=0.9, seed=3, logprobs=1))
    alone = run(engine_of(model, deferred_writes=16), request)[0]
    engine = engine_of(model, deferred_writes=16)
    engine.submit(Request(prompt(3, 1), 50))
    for _ in range(5):
        engine.step()
    late = run(engine, request, Request(prompt(20, 2), 9))[0]
    assert (late.tokens, late.logprobs) == (alone.tokens, alone.logprobs)


@pytest.mark.parametrize("steps", [1, 15, 16, 21])
def test_a_snapshot_includes_the_deferred_writes(steps):
    model = small_model()
    request = Request(prompt(11), 40, GREEDY)
    expected = run(engine_of(model, deferred_writes=16), request)[0]
    engine = engine_of(model, deferred_writes=16)
    generation = engine.submit(request)
    while len(generation.tokens) < steps:
        engine.step()
    snapshot = engine.snapshot(generation)
    engine.run()
    assert generation.logprobs == expected.logprobs, "taking it changed nothing"
    other = engine_of(model)
    again = other.submit(Request([], 40 - steps, GREEDY), snapshot)
    other.run()
    assert again.tokens == expected.tokens[steps:]


def test_the_next_request_in_a_slot_does_not_see_deferred_writes_of_the_last():
    model = small_model()
    request = Request(prompt(6), 12, GREEDY)
    expected = run(engine_of(model, num_slots=1, deferred_writes=16), request)[0]
    engine = engine_of(model, num_slots=1, deferred_writes=16)
    run(engine, Request(prompt(4, 2), 5))
    for ring in engine.pool.deferred:
        ring.keys.fill_(torch.nan)
        ring.values.fill_(torch.nan)
        ring.log_decay.fill_(torch.nan)
    assert run(engine, request)[0].logprobs == expected.logprobs


@pytest.mark.parametrize("length", [1, 8, 24, 128])
def test_rings_of_other_lengths_are_refused(small, length):
    with pytest.raises(ValueError, match=f"deferred_writes is {length}; accepted: 0, 16, 32, 64"):
        engine_of(small, deferred_writes=length)


def test_deferred_writes_with_speculation_are_refused(small):
    with pytest.raises(ValueError, match="accepted: one of the two"):
        engine_of(small, deferred_writes=16, speculation=Speculation(3))


@pytest.mark.parametrize("options", [{}, {"deferred_writes": 16}, {"speculation": Speculation(3)}], ids=str)
def test_a_state_that_is_not_finite_fails_only_its_request(any_model, options):
    new = 20 if "deferred_writes" in options else 10  # a ring is written after 16 tokens
    requests = [Request(prompt(9 + n, n), new, GREEDY, keep_state=True) for n in range(3)]
    expected = run(engine_of(any_model, **options), *requests)
    engine = engine_of(any_model, prefix_cache_bytes=10**8, **options)
    generations = [engine.submit(request) for request in requests]
    while not all(g.num_new >= 3 for g in generations):
        engine.step()
    bad = generations[1]
    for layer in engine.pool.state.slot(bad.slot):
        for name, x in layer.tensors().items():
            if name != "position":
                x.fill_(torch.nan)
    engine.run()
    assert bad.finish_reason == "failed"
    assert f"the logits of token {len(bad.seen)} are not finite" in bad.error
    assert bad.snapshot is None
    for generation, alone in zip(generations, expected, strict=True):
        if generation is not bad:
            assert (generation.tokens, generation.logprobs) == (alone.tokens, alone.logprobs)
            assert generation.error is None
    again = run(engine, requests[1])[0]
    assert again.tokens == expected[1].tokens, "its slot and its prompt's prefix are clean"


def test_a_prompt_that_cannot_be_read_fails_only_its_request():
    model = small_model("gated")
    engine = engine_of(model)
    running = engine.submit(Request(prompt(5), 12, GREEDY))
    engine.step()
    start = engine.snapshot(running)
    for layer in start.state:
        layer.memory.fill_(torch.nan)
    bad = engine.submit(Request(prompt(20), 5, GREEDY), start)
    engine.run()
    assert bad.finish_reason == "failed"
    assert bad.error.startswith("its prompt cannot be read: log_decay reaches nan")
    assert running.tokens == run(engine_of(model), running.request)[0].tokens
    assert engine.pool.num_free == 4


def test_a_capture_that_fails_leaves_the_running_requests_as_they_were(monkeypatch):
    request = Request(prompt(6), 12, GREEDY)
    expected = run(engine_of(small_model()), request)[0].tokens
    engine = engine_of(small_model())
    generation = engine.submit(request)
    for _ in range(4):
        engine.step()
    monkeypatch.setattr(engine._step, "graphs", True)
    monkeypatch.setattr(engine._step, "_run", lambda parts: 1 / 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: 1 / 0)  # where there is a GPU and where there is none
    with pytest.raises(ZeroDivisionError):
        engine.warmup(Sampling().parts)
    monkeypatch.undo()
    engine.run()
    assert generation.tokens == expected
