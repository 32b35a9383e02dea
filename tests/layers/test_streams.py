"""Parallel streams: each merge is its definition, costs and refusals count the blocks inside."""

from dataclasses import replace

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import Block, BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.moe import MoEConfig
from retnet.layers.recompute import Recompute
from retnet.layers.streams import StreamsConfig, streams_block
from retnet.layers.token_layout import TokenLayout
from retnet.models.activations import activation_bytes
from retnet.models.cost import idle_parameters, model_cost
from retnet.models.init import INIT
from retnet.models.lm import LanguageModel
from retnet.serve.options import use_graphs
from tests.small_models import EXPERTS, GATED, HYENA, MAMBA2, PAPER, WIDTH, WINDOW, random_ids, small_config

STREAMS = ((WINDOW, MAMBA2), (PAPER,))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def layer_of(config: StreamsConfig) -> Block:
    torch.manual_seed(0)
    return Block(streams_block(config), WIDTH).double().eval()


def run(block: Block, x: torch.Tensor) -> torch.Tensor:
    return block(x, None, TokenLayout.of((2, 7), x.device))[0]


@pytest.mark.parametrize("merge", ["concat", "add", "gate"])
def test_a_layer_of_streams_returns_their_merge_alone(merge):
    layer = layer_of(StreamsConfig(STREAMS, merge))
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixer = layer.mixer
    first = run(mixer.streams[0][1], run(mixer.streams[0][0], x))
    second = run(mixer.streams[1][0], x)
    if merge == "concat":
        expected = first @ mixer.merge_proj.weight[:, :WIDTH].T + second @ mixer.merge_proj.weight[:, WIDTH:].T
    elif merge == "add":
        expected = first + second
    else:
        gates = (x @ mixer.gate_proj.weight.T).exp()
        expected = (gates[..., :1] * first + gates[..., 1:] * second) / gates.sum(-1, keepdim=True)
    torch.testing.assert_close(run(layer, x), expected, **EXACT)


def test_attention_between_streams_is_causal_and_adds_to_the_stream_of_its_queries():
    cross = AttentionConfig(4, 2, head_dim=8, rotary="none")
    layer = layer_of(StreamsConfig(STREAMS, "cross", cross, (1, 0)))
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixer = layer.mixer
    source = run(mixer.streams[0][1], run(mixer.streams[0][0], x))
    target = run(mixer.streams[1][0], x)
    q = (target @ mixer.cross.q_proj.weight.T).unflatten(-1, (4, 8))
    k, v = ((source @ proj.weight.T).unflatten(-1, (2, 8)) for proj in (mixer.cross.k_proj, mixer.cross.v_proj))
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 8**-0.5
    weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    out = torch.einsum("bhts,bshk->bthk", weights, v).flatten(-2) @ mixer.cross.out_proj.weight.T
    torch.testing.assert_close(run(layer, x), target + out, **EXACT)


def test_experts_inside_streams_are_idle_parameters_and_add_their_losses():
    experts = replace(PAPER, feed_forward=EXPERTS)
    config = small_config((streams_block(StreamsConfig(((experts,), (experts, GATED)), "add")),))
    assert idle_parameters(config) == 2 * EXPERTS.idle_parameters(WIDTH) > 0
    alone = small_config((experts, experts, GATED))
    assert model_cost(config, 100).state_bytes == model_cost(alone, 100).state_bytes
    assert abs(model_cost(config, 100).forward_flops - model_cost(alone, 100).forward_flops) == 4 * WIDTH
    assert activation_bytes(config, "none") > 0
    model, ids = LanguageModel(config).train(), random_ids(2, 9)
    losses: list[torch.Tensor] = []
    model.hidden(ids, losses=losses)
    assert len(losses) == 2
    with pytest.raises(ValueError, match="graphs is True for a model on cpu"):
        use_graphs(True, model)


@pytest.mark.parametrize("level", ["none", "light", "medium", "layer"])
def test_gradients_do_not_depend_on_what_is_recomputed(level):
    model = LanguageModel(small_config((streams_block(StreamsConfig(STREAMS, "gate")), PAPER))).train()
    ids, found = random_ids(2, 9), []
    for chosen in ("none", level):
        model.recompute = Recompute(chosen)
        model.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_initial_weights_count_the_longest_stream_as_depth():
    config = small_config((streams_block(StreamsConfig(((GATED,) * 5, (GATED,)))), GATED), init="paper")
    weights = LanguageModel(config).layers[1].mixer.v_proj.weight
    bound = INIT["paper"]["value"](6) * (6 / sum(weights.shape)) ** 0.5
    assert 0.97 * bound < weights.abs().max() <= bound


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match=r"streams have \[1\] blocks; accepted: at least two streams"):
        StreamsConfig(((PAPER,),))
    with pytest.raises(ValueError, match=r"streams have \[1, 0\] blocks"):
        StreamsConfig(((PAPER,), ()))
    cross = AttentionConfig(4, 2, head_dim=8, rotary="none")
    with pytest.raises(ValueError, match="cross is None with merge 'cross'"):
        StreamsConfig(STREAMS, "cross")
    with pytest.raises(ValueError, match="cross is given with merge 'add'"):
        StreamsConfig(STREAMS, "add", cross, (0, 1))
    for pair in ((), (0, 0), (0, 2), (0,)):
        with pytest.raises(ValueError, match=r"cross_streams is .* with merge 'cross'; accepted: two numbers"):
            StreamsConfig(STREAMS, "cross", cross, pair)
    with pytest.raises(ValueError, match=r"cross_streams is .* with merge 'add'"):
        StreamsConfig(STREAMS, "add", None, (0, 1))
    with pytest.raises(ValueError, match="cross has rotary 'half'"):
        StreamsConfig(STREAMS, "cross", AttentionConfig(4, 2, head_dim=8), (0, 1))
    with pytest.raises(ValueError, match="a stream has streams in it"):
        StreamsConfig(((PAPER,), (streams_block(StreamsConfig(STREAMS)),)))


def test_refusals_are_those_of_the_blocks():
    experts = BlockConfig(PAPER.mixer, MoEConfig(4, 2, 8))
    config = StreamsConfig(((PAPER,), (experts,)))
    assert config.refused_when_split == "it contains a mixture of experts, which is not divided"
    assert config.refused_on_shards.startswith("it contains a mixture of experts")
    assert config.refused_by_engine == ""
    assert StreamsConfig(((PAPER,), (HYENA,))).refused_by_engine.startswith("it contains hyena")
    assert not streams_block(StreamsConfig(((PAPER,), (replace(PAPER, keeps_state=False),)))).keeps_state
    half = StreamsConfig(STREAMS).part(0, 2)
    assert half.streams[1][0].mixer.num_heads == 1
    assert half.streams[1][0].feed_forward == FeedForwardConfig(WIDTH)
