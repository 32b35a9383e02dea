"""Muon: torch's on whole matrices, part by part on products, AdamW for the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from retnet.layers.moe import ExpertLinear
from retnet.train import muon
from retnet.train.muon import Muon, muon_groups, orthogonalize
from retnet.train.optimizer import separate_routers
from retnet.train.parameter_patterns import without_a_match
from tests.small_models import EXPERTS, GATED, PAPER, small_model
from tests.torchrun import on_processes

SHAPES = [(8, 8), (8, 8), (12, 5), (5, 12), (1, 9), (9, 1), (1, 1), (8, 8)]
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}


def matrices(seed: int, shapes=SHAPES, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(optimizer: torch.optim.Optimizer, params, steps: int = 4, skip: int | None = None) -> None:
    """Steps on random gradients; parameter `skip` gets none in every second step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == skip and step % 2 else grad
        optimizer.step()


# Not bfloat16 without Nesterov's step: torch's iteration then divides the momentum itself by its norm, in place.
@pytest.mark.parametrize(
    ("dtype", "nesterov"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_whole_matrices_move_as_under_torchs_muon(dtype, nesterov, monkeypatch):
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", 150)  # two of the 8 x 8 matrices at a time
    ours, theirs = matrices(0, dtype=dtype), matrices(0, dtype=dtype)
    run(Muon(ours, **OPTIONS, nesterov=nesterov, ns_dtype=torch.bfloat16), ours, skip=1)
    run(torch.optim.Muon(theirs, **OPTIONS, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"), theirs, skip=1)
    before = matrices(0, dtype=dtype)
    for p, expected, start in zip(ours, theirs, before, strict=True):
        # The iteration amplifies the order of its bfloat16 sums.
        assert (p - expected).norm() <= 0.02 * (expected - start).norm(), p.shape


def test_the_order_of_the_operations_is_torchs(monkeypatch):
    """Equal to float32 rounding where torch's iteration is replaced by ours in float64."""
    from torch.optim import _muon

    def exact(grad, coefficients, steps, eps):
        assert (coefficients, eps) == (muon.COEFFICIENTS, muon.NORM_EPS)
        return orthogonalize(grad.double()[None], steps)[0]

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", exact)
    ours, theirs = matrices(0), matrices(0)
    run(Muon(ours, **OPTIONS, ns_dtype=torch.float64), ours)
    run(torch.optim.Muon(theirs, **OPTIONS, adjust_lr_fn="match_rms_adamw"), theirs)
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)


def test_the_iteration_is_torchs():
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = torch.randn(3, 40, 24).bfloat16()
    theirs = [_zeropower_via_newtonschulz(m, muon.COEFFICIENTS, 5, muon.NORM_EPS) for m in (*x, *x.mT)]
    ours = [*orthogonalize(x, 5), *orthogonalize(x.mT.contiguous(), 5)]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).float().norm() <= 0.02 * other.float().norm()


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((2, 30, 20), (2, 20, 30)):
        x = torch.randn(shape, dtype=torch.float64)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        y = orthogonalize(x, 5)
        values = torch.linalg.svdvals(y)
        assert 0.6 < values.min() <= values.max() < 1.3
        torch.testing.assert_close(u.mT @ y @ v.mT, torch.diag_embed((u.mT @ y @ v.mT).diagonal(dim1=1, dim2=2)))


def test_stabilising_steps_bring_singular_values_to_one_and_a_run_takes_them():
    """Eight steps and two of (2, -1.5, 0.5), as in DeepSeek-V4: x <- a x + b x x^T x + c (x x^T)^2 x."""
    x = torch.randn(2, 12, 9, dtype=torch.float64)
    expected = x / x.norm(dim=(1, 2), keepdim=True)
    for a, b, c in [muon.COEFFICIENTS] * 8 + [muon.STABILIZING] * 2:
        gram = expected @ expected.mT
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    iteration = [muon.COEFFICIENTS] * 8 + [muon.STABILIZING] * 2
    torch.testing.assert_close(orthogonalize(x, iteration), expected, rtol=1e-10, atol=1e-12)
    off = [(torch.linalg.svdvals(orthogonalize(x, n)) - 1).abs().max() for n in (8, iteration)]
    assert off[1] < 0.1 * off[0]
    (p,) = matrices(0, [(12, 9)], torch.float64)
    before, p.grad = p.detach().clone(), x[0]
    Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, ns_steps=8, stabilize_steps=2).step()
    torch.testing.assert_close(p.detach(), before - 0.2 * 12**0.5 * expected[0], rtol=1e-10, atol=1e-12)


def test_patterns_choose_the_algorithm_of_matrices_by_name():
    model = small_model([replace(GATED, feed_forward=EXPERTS)])
    patterns = {"muon": ["**.weight", "head*"], "adamw": ["embed_tokens.*", "*.k_proj.weight"]}
    chosen = {}
    for group in muon_groups(model, 1e-3, patterns=patterns):
        chosen |= {id(p): group["algorithm"] for p in group["params"]}
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        is_matrix = name.endswith(".weight") and isinstance(module, (nn.Linear, ExpertLinear))
        is_muon = is_matrix and "k_proj" not in name  # routers, the head and decay projections too
        assert chosen[id(p)] == ("muon" if is_muon else "adamw"), name
    usual = muon_groups(model, 1e-3)
    none = muon_groups(model, 1e-3, patterns={"muon": ["nothing"], "adamw": []})
    assert [[id(p) for p in g["params"]] for g in usual] == [[id(p) for p in g["params"]] for g in none]
    names = ["model." + name for name, _ in model.named_parameters()]
    assert without_a_match(names, patterns | {"muon": ["lm_head.weight", "lm.*"]}) == ["lm.*"]


def test_the_other_group_moves_as_under_torchs_adamw():
    shapes = [(3,), (4, 5), (2, 3, 4), ()]
    ours, theirs = matrices(0, shapes), matrices(0, shapes)
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}
    run(Muon([{"params": ours, "algorithm": "adamw"}], **options), ours, skip=1)
    run(torch.optim.AdamW(theirs, **options, fused=True), theirs, skip=1)
    for p, expected in zip(ours, theirs, strict=True):
        assert torch.equal(p, expected)


def test_parts_and_experts_move_as_separate_matrices():
    rows = (6, 6, 1, 3)
    separate, fused = matrices(0, [(r, 7) for r in rows]), nn.Parameter(torch.cat(matrices(0, [(r, 7) for r in rows])))
    experts = nn.Parameter(torch.stack(matrices(1, [(4, 6)] * 3)))
    alone = matrices(1, [(4, 6)] * 3)
    one = Muon([{"params": [fused], "parts": rows}, {"params": [experts]}], **OPTIONS)
    other = Muon([*separate, *alone], **OPTIONS)
    for step in range(3):
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in (*separate, *alone)]
        for p, grad in zip((*separate, *alone), grads, strict=True):
            p.grad = grad
        fused.grad, experts.grad = torch.cat(grads[:4]), torch.stack(grads[4:])
        one.step()
        other.step()
    torch.testing.assert_close(fused, torch.cat(separate), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(experts, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_a_zero_gradient_moves_a_matrix_by_its_decay_alone():
    (p,) = matrices(0, [(4, 6)])
    before, p.grad = p.detach().clone(), torch.zeros(4, 6)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), 0.95 * before)


GROUPS = {
    "muon": "in_proj x_proj out_proj q_proj k_proj v_proj gate_proj up_proj down_proj "
    "latent_proj q_down_proj rope_key_proj",
    "adamw with decay": "embedding head router time_step_proj filter_in filter_hidden filter_out",
    "adamw": "decay_proj conv norm mixer_norm feed_forward_norm final_norm latent_norm q_latent_norm 0 1",
}


def test_every_parameter_is_in_the_group_of_its_kind():
    model = small_model("every mixer")
    groups = muon_groups(model, 1e-3, 0.1, adamw_lr_multiplier=0.5)
    group_of = {id(p): group for group in groups for p in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group, owner = group_of[id(p)], name.split(".")[-2]
        kind = "adamw"
        if name.endswith(".weight"):
            kind = next(kind for kind, owners in GROUPS.items() if owner in owners.split())
        if owner == "gate_proj" and len(p) <= 3:  # of branches or streams, which it weighs as a router weighs experts
            kind = "adamw with decay"
        is_muon = kind == "muon"
        assert (group["algorithm"], group["lr"]) == ("muon" if is_muon else "adamw", 1e-3 if is_muon else 5e-4), name
        assert group["weight_decay"] == (0.0 if kind == "adamw" else 0.1), name
        module = model.get_submodule(name.rpartition(".")[0])
        assert not is_muon or isinstance(module, (nn.Linear, ExpertLinear))


def test_products_have_the_parts_that_their_layer_splits_off():
    model = small_model("every mixer")
    parts = Counter(group["parts"] for group in muon_groups(model, 1e-3) if group["parts"])
    assert parts == Counter([(64, 64, 8, 8, 4), (64, 64), (2, 16, 16), (32, 32, 32)])


def test_a_tied_head_and_frozen_parameters():
    model = small_model("retention", tie_embeddings=True)
    frozen = [model.layers[0].mixer.q_proj.weight, model.layers[1].mixer_norm.weight]
    for p in frozen:
        p.requires_grad_(False)
    groups = muon_groups(model, 1e-3)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    (group,) = [g for g in groups if any(p is model.embedding.weight for p in g["params"])]
    assert group["algorithm"] == "adamw"


def test_adapters_train_with_adamw():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_model("gated"), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    groups = muon_groups(model, 1e-3)
    assert {group["algorithm"] for group in groups} == {"adamw"}
    assert sum(len(group["params"]) for group in groups) == 8


def test_a_model_without_named_matrices_trains_with_adamw_alone():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    optimizer = Muon(muon_groups(model, 1e-2))
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert {group["algorithm"] for group in optimizer.param_groups} == {"adamw"}


def test_routers_get_their_own_rate():
    model = small_model([replace(GATED, feed_forward=EXPERTS)])
    optimizer = Muon(muon_groups(model, 1e-3))
    separate_routers(optimizer, model, 0.25)
    (group,) = [g for g in optimizer.param_groups if g["lr"] == 2.5e-4]
    assert group["algorithm"] == "adamw"
    assert [id(p) for p in group["params"]] == [id(model.layers[0].feed_forward.router.weight)]


def test_a_loaded_state_continues_bit_for_bit():
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            optimizer.step()

    whole, stopped, resumed = (small_model([PAPER]) for _ in range(3))
    steps(whole, Muon(muon_groups(whole, 1e-2)), 0, 4)
    steps(stopped, before := Muon(muon_groups(stopped, 1e-2)), 0, 2)
    resumed.load_state_dict(stopped.state_dict())
    after = Muon(muon_groups(resumed, 1e-2))
    after.load_state_dict(before.state_dict())
    steps(resumed, after, 2, 4)
    for p, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, expected)


REFUSED = [
    ({"lr": -1.0}, "lr is -1.0; accepted: 0 or more"),
    ({"momentum": 1.0}, "momentum is 1.0; accepted: 0 or more, and below 1"),
    ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
    ({"ns_steps": 0}, "ns_steps is 0; accepted: 1 to 99"),
    ({"weight_decay": float("nan")}, "weight_decay is nan"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(matrices(0), **options)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [nn.Parameter(torch.ones(3))]}, r"shape \(3,\).*accepted: real matrices"),
        ({"params": [nn.Parameter(torch.ones(3, 2))], "parts": (2, 2)}, "accepted: parts that sum to them"),
        ({"params": [nn.Parameter(torch.ones(3, 2))], "algorithm": "sgd"}, "'sgd'; accepted: muon, adamw"),
    ],
)
def test_groups_that_cannot_be_trained_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        Muon([group])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_three_processes_train_as_one(kind):
    """Parts across shards, experts of which a process has none, vectors: three is odd for all of them."""
    script = Path(__file__).with_name("muon_processes.py")
    assert on_processes(3, str(script), kind) == "equal"
