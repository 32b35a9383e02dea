"""Recompute levels: the same bits as without, what is computed again, and the bytes that are held meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from retnet.layers import offload
from retnet.layers.recompute import LEVELS, Level, Recompute
from retnet.layers.token_layout import TokenLayout
from retnet.models.activations import AliveStorages, activation_bytes, working_bytes
from retnet.models.presets import preset
from tests.small_models import (
    CONV,
    EXPERTS,
    NOPE,
    PAPER,
    STACKS,
    WINDOW,
    random_ids,
    small_model,
)

DROPPING = tuple(replace(block, dropout=0.2) for block in STACKS["every mixer"])
JITTER = (
    replace(PAPER, feed_forward=replace(EXPERTS, router_jitter=0.1, capacity_factor=0.7)),
    replace(NOPE, mixer=replace(NOPE.mixer, dropout=0.3), norm_position="post"),
)


def step(stack, level: Level, *, waits: bool = False, **options) -> list[Tensor]:
    """Loss, gradients, final states, and the random numbers that follow a step of training."""
    model = small_model(stack).train()
    model.recompute = Recompute(level, waits)
    ids = random_ids(2, 13)
    labels = options.pop("labels", ids[:, 1:])
    ids, losses = ids[:, :-1].reshape(labels.shape), []
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.pop("autocast", False)):
        hidden, state = model.hidden(ids, losses=losses, **options)
        loss = model.mean_nats(hidden, labels) + sum(losses)
    if state is not None:
        loss = loss + sum(x.square().sum() for x in state.named_tensors().values() if x.is_floating_point())
    loss.backward()
    found = [loss.detach(), torch.rand(2)] + ([] if state is None else [*state.named_tensors().values()])
    return found + [p.grad for p in model.parameters() if p.grad is not None]


CALLS = {
    "rows": {},
    "mask": {"mask": torch.arange(12).expand(2, 12) >= torch.tensor([[0], [4]])},
    "packs": {"labels": random_ids(1, 24, seed=1), "cu_seqlens": torch.tensor([0, 7, 8, 24])},
    "states": {"carry": True},
    "autocast": {"autocast": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_no_level_changes_a_bit_of_losses_gradients_states_and_random_numbers(call):
    stack = DROPPING if call in ("rows", "mask") else JITTER + (CONV, WINDOW)
    expected = step(stack, "none", **CALLS[call])
    for level in LEVELS[1:]:
        found = step(stack, level, **CALLS[call])
        assert len(found) == len(expected)
        for n, (a, b) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(a, b), (level, n)


class Calls(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


def calls_of_backward(level: Level) -> Counter[str]:
    model = small_model((PAPER, NOPE)).train()
    model.recompute = Recompute(level)
    ids = random_ids(2, 13)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    with Calls() as calls:
        loss.backward()
    return calls.of


def test_each_level_computes_its_operators_again_and_no_other():
    plain, light, medium, layer = map(calls_of_backward, LEVELS)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [calls["retnet::retention"] for calls in (plain, light, medium, layer)] == [0, 0, 1, 1]
    assert [calls[attention] for calls in (plain, light, medium, layer)] == [0, 0, 0, 1]
    assert [calls["aten::gelu"] for calls in (plain, light, medium, layer)] == [0, 1, 1, 1]
    products = [calls["aten::mm"] - plain["aten::mm"] for calls in (light, medium, layer)]
    # medium: the paper's W_up, and both of SwiGLU's. layer: W_Q, W_K, W_V, W_G, W_O twice. No level needs W_down again.
    assert products == [0, 3, 3 + 10]


def test_a_layer_of_the_paper_holds_as_many_widths_as_documented():
    """In units of [tokens, d_model]: x, q, k, v, gate, out, the second residual, the feed-forward's W_up."""
    config = replace(preset("retnet-125m"), dtype="bfloat16")
    unit = len(config.layers) * 2 * config.d_model
    held = [activation_bytes(config, level, autocast=False) / unit for level in LEVELS]
    assert held[1:] == [1 + 1 + 1 + 2 + 2 + 2 + 1 + 2, 1 + 1 + 1 + 2 + 2 + 1, 1]
    assert held[0] == pytest.approx(24, abs=0.05)
    assert working_bytes(config, autocast=False) == held[0] * 2 * config.d_model


@pytest.mark.parametrize("level", ["none", "light"])
def test_counted_bytes_are_those_that_the_allocator_gave_out(level):
    model = small_model((CONV, NOPE)).train()
    blocks = model.layers
    held = [allocated(blocks, level, tokens) for tokens in (64, 128)]
    counted = activation_bytes(model.config, level, autocast=False)
    assert (held[1] - held[0]) / 64 == pytest.approx(counted, rel=0.02)


def allocated(blocks: nn.ModuleList, level: Level, tokens: int) -> int:
    """Bytes that the allocator gave out in the forward of some blocks, and that were not given back."""
    x = torch.randn(1, tokens, 32, requires_grad=True)
    layout = TokenLayout.of((1, tokens), x.device, recompute="none" if level == "layer" else level)
    for block in blocks:
        block.prepare(layout, x.dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for block in blocks:
            if level == "layer":
                x = checkpoint(block, x, None, layout, use_reentrant=False)[0]
            else:
                x = block(x, None, layout)[0]
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def test_layer_inputs_wait_on_the_host_and_their_copies_end_with_the_backward():
    ids, grads, copies = random_ids(2, 13), [], []
    made = offload._Waiting.__init__

    def counted(self, *arguments):
        made(self, *arguments)
        copies.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload._Waiting, "__init__", counted)
        for waits in (False, True):
            model = small_model((PAPER, WINDOW, CONV)).train()
            model.recompute = Recompute("layer", waits)
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            assert len(copies) == 3 * waits
            loss.backward(retain_graph=True)
            loss.backward()
            grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))
    del loss
    gc.collect()
    assert [copy() for copy in copies] == [None] * 3


def test_the_copy_back_of_a_layer_begins_one_layer_ahead():
    waiting = offload.waiting_on_host(torch.device("cpu"))
    first, second = (waiting.pack_hook(torch.full((3,), float(n))) for n in (1, 2))
    assert torch.equal(waiting.unpack_hook(second), torch.full((3,), 2.0))
    assert first.back is not None
    assert second.back is None
    assert torch.equal(waiting.unpack_hook(first), torch.full((3,), 1.0))


@pytest.mark.gpu
def test_layer_inputs_leave_the_memory_of_a_gpu():
    device = torch.device("cuda")
    ids, held, grads = random_ids(1, 8193).to(device), [], []
    for waits in (False, True):
        model = small_model((PAPER,) * 8).to(device).train()
        model.recompute = Recompute("layer", waits)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()  # allocates what later steps use again
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))
    assert held[0] - held[1] == pytest.approx(8 * 8192 * 32 * 4, rel=0.2)  # 8 inputs in float32


def test_evaluation_and_frozen_calls_hold_nothing_back(monkeypatch):
    model = small_model((PAPER,))
    model.recompute = Recompute("light")
    monkeypatch.setattr("retnet.layers.block.recomputed", None)
    ids = random_ids(1, 5)
    model(ids)  # evaluation mode
    with torch.no_grad():
        model.train()(ids)
    with pytest.raises(TypeError, match="must be callable"):
        model(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "ligth"}, "level is 'ligth'; accepted: none, light, medium, layer"),
        ({"level": "light", "offload": True}, "offload is True with recompute 'light'; accepted with offload: 'layer'"),
        ({"offload": True}, "offload is True with recompute 'none'"),
    ],
)
def test_a_level_that_does_not_exist_and_an_offload_without_layers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recompute(**options)


def test_a_configuration_with_gradient_checkpointing_recomputes_layers():
    assert small_model((PAPER,), gradient_checkpointing=True).recompute == Recompute("layer")


@pytest.mark.slow
@pytest.mark.parametrize("level", ["light", "medium", "layer"])
def test_compiled_blocks_recompute_to_the_same_bits_and_hold_less(level):
    held, found = [], []
    for each in ("none", level):
        torch._dynamo.reset()
        model = small_model((CONV, NOPE)).train()
        model.recompute = Recompute(each)
        for block in model.layers:
            block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        ids = random_ids(2, 65)
        model.loss(ids[:, :-1], ids[:, 1:])  # compiles
        with AliveStorages() as alive:
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            held.append(alive.nbytes)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))
    assert held[1] < 0.85 * held[0]
