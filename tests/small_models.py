"""Small language models: the stacks of layers that tests share, with weights large enough that a broken state shows.

At the usual small initialisation the residual stream hides what a mixer computes, and a broken cache passes. Matrices
here have unit gain, and the head is not the embedding: a tied head mostly predicts the last token again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.branched import BranchedConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.hyper_connection import HyperConnectionConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixers import MIXERS, Mixer
from retnet.layers.moe import MoEConfig
from retnet.layers.multi_token import MultiTokenConfig
from retnet.layers.retention import RetentionConfig
from retnet.layers.streams import StreamsConfig, streams_block
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel

if TYPE_CHECKING:
    from retnet.models.hf import RetNetForCausalLM

WIDTH, VOCAB = 32, 61
BYTES = {"vocab_size": 257, "bos_token_id": 256}  # options of a model that reads bytes

GLU = FeedForwardConfig(WIDTH, gated=True, activation="swish")
PAPER = BlockConfig(RetentionConfig(2, WIDTH, 2 * WIDTH), FeedForwardConfig(2 * WIDTH))
GATED = BlockConfig(RetentionConfig(2, WIDTH, 2 * WIDTH, decay="gated"), GLU)
CONV = replace(GATED, mixer=replace(GATED.mixer, conv_width=4, gated_start="experiment"))
LIGHTNING = BlockConfig(
    RetentionConfig(
        4, WIDTH, WIDTH, decay="alibi", decay_scale=0.4, rotary="none", qkv_activation="silu", gate="sigmoid",
        head_norm="rms", head_norm_affine="per_head", head_norm_groups=2,
    ),
    GLU, norm="rms", norm_position="shared", skip_scale=0.8, residual_scale=1.3, feed_forward_skip_scale=1.1,
    feed_forward_residual_scale=0.6,
)  # fmt: skip
WINDOW = BlockConfig(AttentionConfig(4, 2, head_dim=8, window=9), GLU, norm="rms")
MAMBA2 = BlockConfig(Mamba2Config(2 * WIDTH, head_dim=16, state_dim=8), None, norm="rms")
MAMBA1 = BlockConfig(Mamba1Config(2 * WIDTH, time_step_rank=2), None)
HYENA = BlockConfig(HyenaConfig(filter_hidden=8, filter_decay=0.05), GLU, residual="parallel")
ALIBI = BlockConfig(AttentionConfig(4, 1, head_dim=8, rotary="none", alibi=True, num_sinks=2), GLU)
NOPE = BlockConfig(AttentionConfig(2, 1, head_dim=16, rotary="none", qk_norm="rms", gate="sigmoid"), GLU)
LATENT = BlockConfig(
    LatentAttentionConfig(4, 4, 8, "half", latent_dim=12, rope_dim=4, q_rank=16, latent_norm="rms"), GLU, norm="rms"
)
REBUILT = replace(LATENT, mixer=LatentAttentionConfig(4, 2, 8, "half", latent_dim=12, window=5, gate="sigmoid"))
BESIDE = BlockConfig(
    BranchedConfig((WINDOW.mixer, MAMBA2.mixer), "sum", input_scales=(0.8, 1.0), output_scales=(1.2, 0.7)),
    GLU,
    norm="rms",
)
BIRKHOFF, BIRKHOFF_OF_3 = HyperConnectionConfig(2), HyperConnectionConfig(3, sinkhorn_iters=1)
UNCONSTRAINED = HyperConnectionConfig(3, "unconstrained")
LOW_RANK = HyperConnectionConfig(2, "learned_lowrank", dynamic=False)
STREAMS = streams_block(StreamsConfig(((WINDOW, MAMBA2), (PAPER,)), "concat"))
CROSSED_STREAMS = streams_block(
    StreamsConfig(((GATED,), (MAMBA2,)), "cross", AttentionConfig(4, 1, head_dim=8, rotary="none"), (0, 1))
)
GATED_STREAMS = streams_block(
    StreamsConfig(((CONV,), (replace(NOPE, hyper=LOW_RANK), replace(MAMBA1, hyper=BIRKHOFF))), "gate")
)
GATED_BESIDE = BlockConfig(BranchedConfig((GATED.mixer, NOPE.mixer, MAMBA1.mixer), "gate", top_k=2), GLU)
MTP = MultiTokenConfig(WINDOW, num_modules=2, loss_weight=0.3)
EXPERTS = MoEConfig(num_experts=4, top_k=2, hidden_dim=16)
# As in DeepSeek-V3: a bias for the choice of experts, groups, a shared expert, a scale.
GROUPED = MoEConfig(
    num_experts=6,
    top_k=2,
    hidden_dim=16,
    router="sigmoid",
    routed_scale=1.5,
    shared_hidden_dim=24,
    num_groups=3,
    top_groups=2,
    bias_update_rate=1e-3,
    load_balance_coef=0.0,
    sequence_balance_coef=0.01,
)

STACKS: dict[str, tuple[BlockConfig, ...]] = {
    "retention": (PAPER, PAPER),
    "gated": (GATED, GATED),
    "both decays": (PAPER, GATED),
    "convolution": (
        CONV,
        replace(PAPER, mixer=replace(PAPER.mixer, conv_width=3, conv_on=("q", "v"))),
        replace(CONV, mixer=replace(CONV.mixer, qk_norm="rms", gate="sigmoid")),
    ),
    "experts": (replace(PAPER, feed_forward=EXPERTS), replace(WINDOW, feed_forward=GROUPED)),
    # Every mixer that the engine serves.
    "hybrid": (
        PAPER,
        WINDOW,
        MAMBA2,
        replace(MAMBA1, hyper=BIRKHOFF),
        replace(ALIBI, hyper=BIRKHOFF),
        CONV,
        NOPE,
        LIGHTNING,
        BESIDE,
        LATENT,
        STREAMS,
        CROSSED_STREAMS,
    ),
    # Every mixer, every place of norms and residuals, experts with their losses.
    "every mixer": (
        MAMBA2,
        PAPER,
        replace(WINDOW, mixer=replace(WINDOW.mixer, window=3), feed_forward=replace(EXPERTS, z_loss_coef=0.01)),
        replace(MAMBA1, feed_forward=GLU, norm_position="post", residual_scale=0.7),
        HYENA,
        replace(ALIBI, feed_forward=None),
        CONV,
        replace(
            NOPE,
            mixer=replace(NOPE.mixer, rotary="half", rotary_dim=6, qk_norm="l2", window=5),
            hyper=BIRKHOFF_OF_3,
        ),
        replace(BESIDE, mixer=replace(BESIDE.mixer, merge="mean"), hyper=BIRKHOFF_OF_3),
        GATED_BESIDE,
        GATED_STREAMS,
        LATENT,
        REBUILT,
    ),
}
Stack = str | Sequence[BlockConfig]


def small_config(stack: Stack = "retention", **options: Any) -> ModelConfig:
    """A name of `STACKS` or layers of your own; `options` are fields of ModelConfig."""
    layers = STACKS[stack] if isinstance(stack, str) else tuple(stack)
    name = stack if isinstance(stack, str) else "small"
    return ModelConfig(**{
        "vocab_size": VOCAB, "d_model": WIDTH, "layers": layers, "name": name, "tie_embeddings": False, **options
    })  # fmt: skip


def small_model(stack: Stack = "retention", **options: Any) -> LanguageModel:
    """`small_config` as a model in evaluation mode: at unit gain, or as initialised where `init` is given."""
    model = LanguageModel(small_config(stack, **options)).eval()
    return model if "init" in options else unit_gain_(model)


def hf_model(stack: Stack = "both decays", **options: Any) -> RetNetForCausalLM:
    """A small model of bytes with transformers' interface."""
    from retnet.models.hf import RetNetForCausalLM

    model = RetNetForCausalLM.wrap(small_model(stack, **(BYTES | options)))
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def unit_gain_(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Redraws the matrices so that each keeps the size of a vector, and biases that decide which experts are chosen."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("sink_logits"):
            weight.normal_(generator=generator)
        elif name.endswith("stream_scale"):
            weight.fill_(0.5)
        elif name == "embedding.weight":
            weight.normal_(std=0.5 if model.config.tie_embeddings else 1.0, generator=generator)
        elif name.endswith("weight") and weight.dim() > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    for name, bias in model.named_buffers():
        if name.endswith("routing_bias"):
            bias.normal_(std=0.3, generator=generator)
    return model


def own_mixers() -> dict[str, Mixer]:
    """The mixers of the package by name: others (recipes, users) may register theirs in the same process."""
    return {name: mixer for name, mixer in MIXERS.items() if mixer.config.__module__.startswith("retnet.")}


def random_ids(*shape: int, low: int = 0, high: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, seed=seed).tolist()
