"""Hyper-connections: each mixing is its definition, a model begins as one with plain residuals, costs are counted."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from retnet.layers.block import Block, BlockConfig, connect_streams
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyper_connection import (
    LEAST_LOGIT,
    HyperConnection,
    HyperConnectionConfig,
    hyper_connection_flops,
    sinkhorn,
)
from retnet.layers.multi_token import MultiTokenConfig
from retnet.layers.recompute import Recompute
from retnet.layers.streams import StreamsConfig, streams_block
from retnet.layers.token_layout import TokenLayout
from retnet.models.activations import activation_bytes
from retnet.models.config import ModelConfig
from retnet.models.cost import model_cost, parameter_counts
from retnet.models.decode.fused import FusedModel
from retnet.models.lm import LanguageModel
from retnet.train.muon import muon_groups
from retnet.train.optimizer import decayed_parameters
from tests.small_models import (
    BIRKHOFF,
    EXPERTS,
    GATED,
    LOW_RANK,
    MAMBA2,
    PAPER,
    UNCONSTRAINED,
    WIDTH,
    WINDOW,
    random_ids,
    small_config,
    small_model,
)  # fmt: skip

MIXINGS = ("birkhoff", "unconstrained", "learned_lowrank")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
Streams = list[list[float]]


def reference(config: HyperConnectionConfig, b: Tensor, a: Tensor, w: Tensor | None, s: Tensor, y: Tensor):
    """One token in plain loops: streams s [n, D] and a branch's output y [D] -> (its input [D], the streams after)."""
    n, z = config.num_streams, b.clone()
    counts = config.num_logits
    if w is not None:
        flat = s.flatten()
        normed = flat / (flat.square().mean() + 1e-6).sqrt()
        for i in range(len(b)):
            moved = (w[i] * normed).sum()
            kind = 0 if i < counts[0] else 1 if i < 2 * n else 2
            z[i] = b[i] + a[kind] * (moved if config.mixing == "birkhoff" else moved.tanh())
    read, write, mix = z[:n], z[n : 2 * n], z[2 * n :]
    if config.mixing == "birkhoff":
        read, write = 2 / (1 + (-read).exp()), 2 / (1 + (-write).exp())
        matrix = mix.view(n, n).exp()
        matrix = matrix / matrix.sum(1, keepdim=True)
        for _ in range(config.sinkhorn_iters):
            matrix = matrix / matrix.sum(0, keepdim=True)
            matrix = matrix / matrix.sum(1, keepdim=True)
    elif config.mixing == "unconstrained":
        matrix = mix.view(n, n)
    else:
        left, right = mix.view(2, n, -1)
        matrix = torch.eye(n, dtype=s.dtype) + left @ right.T
    x = sum(read[j] * s[j] for j in range(n))
    after = [sum(matrix[i, j] * s[j] for j in range(n)) + write[i] * y for i in range(n)]
    return x, torch.stack(after)


@pytest.mark.parametrize(("mixing", "dynamic", "n"), [*product(MIXINGS, (True, False), (1, 3))])
def test_reading_mixing_and_writing_are_their_definition(mixing, dynamic, n):
    torch.manual_seed(0)
    config = HyperConnectionConfig(n, mixing, sinkhorn_iters=2, dynamic=dynamic)
    module = HyperConnection(config, 5).double()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    s, y = torch.randn(2, 4, n * 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    x, weights = module.read(s)
    after = module.write(s, y, weights)
    for row, t in product(range(2), range(4)):
        one, many = reference(
            config, module.stream_bias, module.stream_scale, module.stream_weight, s[row, t].view(n, 5), y[row, t]
        )
        torch.testing.assert_close(x[row, t], one, **EXACT)
        torch.testing.assert_close(after[row, t].view(n, 5), many, **EXACT)


@pytest.mark.slow
def test_the_weights_are_those_of_deepseek_v4s_module_in_the_limit_of_many_iterations():
    """transformers' module divides in another order, reads half of ours, and mixes with the transposed matrix."""
    pytest.importorskip("transformers.models.deepseek_v4", reason="transformers without DeepSeek-V4")
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    torch.manual_seed(0)
    n, width = 4, 6
    options = {"hc_mult": n, "hidden_size": width, "hc_sinkhorn_iters": 300, "hc_eps": 1e-12, "rms_norm_eps": 1e-6}
    theirs = DeepseekV4HyperConnection(DeepseekV4Config(**options))
    ours = HyperConnection(HyperConnectionConfig(n, sinkhorn_iters=300), width)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.5)
    transposed = torch.cat([torch.arange(2 * n), 2 * n + torch.arange(n * n).view(n, n).T.flatten()])
    with torch.no_grad():
        theirs.fn.copy_(ours.stream_weight[transposed])
        theirs.base.copy_(ours.stream_bias[transposed])
        theirs.scale.copy_(ours.stream_scale)
        s, y = torch.randn(2, 3, n * width), torch.randn(2, 3, width)
        streams = s.unflatten(-1, (n, width))
        post, comb, collapsed = theirs(streams)
        x, weights = ours.read(s)
        torch.testing.assert_close(x, 2 * collapsed, rtol=1e-4, atol=1e-4)
        after = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ streams
        torch.testing.assert_close(ours.write(s, y, weights), after.flatten(-2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mixing", "dynamic", "n"), [*product(MIXINGS, (True,), (1, 4)), ("birkhoff", False, 3)])
def test_a_model_begins_as_one_with_plain_residuals(mixing, dynamic, n):
    hyper = HyperConnectionConfig(n, mixing, dynamic=dynamic)
    plain = small_model((PAPER, replace(MAMBA2, residual_scale=0.7), WINDOW))
    model = LanguageModel(replace(plain.config, layers=tuple(replace(b, hyper=hyper) for b in plain.config.layers)))
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("_hyper.stream_" in name for name in missing)
    ids = random_ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits, rtol=2e-5, atol=2e-5)
    if n > 1:  # every branch reads other streams, so that their gradients differ
        found = [p for name, p in model.named_parameters() if name.endswith("stream_bias")]
        assert len({tuple(p[:n].tolist()) for p in found}) == len(found) == 5


def test_sinkhorn_gives_rows_of_sum_1_and_columns_close_to_it_for_any_logits():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 4, 7, dtype=torch.float64)
    errors = []
    for iterations in (0, 3, 20, 200):
        matrix = sinkhorn(logits, iterations)
        torch.testing.assert_close(matrix.sum(1), torch.ones(4, 7, dtype=torch.float64), **EXACT)
        errors.append((matrix.sum(0) - 1).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < 0.1 < errors[0]
    far = torch.full((4, 4, 1), 4 * LEAST_LOGIT)
    far[:, 2] = 1e4  # every row prefers one column, so that the others would vanish
    far.requires_grad_()
    matrix = sinkhorn(far, 3)
    matrix.square().sum().backward()
    assert matrix.isfinite().all()
    assert far.grad.isfinite().all()


def test_the_mean_of_streams_is_kept_through_many_layers():
    torch.manual_seed(0)
    streams = torch.randn(1, 1, 4 * 8, dtype=torch.float64)
    module = HyperConnection(HyperConnectionConfig(4, sinkhorn_iters=50), 8).double()
    torch.nn.init.normal_(module.stream_bias)
    after = streams
    for _ in range(30):
        after = module.write(after, torch.zeros(1, 1, 8, dtype=torch.float64), module.read(after)[1])
    assert (after.unflatten(-1, (4, 8)).mean(-2) - streams.unflatten(-1, (4, 8)).mean(-2)).abs().max() < 1e-9


def test_equal_numbers_of_streams_are_passed_on_and_others_merged():
    layers = [replace(PAPER, hyper=hyper) for hyper in (None, BIRKHOFF, LOW_RANK, UNCONSTRAINED, None)]
    model = small_model(layers, mtp=MultiTokenConfig(layers[1], num_blocks=2))
    assert [block.takes_streams for block in model.layers] == [False, False, True, False, False]
    assert [block.gives_streams for block in model.layers] == [False, True, False, False, False]
    assert [block.takes_streams for block in model.mtp[0].blocks] == [False, True]
    inner: list[Tensor] = []
    hidden, _ = model.hidden(random_ids(2, 5), inner=inner)
    assert {x.shape for x in inner} == {hidden.shape}
    torch.testing.assert_close(model.final_norm(inner[-1]), hidden)
    x = inner[1]
    for block in model.layers[1:3]:
        x, _ = block(x, None, TokenLayout.of((2, 5), x.device))
    torch.testing.assert_close(x, inner[3])


@pytest.mark.parametrize("level", ["light", "medium", "layer"])
def test_gradients_do_not_depend_on_what_is_recomputed(level):
    layers = (replace(PAPER, hyper=BIRKHOFF, dropout=0.3), replace(MAMBA2, hyper=BIRKHOFF))
    model, ids, found = small_model(layers).train(), random_ids(2, 9), []
    for chosen in ("none", level):
        model.recompute = Recompute(chosen)
        model.zero_grad()
        torch.manual_seed(0)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_bfloat16_models_keep_the_logits_of_the_weights_in_float32():
    model = small_model((replace(PAPER, hyper=BIRKHOFF),), dtype="bfloat16")
    hyper = model.layers[0].mixer_hyper
    assert (hyper.stream_bias.dtype, hyper.stream_scale.dtype) == (torch.float32, torch.float32)
    assert hyper.stream_weight.dtype == torch.bfloat16
    assert model(random_ids(2, 5)).logits.dtype == torch.bfloat16
    wide = small_model((replace(PAPER, hyper=BIRKHOFF),)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = wide.loss(random_ids(2, 8), random_ids(2, 8, seed=1))
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in wide.parameters())


def test_parameters_and_operations_are_counted():
    n, plain, wide = 4, (PAPER, WINDOW), HyperConnectionConfig(4)
    configs = [small_config(layers) for layers in (plain, [replace(block, hyper=wide) for block in plain])]
    counts = [parameter_counts(config)["layers"] for config in configs]
    of_one = (n * n + 2 * n) * (1 + n * WIDTH) + 3
    assert counts[1] - counts[0] == 4 * of_one
    flops = [model_cost(config, 64).forward_flops for config in configs]
    beside = 2 * n * WIDTH * (n + 3) + 4 * 3 * n * n
    assert flops[1] - flops[0] == 4 * (2 * of_one + beside) == 4 * 2 * of_one + hyper_connection_flops(wide, 4, WIDTH)
    streams = [small_config((streams_block(StreamsConfig((config.layers, (PAPER,)))),)) for config in configs]
    inside = [model_cost(config, 64).forward_flops for config in streams]
    assert inside[1] - inside[0] == flops[1] - flops[0]


@pytest.mark.slow
def test_activations_hold_the_streams_once_per_branch():
    configs, n = [small_config((PAPER,)), small_config((replace(PAPER, hyper=HyperConnectionConfig(4)),))], 4
    held = [activation_bytes(config, "layer", autocast=False) for config in configs]
    assert held[1] == n * held[0]
    held = [activation_bytes(config, "none", autocast=False) for config in configs]
    small = 4 * 40 * (n * n + 2 * n)  # bytes per branch: logits and Sinkhorn's steps
    assert 2 * 4 * (n - 1) * WIDTH < held[1] - held[0] < 2 * (4 * (n + 2) * WIDTH + small)


def test_small_matrices_go_to_adamw_without_weight_decay():
    model = small_model((replace(PAPER, hyper=BIRKHOFF), replace(PAPER, feed_forward=EXPERTS, hyper=UNCONSTRAINED)))
    hyper = {id(p): name for name, p in model.named_parameters() if "_hyper." in name}
    assert len(hyper) == 4 * 3
    for group in muon_groups(model, 1.0, 0.1, patterns={"muon": ["*"], "adamw": []}):
        if hyper.keys() & set(map(id, group["params"])):
            assert (group["algorithm"], group["weight_decay"]) == ("adamw", 0.0)
    assert not set(hyper.values()) & set(decayed_parameters(model))


def test_the_fused_step_runs_such_layers_as_modules_between_fused_ones():
    model = small_model((GATED, replace(GATED, hyper=BIRKHOFF), replace(PAPER, hyper=BIRKHOFF), PAPER))
    fused, state = FusedModel(model), model.init_state(2)
    assert [block is None for block in fused.blocks] == [False, True, True, False]
    ids = random_ids(2, 4)
    with torch.no_grad():
        for t in range(4):
            logits, state = fused(ids[:, t], state)
        torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"norm_position": "post"}, {"residual": "parallel"}, {"skip_scale": 0.5}, {"feed_forward_skip_scale": 0.5}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_residuals_are_refused_beside_them(changes):
    block = BlockConfig(PAPER.mixer, FeedForwardConfig(8), **changes)
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; accepted with hyper-connections: "):
        replace(block, hyper=BIRKHOFF)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_streams": 0}, "num_streams is 0; accepted: 1 to 64"),
        ({"num_streams": 65}, "num_streams is 65; accepted: 1 to 64"),
        ({"num_streams": 2, "sinkhorn_iters": -1}, "sinkhorn_iters is -1; accepted: 0 to 1000"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HyperConnectionConfig(**options)


def test_a_block_alone_takes_and_gives_one_stream():
    block = Block(replace(PAPER, hyper=BIRKHOFF), WIDTH)
    x = torch.randn(2, 3, WIDTH)
    assert block(x, None, TokenLayout.of((2, 3), x.device))[0].shape == x.shape
    both = [Block(replace(PAPER, hyper=BIRKHOFF), WIDTH) for _ in range(2)]
    connect_streams(both)
    assert both[0](x, None, TokenLayout.of((2, 3), x.device))[0].shape == (2, 3, 2 * WIDTH)


def test_an_older_configuration_has_none():
    data = small_config((PAPER,)).to_dict()
    del data["layers"][0]["layer"]["hyper"]
    assert ModelConfig.from_dict(data).layers[0].hyper is None
