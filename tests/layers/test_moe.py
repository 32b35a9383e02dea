import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retnet.layers.block import BlockConfig
from retnet.layers.moe import MoE, MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.layers.routing import assign
from retnet.layers.token_layout import TokenLayout
from retnet.models.lm import LanguageModel
from tests.small_models import small_model

D, E = 6, 5
ONE_DOCUMENT = torch.tensor([0, 5])
KINDS = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid"},
    "one expert": {"top_k": 1},
    "all experts": {"top_k": E},
    "plain with bias": {"gated": False, "activation": "gelu", "bias": True},
    "square root of softplus, scaled": {"router": "sqrt_softplus", "routed_scale": 2.5},
    "weights as they are": {"normalize_weights": False},
    "shared experts": {"shared_hidden_dim": 12, "bias": True},
    "bias of scores": {"router": "sigmoid", "bias_update_rate": 0.1},
    "groups": {"num_experts": 6, "num_groups": 3, "top_groups": 2, "router": "sigmoid", "bias_update_rate": 0.1},
    "groups of one": {"num_groups": 5, "top_groups": 3, "top_k": 3, "bias_update_rate": 0.0},
}


def build(**options) -> MoE:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{"num_experts": E, "top_k": 2, "hidden_dim": 8, **options}), D).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if layer.routing_bias is not None:
            layer.routing_bias.normal_(std=0.5)
    return layer.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expert(layer: MoE, e: int, x: Tensor) -> Tensor:
    def linear(part, x: Tensor) -> Tensor:
        return part.weight[e] @ x + (0 if part.bias is None else part.bias[e])

    hidden = linear(layer.up_proj, x)
    if layer.gate_proj is None:
        return linear(layer.down_proj, layer.activation(hidden))
    return linear(layer.down_proj, layer.activation(linear(layer.gate_proj, x)) * hidden)


def scores_of(layer: MoE, row: Tensor) -> Tensor:
    logits = layer.router.weight @ row
    match layer.config.router:
        case "softmax":
            return logits.exp() / logits.exp().sum()
        case "sigmoid":
            return 1 / (1 + (-logits).exp())
        case _:
            return (1 + logits.exp()).log().sqrt()


def choice(layer: MoE, scores: Tensor) -> list[int]:
    """The experts of one token: the best of the best groups, by score plus bias."""
    config, groups = layer.config, []
    value = (scores + (0 if layer.routing_bias is None else layer.routing_bias)).tolist()
    size = config.num_experts // config.num_groups
    for g in range(config.num_groups):
        members = list(range(g * size, (g + 1) * size))
        groups.append((sum(sorted((value[e] for e in members), reverse=True)[:2]), members))
    groups.sort(reverse=True)
    allowed = [e for _, members in groups[: config.top_groups] for e in members]
    return sorted(allowed, key=lambda e: value[e], reverse=True)[: config.top_k]


def by_definition(layer: MoE, x: Tensor) -> Tensor:
    """One token and one expert at a time."""
    out, config = torch.zeros_like(x), layer.config
    for i, row in enumerate(x):
        scores = scores_of(layer, row)
        best = choice(layer, scores)
        total = sum(scores[e] for e in best) if config.normalize_weights and len(best) > 1 else 1.0
        out[i] = config.routed_scale * sum(scores[e] / total * expert(layer, e, row) for e in best)
        if layer.shared is not None:
            hidden = layer.activation(layer.shared.gate_proj(row)) * layer.shared.up_proj(row)
            out[i] += layer.shared.down_proj(hidden)
    return out


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_token_gets_its_best_experts_by_the_definition(kind):
    layer, x = build(**KINDS[kind]), tokens(2, 7)
    expected = by_definition(layer, x.flatten(0, 1)).view(2, 7, D)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:] = False
    masked = layer(x, TokenLayout.of((2, 7), x.device, mask=mask, losses=[]))
    torch.testing.assert_close(masked[mask], expected[mask], rtol=1e-12, atol=1e-12)
    assert layer(x[:, :0]).shape == (2, 0, D)


@pytest.mark.parametrize("policy", ["overflow", "drop", "pad"])
def test_with_room_for_all_no_policy_changes_outputs_or_gradients(policy):
    free, tight = build().train(), build(capacity_factor=float(E), capacity_policy=policy).train()
    results = []
    for layer in (free, tight):
        x = tokens(2, 7).requires_grad_()
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_in_evaluation_no_token_depends_on_another():
    layer, x = build(capacity_factor=0.5), tokens(1, 12)
    whole = layer(x)
    torch.testing.assert_close(layer(x[:, :5]), whole[:, :5], rtol=1e-12, atol=1e-12)
    alone = torch.cat([layer(x[:, t : t + 1]) for t in range(12)], 1)
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)


def test_drop_and_pad_agree_and_give_zero_beyond_the_capacity():
    drop, pad = (build(capacity_factor=0.5, capacity_policy=policy).train() for policy in ("drop", "pad"))
    free, x = build().train(), tokens(1, 20)
    torch.testing.assert_close(drop(x), pad(x), rtol=1e-12, atol=1e-12)
    scores = drop._router_logits(x[0]).softmax(-1)
    _, _, kept = assign(scores, 2, torch.tensor([math.ceil(0.5 * 2 * 20 / E)]), torch.tensor([0, 20]), overflow=False)
    full, none = kept.all(-1), ~kept.any(-1)
    assert full.any()
    assert none.any()
    torch.testing.assert_close(drop(x)[0, full], free(x)[0, full], rtol=1e-12, atol=1e-12)
    assert drop(x)[0, none].abs().sum() == 0


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("room", [[1], [3], [100], [2, 1, 0, 4]])
def test_assignment_serves_ranks_then_tokens_in_order_in_every_document(overflow, room):
    scores = torch.rand(12, E, generator=torch.Generator().manual_seed(2))
    bounds = [0, 5, 6, 6, 12] if len(room) > 1 else [0, 12]
    experts, places, kept = assign(scores, 2, torch.tensor(room), torch.tensor(bounds), overflow)
    ranked = scores.argsort(-1, descending=True).tolist()
    found = {i: [] for i in range(12)}
    for n, (begin, end) in enumerate(pairwise(bounds)):
        left = [room[n]] * E
        for rank in range(E if overflow else 2):
            for i in range(begin, end):
                if len(found[i]) < 2 and left[ranked[i][rank]]:
                    left[ranked[i][rank]] -= 1
                    found[i].append(ranked[i][rank])
        seats = [(e, p) for e, p in zip(experts[begin:end][kept[begin:end]], places[begin:end][kept[begin:end]])]
        assert len({(int(e), int(p)) for e, p in seats}) == len(seats)
        assert all(0 <= p < room[n] for _, p in seats)
    assert [row[keep].tolist() for row, keep in zip(experts, kept)] == list(found.values())


@pytest.mark.parametrize("policy", ["overflow", "drop", "pad"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_capacity_in_training_is_that_of_each_document_alone(kind, policy):
    layer = build(capacity_factor=0.6, capacity_policy=policy, **KINDS[kind]).train()
    bounds = [0, 1, 8, 8, 21, 30]
    x = tokens(1, 30).requires_grad_()
    packed = layer(x, TokenLayout.of((1, 30), x.device, cu_seqlens=torch.tensor(bounds)))
    alone = torch.cat([layer(x[:, begin:end]) for begin, end in pairwise(bounds)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]) for out in (packed, alone)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("policy", ["overflow", "drop", "pad"])
def test_rows_of_a_batch_share_no_capacity_and_padding_takes_none(policy):
    layer, x = build(capacity_factor=0.6, capacity_policy=policy).train(), tokens(3, 10)
    batch = layer(x, TokenLayout.of((3, 10), x.device))
    torch.testing.assert_close(batch, torch.cat([layer(row[None]) for row in x]), rtol=1e-12, atol=1e-12)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, :4] = mask[1, 7:] = False
    masked = layer(x, TokenLayout.of((3, 10), x.device, mask=mask))
    for row, real, out in zip(x, mask, masked):
        torch.testing.assert_close(out[real], layer(row[real][None])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["overflow", "drop"])
def test_capacity_under_torch_func_is_the_same(policy):
    layer, x = build(capacity_factor=0.6, capacity_policy=policy).train(), tokens(3, 10)
    loss = lambda x: layer(x[None]).square().sum()  # noqa: E731
    expected = torch.stack([torch.autograd.functional.jacobian(loss, row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected, rtol=1e-11, atol=1e-11)


def test_overflow_uses_room_that_drop_leaves_empty():
    x = tokens(1, 20)
    drop, overflow = (build(capacity_factor=1.0, capacity_policy=p).train()(x)[0] for p in ("drop", "overflow"))
    assert (drop.abs().sum(-1) == 0).sum() >= (overflow.abs().sum(-1) == 0).sum()
    assert not torch.allclose(drop, overflow)


def test_balance_loss_is_its_coefficient_at_balance_and_larger_without():
    layer = build(load_balance_coef=0.25, top_k=1)
    even = torch.eye(E, dtype=torch.float64) * 50
    one = torch.zeros(4, E, dtype=torch.float64)
    one[:, 2] = 50
    assert layer.losses(even, even.softmax(-1), ONE_DOCUMENT).item() == pytest.approx(0.25)
    assert layer.losses(one, one.softmax(-1), ONE_DOCUMENT).item() == pytest.approx(0.25 * E)


def test_z_loss_is_the_mean_square_of_the_log_partition():
    layer = build(load_balance_coef=0.0, z_loss_coef=2.0)
    logits = torch.tensor([[0.0] * E, [1.0] * E], dtype=torch.float64)
    expected = 2.0 * (math.log(E) ** 2 + (1 + math.log(E)) ** 2) / 2
    assert layer.losses(logits, logits.softmax(-1), ONE_DOCUMENT).item() == pytest.approx(expected)


def test_padding_neither_counts_in_losses_nor_takes_capacity():
    layer = build(capacity_factor=1.0, capacity_policy="drop", z_loss_coef=0.1).train()
    x, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = mask[1, 6:] = False
    results = []
    for value in (x, x.masked_fill(~mask[..., None], 3.0)):
        layout = TokenLayout.of((2, 8), x.device, mask=mask, losses=[])
        results.append((layer(value, layout)[mask], layout.losses))
    real = TokenLayout.of((1, 11), x.device, cu_seqlens=torch.tensor([0, 5, 11]), losses=[])
    results.append((layer(x[mask][None], real)[0], real.losses))
    for out, losses in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(losses, results[0][1], rtol=1e-12, atol=1e-12)


def test_jitter_acts_in_training_alone():
    layer, x = build(router_jitter=0.5), tokens(1, 9)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def model(checkpointing: bool = False, **options) -> LanguageModel:
    block = BlockConfig(RetentionConfig(2, 8, 8), MoEConfig(E, 2, 8, **options))
    return small_model([block] * 2, init="normal", vocab_size=11, dtype="float64", gradient_checkpointing=checkpointing)


def test_losses_of_all_layers_are_in_the_models_loss_of_training_alone_and_train_the_router():
    ids = torch.arange(10)[None]
    plain, balanced = model(load_balance_coef=0.0), model(load_balance_coef=0.5, z_loss_coef=0.1)
    output = balanced(ids)
    cross_entropy = torch.nn.functional.cross_entropy(output.logits[0], ids[0])
    assert output.auxiliary_loss.item() > 2 * 0.5 * 0.9
    torch.testing.assert_close(balanced.loss(ids, ids), cross_entropy)
    plain.train()
    balanced.train()
    torch.testing.assert_close(balanced.loss(ids, ids), cross_entropy + output.auxiliary_loss)
    torch.testing.assert_close(plain.loss(ids, ids), cross_entropy)
    routers = [m.layers[0].feed_forward.router.weight for m in (plain, balanced)]
    grads = [torch.autograd.grad(m.loss(ids, ids), w)[0] for m, w in zip((plain, balanced), routers)]
    assert all(grad.norm() > 0 for grad in grads)
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_of_either_kind_keeps_the_losses_gradients(reentrant, masked):
    ids, grads = torch.arange(10)[None], []
    mask = (ids != 3) if masked else None
    for checkpointing in (False, True):
        lm = model(checkpointing, load_balance_coef=0.5, z_loss_coef=0.1).train()
        lm.checkpoint = partial(checkpoint, use_reentrant=reentrant)
        lm.loss(ids, ids, mask=mask).backward()
        grads.append([weight.grad for weight in lm.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_initial_router_weights_have_the_size_asked_for():
    weight = model(router_init_std=0.5).layers[1].feed_forward.router.weight
    assert 0.35 < weight.std().item() < 0.65
    first, second = model().layers[1].feed_forward.up_proj.weight[:2]
    assert first.std() > 0
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, r"top_k is 6; accepted: 1 to num_experts \(5\)"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"router_jitter": 1.0}, "router_jitter is 1.0"),
        ({"z_loss_coef": -1.0}, "z_loss_coef is -1.0"),
        ({"routed_scale": math.nan}, "routed_scale is nan"),
        ({"shared_hidden_dim": 0}, "shared_hidden_dim is 0"),
        ({"bias_update_rate": -0.1}, "bias_update_rate is -0.1"),
        ({"router": "sqrt"}, "router is 'sqrt'; accepted: softmax, sigmoid, sqrt_softplus"),
        ({"num_groups": 2}, "num_groups is 2 of 5 experts; accepted: a divisor"),
        ({"num_groups": 5, "top_groups": 6}, r"top_groups is 6; accepted: 1 to num_groups \(5\)"),
        ({"num_groups": 5, "top_groups": 1}, "top_k is 2 with 1 groups of 1 experts; accepted: at most 1"),
    ],
)
def test_invalid_configurations_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 5, "top_k": 2, "hidden_dim": 8, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_the_grouped_product_equals_one_expert_at_a_time(bias):
    torch.manual_seed(0)
    layer = MoE(MoEConfig(8, 2, 64, bias=bias), 32).cuda().bfloat16()
    x = torch.randn(2, 50, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn_like(x)
    grads = torch.autograd.grad((layer(x) * weight).sum(), [x, *layer.parameters()])
    wide, wide_x = layer.double(), x.detach().double().requires_grad_()
    expected = torch.autograd.grad((wide(wide_x) * weight).sum(), [wide_x, *wide.parameters()])
    for a, b in zip(grads, expected):
        assert (a.double() - b).norm() <= 3e-2 * b.norm()
