"""Models of all mixers together: configurations, states on disk, packs, checkpointing, decoding."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from retnet.layers.attention import Attention, AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.token_layout import TokenLayout
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops import attention
from tests.small_models import MAMBA2, STACKS, WIDTH, own_mixers, random_ids, small_model

LAYERS = STACKS["every mixer"]
hybrid = partial(small_model, "every mixer", dtype="float64")
ids = partial(random_ids, 2, 12)


def test_the_configuration_survives_json():
    config = hybrid().config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_mixer_is_in_the_hybrid_and_has_a_state_to_save():
    assert {layer.mixer.kind for layer in LAYERS} == set(own_mixers())
    _, state = hybrid().hidden(ids(), carry=True)
    assert {type(layer) for layer in state.layers} == {mixer.state for mixer in own_mixers().values()}


def test_a_saved_state_continues_where_it_stopped(tmp_path):
    model, tokens = hybrid(), ids()
    with torch.no_grad():
        full = model(tokens).logits
        state = model(tokens[:, :7], carry=True).state
        state.save(tmp_path / "state.safetensors")
        state = ModelState.load(tmp_path / "state.safetensors")
        outs = []
        for t in range(7, 12):
            out = model(tokens[:, t : t + 1], state, carry=True, in_place=True)
            outs.append(out.logits)
            state = out.state
    torch.testing.assert_close(torch.cat(outs, 1), full[:, 7:], rtol=1e-10, atol=1e-10)
    assert state.position.tolist() == [12, 12]


def test_forked_and_selected_states_continue_independently():
    model, tokens = hybrid(), ids()
    with torch.no_grad():
        full = model(tokens).logits
        state = model(tokens[:, :7], carry=True).state
        forks = state.clone().repeat(2).select(torch.tensor([3, 0]))
        model(tokens[:, 7:], state, carry=True, in_place=True)
        out = model(tokens.flip(0)[:, 7:], forks).logits
    torch.testing.assert_close(out.flip(0), full[:, 7:], rtol=1e-10, atol=1e-10)


def test_packs_and_pads_equal_documents_alone():
    model, tokens = hybrid(), random_ids(1, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = mask[1, 9:] = False
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=torch.tensor([0, 5, 12])).logits
        padded = model(tokens.expand(2, -1), mask=mask).logits
        for out, one in ((packed[:, :5], slice(5)), (packed[:, 5:], slice(5, 12)), (padded[1:, :9], slice(9))):
            torch.testing.assert_close(out, model(tokens[:, one]).logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(padded[:1, 5:], packed[:, 5:], rtol=1e-10, atol=1e-10)


def test_a_step_of_training_reaches_every_parameter():
    model = hybrid().train()
    model.loss(random_ids(4, 12), random_ids(4, 12)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@pytest.mark.parametrize("init", ["paper", "torchscale", "normal"])
def test_initial_weights_come_from_the_seed_alone(init):
    def draw(noise: int, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        return hybrid(init=init, seed=seed, dtype="float32").state_dict()

    first, again, other = draw(1, 0), draw(2, 0), draw(1, 7)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    same = {name for name in first if first[name].unique().numel() > 1} - drawn
    # Rates of 1, 2, ..., N in every channel, and the schedule that gated decays start from.
    rates = {f"layers.{layer}.log_rate" for layer in ("3.mixer", "9.mixer.branches.2", "10.mixer.streams.1.1.mixer")}
    starts = {f"layers.{layer}.mixer.decay_proj.bias" for layer in ("6", "10.mixer.streams.0.0")}
    assert same == rates | starts


def test_models_of_all_mixers_are_built_on_the_meta_device_and_filled():
    with torch.device("meta"):
        empty = LanguageModel(hybrid().config)
    assert all(p.is_meta for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(hybrid().state_dict())
    torch.testing.assert_close(filled.eval()(ids()).logits, hybrid()(ids()).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_follows_double(dtype):
    wide, narrow = hybrid(), hybrid(dtype=dtype)
    narrow.load_state_dict(wide.state_dict())
    expected = wide(ids()).logits
    with torch.no_grad():
        out = narrow(ids()[:, :9], carry=True)
        logits = torch.cat([out.logits, narrow(ids()[:, 9:], out.state).logits], 1)
    assert logits.dtype == getattr(torch, dtype)
    error = (logits.double() - expected).norm() / expected.norm()
    assert error < {"bfloat16": 0.2, "float16": 0.03, "float32": 1e-5}[dtype]


def test_a_block_without_feed_forward_refuses_a_parallel_residual():
    with pytest.raises(ValueError, match="residual is 'parallel' without a feed_forward"):
        replace(MAMBA2, residual="parallel")


def test_a_block_without_feed_forward_adds_its_mixer_alone():
    block = small_model([MAMBA2], dtype="float64").layers[0]
    assert block.feed_forward is None
    assert not any("feed_forward" in name for name, _ in block.named_parameters())
    nn.init.zeros_(block.mixer.out_proj.weight)
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(block(x, None, TokenLayout.of((1, 3), x.device))[0], x)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_cuda_equals_the_cpu_in_logits_gradients_and_decoding(packed):
    tokens, bounds = random_ids(1, 200), torch.tensor([0, 70, 71, 200]) if packed else None
    results = []
    for device in ("cpu", "cuda"):
        model = hybrid().float().to(device)
        at = {"cu_seqlens": None if bounds is None else bounds.to(device)}
        loss = model.loss(tokens.to(device), tokens.to(device), **at)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            out = model(tokens.to(device), carry=True, **at)
            step = model(tokens[:, :3].view(3, 1)[: len(out.state.position)].to(device), out.state, in_place=True)
        results.append([x.cpu() for x in (out.logits, step.logits, *grads)])
    for cpu, cuda in zip(*results):
        assert (cuda - cpu).norm() <= 5e-3 * cpu.norm() + 1e-6


@torch.no_grad()
def test_blocks_compiled_one_by_one_share_the_mask_of_flex_attention(monkeypatch):
    """On a CPU, with flex attention uncompiled. Every call has other documents."""
    layer = BlockConfig(AttentionConfig(4, 2, head_dim=16), FeedForwardConfig(64), norm="rms")
    model = small_model([layer] * 3)
    calls = [(torch.randint(50, (1, 300)), torch.tensor([0, n, 2 * n, 300])) for n in (40, 100, 131)]
    expected = [model(ids, cu_seqlens=bounds).logits for ids, bounds in calls]
    monkeypatch.setattr(Attention, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(backend="aot_eager")
    for (ids, bounds), logits in zip(calls, expected):
        torch.testing.assert_close(model(ids, cu_seqlens=bounds).logits, logits, rtol=1e-4, atol=1e-4)
