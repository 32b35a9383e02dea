"""Branched mixers: each merge is its definition, states are those of the branches, errors name the branch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from retnet.layers.attention import AttentionConfig
from retnet.layers.branched import BranchedConfig, BranchedState
from retnet.layers.hyena import HyenaConfig
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixers import mixer_of
from retnet.layers.retention import RetentionConfig
from retnet.layers.token_layout import TokenLayout
from retnet.models.config import ModelConfig
from retnet.models.decode.sampling import Sampling
from retnet.models.states import ModelState
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import GATED_BESIDE, small_config, small_model

D = 12
BRANCHES = AttentionConfig(4, 2, head_dim=6), Mamba2Config(12, head_dim=3, state_dim=5), RetentionConfig(2, 8, 12)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def layer_of(config: BranchedConfig):
    torch.manual_seed(0)
    return mixer_of(config).module(config, D).double().eval()


def outputs(layer, x: Tensor, scales=(1.0, 1.0, 1.0)) -> list[Tensor]:
    layout = TokenLayout.of((2, 7), x.device)
    return [branch(scale * x, None, layout)[0] for branch, scale in zip(layer.branches, scales, strict=True)]


def merged(layer, x: Tensor) -> Tensor:
    return layer(x, None, TokenLayout.of((2, 7), x.device))[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_sum_scales_the_input_and_the_output_of_each_branch(x):
    layer = layer_of(BranchedConfig(BRANCHES, "sum", (0.5, 1.0, -2.0), (3.0, 0.25, 1.0)))
    a, b, c = outputs(layer, x, (0.5, 1.0, -2.0))
    torch.testing.assert_close(merged(layer, x), 3 * a + 0.25 * b + c, **EXACT)
    assert [name for name, _ in layer.named_parameters() if not name.startswith("branches.")] == []


def test_a_mean_norms_each_branch_and_weighs_its_channels(x):
    layer, expected = layer_of(BranchedConfig(BRANCHES, "mean", norm_eps=1e-3)), 0
    for y, norm in zip(outputs(layer, x), layer.norms, strict=True):
        norm.weight.data.normal_()
        expected = expected + norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(merged(layer, x), expected / 3, **EXACT)


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
def test_gates_are_a_softmax_over_the_branches_that_a_token_uses(x, top_k):
    layer = layer_of(BranchedConfig(BRANCHES, "gate", top_k=top_k))
    outs, expected = outputs(layer, x), torch.zeros_like(x)
    for row in range(2):
        for t in range(7):
            p = (layer.gate_proj.weight @ x[row, t]).softmax(0)
            used = sorted(range(3), key=lambda i: -p[i])[: top_k or 3]
            total = 1 if top_k == 1 else sum(p[i] for i in used)
            expected[row, t] = sum(p[i] / total * outs[i][row, t] for i in used)
    torch.testing.assert_close(merged(layer, x), expected, **EXACT)


def test_one_branch_per_token_still_trains_the_gate(x):
    layer = layer_of(BranchedConfig(BRANCHES, "gate", top_k=1))
    merged(layer, x).square().sum().backward()
    assert bool(layer.gate_proj.weight.grad.abs().sum() > 0)


def test_the_state_of_a_model_is_named_by_branch_and_built_again_from_the_names(tmp_path):
    model = small_model((GATED_BESIDE, GATED_BESIDE))
    with torch.no_grad():
        state = model(torch.zeros(2, 5, dtype=torch.long), carry=True).state
    names = [name for name in state.named_tensors() if name.startswith("1.")]
    assert names == [
        "1.branched.position", "1.branched.0/retention/memory", "1.branched.1/attention/keys",
        "1.branched.1/attention/values", "1.branched.2/mamba1/memory", "1.branched.2/mamba1/recent",
    ]  # fmt: skip
    state.save(tmp_path / "state")
    again = ModelState.load(tmp_path / "state")
    assert all(torch.equal(x, again.named_tensors()[name]) for name, x in state.named_tensors().items())
    positions = [leaf.position for layer in again for leaf in layer.leaves]
    assert len({position.data_ptr() for position in positions}) == 6
    assert all(position.tolist() == [5, 5] for position in positions)
    assert state.nbytes == sum(leaf.nbytes for layer in state for leaf in layer.leaves)


@pytest.mark.parametrize("name", ["0/mlp/memory", "x/retention/memory", "0/retention", "1/retention/memory"])
def test_names_that_no_state_has_are_refused(name):
    with pytest.raises(ValueError, match="accepted"):
        BranchedState.from_tensors({"position": torch.zeros(1), name: torch.zeros(1)})


def test_the_engine_keeps_branches_that_a_prompt_chunk_updates_in_place_and_others_that_it_replaces():
    model = small_model((GATED_BESIDE,), dtype="float64")
    ids, greedy = torch.arange(11)[None] * 5 % 61, Sampling(temperature=0)
    with torch.no_grad():
        slots = model.init_state(1, num_tokens=20)
        after = model(ids, slots, carry=True, in_place=True).state
        same = [new is old for old, new in zip(slots.layers[0].leaves, after.layers[0].leaves, strict=True)]
        assert same == [False, True, False]
    engine = Engine(model, num_slots=4, max_tokens=20)
    generation = engine.submit(Request(ids[0].tolist(), 6, greedy, keep_state=True))
    engine.run()
    with torch.no_grad():
        expected = model(torch.cat([ids, torch.tensor([generation.tokens[:-1]])], 1), carry=True).state
    for name, x in expected.named_tensors().items():
        torch.testing.assert_close(generation.snapshot.state.named_tensors()[name], x, **EXACT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": BRANCHES[:1]}, "branches has 1 mixers; accepted: at least two"),
        (
            {"branches": (GATED_BESIDE.mixer, BRANCHES[0])},
            r"branches\[0\] is branched; accepted: mixers that are not made",
        ),
        ({"output_scales": (1.0, 2.0)}, r"output_scales is \(1.0, 2.0\); accepted: 3 finite numbers, one per branch"),
        ({"input_scales": (1.0, 2.0, float("nan"))}, "input_scales is .*; accepted: 3 finite numbers"),
        ({"top_k": 2}, "top_k is 2 with merge 'sum'; accepted: None, or with merge 'gate' 1 to 3"),
        ({"merge": "gate", "top_k": 4}, "top_k is 4 with merge 'gate'; accepted: None, or with merge 'gate' 1 to 3"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(BranchedConfig(BRANCHES), **changes)


def test_the_json_of_a_configuration_names_the_branch_that_is_wrong():
    data = small_config((GATED_BESIDE,)).to_dict()
    assert ModelConfig.from_dict(data).layers == (GATED_BESIDE,)
    branches = data["layers"][0]["layer"]["mixer"]["branches"]
    branches[1]["head_dim"] = "wide"
    with pytest.raises(ValueError, match=r"mixer\.branches\[1\]\.head_dim: expected int, got str 'wide'"):
        ModelConfig.from_dict(data)
    data["layers"][0]["layer"]["mixer"]["branches"] = 3
    with pytest.raises(ValueError, match=r"mixer\.branches: expected a list, got int 3"):
        ModelConfig.from_dict(data)


def test_what_a_branch_refuses_the_layer_refuses():
    config = BranchedConfig((BRANCHES[0], HyenaConfig()))
    assert config.refused_by_engine.startswith("it contains hyena: the cost of each token grows")
    assert config.refused_on_shards.startswith("it contains hyena: ")
    assert config.refused_when_split.startswith("it contains hyena: ")
    plain = BranchedConfig(BRANCHES)
    assert plain.refused_by_engine == plain.refused_on_shards == plain.refused_when_split == ""
    assert config.for_export(True) is None
    assert small_model((GATED_BESIDE,)).config.layers[0].mixer.kept_tokens == float("inf")
