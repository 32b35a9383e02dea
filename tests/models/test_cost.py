"""Cost: operations counted one by one, the size of states, the weights that a token uses."""

import pytest
import torch
from torch import nn

from retnet.layers.attention import AttentionConfig, attention_flops
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.latent_attention import LatentAttentionConfig, latent_attention_flops
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config, mamba2_flops
from retnet.layers.mixer_base import Workload
from retnet.layers.moe import MoEConfig
from retnet.layers.retention import RetentionConfig, retention_flops
from retnet.models.cost import device_notes, idle_parameters, model_cost
from retnet.ops.plan import CPU_CHUNK_SIZE, chunk_tokens
from tests.small_models import small_model


@pytest.mark.parametrize(("window", "context"), [(None, 7), (3, 7), (7, 7), (9, 7), (1, 5)])
def test_attention_does_four_operations_per_pair_and_element(window, context):
    config = AttentionConfig(4, 2, 8, window=window)
    flops = attention_flops(config, Workload(32, context))
    seen = [min(t + 1, window or context) for t in range(context)]
    assert flops.forward == pytest.approx(4 * 4 * 8 * sum(seen) / context)
    assert flops.decode == 4 * 4 * 8 * seen[-1]


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 4 * 2 * (2 * 12) * 7 + 2 * 2 * 12 * 16),  # latents alone, and the maps of 4 heads instead of 2
        ({"rotary": "half", "rope_dim": 4}, 4 * 2 * (2 * 12 + 4) * 7 + 2 * 2 * 12 * 16),
        ({"rotary": "half"}, 4 * 4 * 8 * 7 + 2 * 2 * 12 * 16 * 6),  # keys, and the maps of 2 groups for 6 tokens
        ({"qk_norm": "rms", "window": 3}, 4 * 4 * 8 * 3 + 2 * 2 * 12 * 16 * 2),
    ],
)
def test_latent_attention_reads_latents_or_makes_the_keys_of_the_context(options, step):
    config = LatentAttentionConfig(4, 2, 8, latent_dim=12, **options)
    flops = latent_attention_flops(config, Workload(32, 7))
    seen = [min(t + 1, config.window or 7) for t in range(7)]
    assert flops.forward == pytest.approx(2 * 4 * (config.query_dim + 8) * sum(seen) / 7)
    assert flops.decode == step


@pytest.mark.parametrize(
    "mixer",
    [
        AttentionConfig(4, 2, 8, window=6),
        LatentAttentionConfig(4, 2, 8, "half", latent_dim=12, rope_dim=4, window=6),
        RetentionConfig(4, 32, 64),
        Mamba1Config(64, 3, state_dim=5),
        Mamba2Config(64, head_dim=16, state_dim=5),
    ],
    ids=lambda mixer: mixer.kind,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counted_state_bytes_are_those_of_the_models_state_at_any_length(mixer, dtype):
    layer = BlockConfig(mixer, FeedForwardConfig(32))
    model = small_model([layer] * 2, dtype=dtype)
    state = model(torch.zeros(1, 20, dtype=torch.long), carry=True).state
    assert state.nbytes == model_cost(model.config, 20).state_bytes == model_cost(model.config, 10**6).state_bytes


def test_hyena_keeps_the_inputs_of_its_convolutions():
    layer = BlockConfig(HyenaConfig(order=3), FeedForwardConfig(32))
    model = small_model([layer])
    state = model(torch.zeros(1, 20, dtype=torch.long), carry=True).state.layers[0]
    kept = state.inputs[:, :20].nbytes + state.recent.nbytes + state.position.nbytes
    assert kept == model_cost(model.config, 20).state_bytes
    assert model_cost(model.config, 40).state_bytes > kept


@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
def test_idle_parameters_are_those_of_the_experts_not_chosen(gated, bias):
    moe = MoEConfig(num_experts=5, top_k=2, hidden_dim=24, gated=gated, bias=bias)
    layer = BlockConfig(AttentionConfig(2, 2, 8), moe)
    model = small_model([layer] * 2)
    experts = [p for block in model.layers for name, p in block.feed_forward.named_parameters() if "router" not in name]
    assert idle_parameters(model.config) == sum(p.numel() for p in experts) * 3 // 5
    assert isinstance(model.layers[0].feed_forward.router, nn.Linear)


@pytest.mark.parametrize(
    ("mode", "chunk_size", "expected"),
    [
        ("parallel", None, 300 * (8 + 16)),  # the causal half of one chunk of the whole sequence, and no state
        ("recurrent", None, 4 * 8 * 16),  # the state alone
        ("chunkwise", 32, 4 * 8 * 16 + 32 * (8 + 16)),
        ("chunkwise", 1000, 4 * 8 * 16 + 300 * (8 + 16)),
        ("auto", None, 4 * 8 * 16 + CPU_CHUNK_SIZE * (8 + 16)),
    ],
)
@pytest.mark.parametrize("kind", ["retention", "mamba2"])
def test_retention_counts_the_form_and_the_chunk_that_run(kind, mode, chunk_size, expected):
    """4 heads of key dim 8 and value dim 16, 300 tokens, on a CPU."""
    work = Workload(64, 300)
    if kind == "retention":
        flops = retention_flops(RetentionConfig(4, 32, 64, mode=mode, chunk_size=chunk_size), work)
        convolution = 0
    else:
        config = Mamba2Config(64, head_dim=16, state_dim=8, mode=mode, chunk_size=chunk_size)
        flops, convolution = mamba2_flops(config, work), 2 * 4 * (64 + 2 * 8)
    assert flops.forward == 4 * expected + convolution
    assert flops.decode == 4 * 4 * 8 * 16 + convolution


def test_the_device_of_a_cost_decides_its_chunk():
    model = small_model()
    gpu, cpu = model_cost(model.config, 4096, "cuda"), model_cost(model.config, 4096)
    config = model.config.layers[0].mixer
    K, V = config.head_key_dim, config.head_value_dim
    chunk = chunk_tokens(4096, K, V, dtype=torch.float32, device="cuda")
    heads = config.num_heads * len(model.config.layers)
    assert gpu.forward_flops - cpu.forward_flops == heads * (chunk - CPU_CHUNK_SIZE) * (K + V)
    assert gpu.decode_flops == cpu.decode_flops


@pytest.mark.parametrize(("chunk_size", "tokens"), [(None, CPU_CHUNK_SIZE), (32, 32), (128, 128)])
def test_the_chunk_on_a_cpu_is_the_given_one_or_the_operators(chunk_size, tokens):
    layers = [
        BlockConfig(RetentionConfig(2, 16, 32, chunk_size=chunk_size), None),
        BlockConfig(Mamba2Config(32, head_dim=8, state_dim=4, mode="chunkwise", chunk_size=chunk_size), None),
    ]
    notes = [f"{name} on cpu: {tokens} tokens per chunk" for name in ("retention", "mamba2")]
    assert device_notes(small_model(layers * 2).config, 4096, "cpu") == notes


@pytest.mark.parametrize("decay", ["paper", "gated"])
def test_a_chunk_size_that_a_gpu_lacks_is_reported_with_the_nearest(decay):
    layer = BlockConfig(RetentionConfig(2, 16, 32, decay=decay, chunk_size=1000), None)
    used = chunk_tokens(4096, 8, 16, dtype=torch.float32, device="cuda", chunk_size=1000, per_token=decay == "gated")
    assert used < 1000
    assert device_notes(small_model([layer]).config, 4096, "cuda") == [
        f"retention on cuda: {used} tokens per chunk, the nearest to chunk_size 1000"
    ]


def test_forms_without_chunks_have_no_note():
    mixers = RetentionConfig(2, 16, 32, mode="parallel"), AttentionConfig(2, 2, 8), Mamba1Config(32, 2)
    assert device_notes(small_model([BlockConfig(mixer, None) for mixer in mixers]).config, 4096, "cpu") == []
