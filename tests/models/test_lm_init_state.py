"""`LanguageModel.init_state`: the state before the first token, made without running the model."""

from dataclasses import replace

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.branched import BranchedConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from retnet.layers.streams import StreamsConfig
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from tests.small_models import own_mixers

MIXER_CASES = {
    "retention": RetentionConfig(2, 8, 12),
    "gated retention with grouped keys": RetentionConfig(2, 8, 12, decay="gated", num_kv_heads=1),
    "convolution of q and v": RetentionConfig(2, 8, 12, conv_width=3, conv_on=("q", "v")),
    "attention": AttentionConfig(4, 2, head_dim=6),
    "sliding window": AttentionConfig(4, 1, head_dim=6, window=3),
    "latents": LatentAttentionConfig(4, 2, head_dim=6, rotary="half", latent_dim=5, rope_dim=2),
    "mamba1": Mamba1Config(14, time_step_rank=2, state_dim=3),
    "mamba2": Mamba2Config(12, head_dim=3, state_dim=4, num_groups=2),
    "hyena": HyenaConfig(order=3, filter_hidden=6),
    "branched": BranchedConfig((AttentionConfig(4, 2, head_dim=6), Mamba2Config(12, head_dim=3, state_dim=4)), "gate"),
    "streams": StreamsConfig(
        ((BlockConfig(AttentionConfig(4, 2, head_dim=6), None),), (BlockConfig(RetentionConfig(2, 8, 12), None),) * 2)
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def model_of(*mixers, **options) -> LanguageModel:
    return LanguageModel(ModelConfig(31, 12, tuple(BlockConfig(mixer, None) for mixer in mixers), **options)).eval()


def facts(state: ModelState) -> list:
    return [
        (type(layer), {name: (x.shape, x.dtype, x.device) for name, x in layer.tensors().items()}) for layer in state
    ]


def test_every_mixer_is_among_the_cases():
    assert {mixer.kind for mixer in MIXER_CASES.values()} == set(own_mixers())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MIXER_CASES)
def test_the_initial_state_equals_the_state_after_a_run_on_no_tokens(name, dtype):
    model = model_of(MIXER_CASES[name]).to(dtype)
    with torch.no_grad():
        _, after = model.hidden(torch.zeros(3, 0, dtype=torch.int64), carry=True)
    state = model.init_state(3)
    assert facts(state) == facts(after)
    assert state.position.tolist() == [0, 0, 0]
    assert all(not x.any() for layer in state for x in layer.tensors().values())


@pytest.mark.parametrize("name", MIXER_CASES)
def test_a_model_without_memory_makes_states_without_memory(name):
    config = model_of(MIXER_CASES[name], dtype="bfloat16").config
    with torch.device("meta"):
        state = LanguageModel(config).init_state(2, num_tokens=5)
    expected = LanguageModel(config).init_state(2, num_tokens=5)
    assert all(x.is_meta for layer in state for x in layer.tensors().values())
    assert state.nbytes == expected.nbytes
    assert [kind for kind, _ in facts(state)] == [kind for kind, _ in facts(expected)]


@pytest.mark.parametrize("num_tokens", [0, 2, 40])
@pytest.mark.parametrize("in_place", [False, True], ids=("new state", "in place"))
@pytest.mark.parametrize("name", MIXER_CASES)
def test_decoding_from_the_initial_state_equals_one_forward(name, in_place, num_tokens):
    model = model_of(MIXER_CASES[name], dtype="float64", init="normal", init_std=0.3)
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        state, logits = model.init_state(2, num_tokens=num_tokens), []
        for block in ids.split((4, 1, 1, 1, 2), 1):
            output = model(block, state, carry=True, in_place=in_place)
            state = output.state
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-10, atol=1e-10)


def test_a_window_limits_the_capacity_of_its_cache():
    windows = [replace(MIXER_CASES["attention"], window=window) for window in (None, 3, 8)]
    state = model_of(*windows).init_state(1, num_tokens=5)
    assert [layer.keys.shape[1] for layer in state] == [5, 3, 5]


def test_the_given_device_and_dtype_are_those_of_the_activations():
    state = model_of(MIXER_CASES["mamba2"]).init_state(1, device=torch.device("meta"), dtype=torch.float16)
    (layer,) = state
    assert layer.recent.is_meta
    assert layer.recent.dtype == torch.float16
    assert layer.memory.dtype == torch.float32
