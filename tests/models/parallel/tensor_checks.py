"""Checks of split models against whole ones; the processes of a torchrun run them as a script.

Every process computes the whole model too, and compares its own part: losses, logits, gradients, states and tokens.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from retnet import LanguageModel, Sampling
from retnet.layers.block import BlockConfig
from retnet.layers.recompute import Level, Recompute
from retnet.models.decode.generation import generate
from retnet.models.parallel.plan import tensor_parallel_
from retnet.models.parallel.whole import (
    part_of_state,
    part_of_weights,
    whole_gradients,
    whole_model,
    whole_state,
    whole_weights,
)
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import (
    ALIBI,
    CONV,
    GATED,
    LATENT,
    LIGHTNING,
    MAMBA1,
    MAMBA2,
    NOPE,
    PAPER,
    REBUILT,
    WINDOW,
    prompt,
    random_ids,
    small_model,
)

Split = Callable[[LanguageModel], LanguageModel]  # the caller's part of a model, which is split in place

HEADS = 4  # divide by 2 and by 4
FOUR = {
    "paper": replace(PAPER, mixer=replace(PAPER.mixer, num_heads=HEADS, bias=True, head_norm_affine="per_head")),
    "gated": replace(GATED, mixer=replace(GATED.mixer, num_heads=HEADS, head_norm_affine="shared"), skip_scale=1.5),
    "conv": replace(CONV, mixer=replace(CONV.mixer, num_heads=HEADS, qk_norm="rms"), residual="parallel"),
    "groups": replace(PAPER, mixer=replace(CONV.mixer, num_heads=HEADS, num_kv_heads=1, conv_on=("k", "v"))),
    "learnt": replace(
        PAPER,
        mixer=replace(PAPER.mixer, num_heads=HEADS, learnable_decay=True, decay="experiment", gate="none"),
        feed_forward=replace(PAPER.feed_forward, bias=True, gate_scale=2.0, down_scale=0.5),
        norm_position="post",
    ),
    "lightning": replace(LIGHTNING, mixer=replace(LIGHTNING.mixer, num_heads=2 * HEADS, head_norm_groups=HEADS)),
    "norm": replace(PAPER, mixer=replace(PAPER.mixer, num_heads=HEADS, decay_norm=True, head_norm="rms")),
    "window": replace(WINDOW, mixer=replace(WINDOW.mixer, num_kv_heads=HEADS, qkv_bias=True, out_bias=True)),
    "alibi": ALIBI,
    "nope": replace(NOPE, mixer=replace(NOPE.mixer, num_heads=HEADS, num_kv_heads=1)),
    "latents": replace(LATENT, mixer=replace(LATENT.mixer, num_sinks=2, gate="sigmoid")),
    "latents, keys of one head": replace(REBUILT, mixer=replace(REBUILT.mixer, num_kv_heads=1, qkv_bias=True)),
    "mamba2": MAMBA2,
    "mamba2 in groups": replace(MAMBA2, mixer=replace(MAMBA2.mixer, num_groups=HEADS, bias=True)),
    "mamba2 with factors": replace(
        MAMBA2, mixer=replace(MAMBA2.mixer, norm="none", projection_scales=(0.5, 2.0, 3.0, 0.25, 1.5))
    ),
    "mamba2, norm before the gate": replace(MAMBA2, mixer=replace(MAMBA2.mixer, norm_before_gate=True)),
    "mamba1": replace(MAMBA1, mixer=replace(MAMBA1.mixer, bias=True, scan_norm="rms")),
}
HYBRID = tuple(FOUR.values())
FUSED = (
    FOUR["paper"],
    FOUR["gated"],
    replace(FOUR["conv"], mixer=replace(FOUR["conv"].mixer, qk_norm="none"), residual="sequential"),
)


def compare(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> str:
    """What differs, as text; empty if nothing does."""
    if found.shape != expected.shape:
        return f"{what} has shape {list(found.shape)}, not {list(expected.shape)}\n"
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-6))
    return "" if error <= tolerance else f"{what} differs by {error:.1e}\n"


def check_training(split: Split, layers: Sequence[BlockConfig], dtype: str = "float64", **options: object) -> None:
    """Loss, logits and gradients of packed rows."""
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    model = small_model(layers, dtype=dtype, **options).train()
    ids, labels = random_ids(1, 24), random_ids(1, 24, seed=1)
    labels[:, ::5] = -100
    packed = torch.tensor([0, 7, 8, 24])
    whole = model.loss(ids, labels, cu_seqlens=packed)
    whole.backward()
    part = split(copy.deepcopy(model))
    part.zero_grad()
    logits = part(ids, cu_seqlens=packed).logits
    loss = part.loss(ids, labels, cu_seqlens=packed)
    loss.backward()
    wrong = compare("the loss", loss, whole, tolerance)
    wrong += compare("logits", logits, model(ids, cu_seqlens=packed).logits, tolerance)
    wrong += compare_gradients(part, model, tolerance)
    assert not wrong, wrong


def check_joined_logits(split: Split, layers: Sequence[BlockConfig]) -> None:
    """The loss of joined logits, as transformers computes it, and its gradients."""
    model = small_model(layers, dtype="float64").train()
    ids, labels = random_ids(2, 7), random_ids(2, 7, seed=1)

    def loss(which: LanguageModel) -> Tensor:
        return torch.nn.functional.cross_entropy(which(ids).logits.flatten(0, 1), labels.flatten())

    part = split(copy.deepcopy(model))
    whole, mine = loss(model), loss(part)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    expected = part_of_weights(part, dict(zip(names, expected, strict=True)))
    found = torch.autograd.grad(mine, list(part.parameters()))
    wrong = compare("the loss", mine, whole)
    for name, grad in zip(names, found, strict=True):
        wrong += compare(f"the gradient of {name}", grad, expected[name])
    assert not wrong, wrong


def check_accumulation(split: Split, layers: Sequence[BlockConfig]) -> None:
    """The gradients of three calls add up, in a copy of the split model too."""
    model = small_model(layers, dtype="float64").train()
    part = copy.deepcopy(split(copy.deepcopy(model)))
    for shift in range(3):
        ids = random_ids(2, 6, seed=shift)
        for which in (model, part):
            which.loss(ids, ids.roll(1, 1)).backward()
    assert not (wrong := compare_gradients(part, model)), wrong


def check_recompute(split: Split, layers: Sequence[BlockConfig], level: Level) -> None:
    model = small_model(layers, dtype="float64").train()
    part = split(copy.deepcopy(model))
    part.recompute = Recompute(level)
    for which in (model, part):
        which.loss(random_ids(2, 7), random_ids(2, 7, seed=1)).backward()
    assert not (wrong := compare_gradients(part, model)), wrong


def compare_gradients(part: LanguageModel, whole: LanguageModel, tolerance: float = 1e-10) -> str:
    """What differs between the gradients of a split model and a whole one, by parts and joined."""
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    expected, joined, wrong = part_of_weights(part, gradients), whole_gradients(part), ""
    assert joined.keys() == gradients.keys()
    for name, p in part.named_parameters():
        wrong += compare(f"the gradient of {name}", p.grad, expected[name], tolerance)
        wrong += compare(f"the joined gradient of {name}", joined[name], gradients[name], tolerance)
    return wrong


@torch.no_grad()
def check_decoding(split: Split, layers: Sequence[BlockConfig]) -> None:
    """Prefill in pieces, padding and one token at a time; states are the heads' own, and join to those of all heads."""
    model = small_model(layers, dtype="float64")
    part = split(copy.deepcopy(model))
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = False
    expected = model(ids, mask=mask, carry=True)
    found = part(ids, mask=mask, carry=True)
    wrong = compare("logits", found.logits[mask], expected.logits[mask])
    wrong += compare_states("after prefill", whole_state(part, found.state), expected.state)
    wrong += compare_states("its part", found.state, part_of_state(part, expected.state))
    for t in range(3):
        token = random_ids(2, 1, seed=t)
        expected = model(token, expected.state, carry=True, in_place=True)
        found = part(token, found.state, carry=True, in_place=True)
        wrong += compare(f"logits of token {t}", found.logits, expected.logits)
    wrong += compare_states("after decoding", whole_state(part, found.state), expected.state)
    hidden, draft = model.draft(random_ids(2, 3), expected.state)
    same, mine = part.draft(random_ids(2, 3), found.state)
    wrong += compare("hidden states of a draft", same, hidden)
    draft.accept_(expected.state, torch.tensor([3, 1]))
    mine.accept_(found.state, torch.tensor([3, 1]))
    wrong += compare_states("after a draft", whole_state(part, found.state), expected.state)
    assert not wrong, wrong


def compare_states(when: str, found, expected) -> str:
    pairs = zip(found.named_tensors().items(), expected.named_tensors().values(), strict=True)
    return "".join(compare(f"{name} {when}", x, y) for (name, x), y in pairs)


def check_generation(split: Split, layers: Sequence[BlockConfig], **options: object) -> None:
    """Greedy tokens are those of one process; sampled ones are the same on all processes."""
    model = small_model(layers, **options)
    part = split(copy.deepcopy(model))
    ids = random_ids(2, 9)
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 20}):
        expected = torch.stack(list(generate(model, ids, 12, generator=torch.Generator().manual_seed(5), **sampling)))
        # Processes other than the first have other seeds: their tokens are those of the first.
        seed = torch.Generator().manual_seed(5 + part.shard.rank)
        found = torch.stack(list(generate(part, ids, 12, generator=seed, **sampling)))
        assert torch.equal(found, expected), (sampling, found, expected)


def requests() -> list[Request]:
    greedy = Sampling(temperature=0)
    return [
        Request(prompt(19), 10, greedy, ignore_eos=True),
        Request(prompt(30, seed=1), 7, Sampling(temperature=0, repetition_penalty=1.3), ignore_eos=True),
        Request(prompt(5, seed=2), 12, Sampling(temperature=0.9, top_p=0.9, seed=3, logprobs=2), ignore_eos=True),
        Request([*prompt(19), 3, 4], 6, greedy, ignore_eos=True, keep_state=True),
        Request(prompt(19), 0, greedy),
        Request(prompt(7, seed=4), 9, greedy, ignore_eos=True, prompt_logprobs=1),
    ]


def check_engine(split: Split, layers: Sequence[BlockConfig], **options: object) -> None:
    """Requests that join at different steps, with cached prefixes and a fork, have the tokens of one process."""
    model = small_model(layers)
    part = split(copy.deepcopy(model))
    settings = {"num_slots": 4, "max_tokens": 64, "prompt_chunk": 8, "prefix_cache_bytes": 1 << 22, **options}
    outputs = []
    for which in (model, part):
        engine = Engine(which, **settings)
        first, *others = [engine.submit(request) for request in requests()]
        while not first.num_new:
            engine.step()
        fork = engine.fork(first, Request([5], 4, Sampling(temperature=0), ignore_eos=True))
        engine.run()
        later = engine.submit(Request(prompt(19), 5, Sampling(temperature=0), ignore_eos=True))
        engine.run()
        generations = [first, *others, fork, later]
        outputs.append([(g.tokens, g.finish_reason, g.error, g.cached) for g in generations])
        outputs[-1].append(replace(engine.stats().prefix, state_bytes=0))  # which are fewer where heads are
    assert outputs[0] == outputs[1]


def check_whole(split: Split, layers: Sequence[BlockConfig], tied: bool) -> None:
    """Split weights join to those before, and a whole model made of them is the same."""
    model = small_model(layers, tie_embeddings=tied)
    part = split(copy.deepcopy(model))
    joined, expected = whole_weights(part), model.state_dict()
    assert {name for name in expected if not torch.equal(joined[name], expected[name])} == set()
    assert (part.head.weight is part.embedding.weight) == tied
    again = whole_model(part)
    ids = random_ids(1, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    part.load_state_dict(part_of_weights(part, expected))
    assert {name for name, x in whole_weights(part).items() if not torch.equal(x, expected[name])} == set()


def check_all(split: Split) -> None:
    check_training(split, HYBRID)
    check_training(split, FUSED, dtype="float32", tie_embeddings=True, logit_soft_cap=5.0)
    check_training(split, HYBRID, gradient_checkpointing=True)
    check_joined_logits(split, HYBRID)
    check_accumulation(split, HYBRID)
    check_decoding(split, HYBRID)
    for layers in (FUSED, HYBRID):
        check_generation(split, layers)
        check_engine(split, layers)
    check_whole(split, HYBRID, True)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check_all(lambda model: tensor_parallel_(model, mesh))
    dist.barrier()
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
