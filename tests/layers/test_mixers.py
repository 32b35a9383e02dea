"""Every mixer: one forward, pieces, padding, packs and decoding give the same numbers.

Weights are at unit gain: at a small initialisation a broken cache passes.
"""

import pytest
import torch
from torch import Tensor, nn

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.branched import BranchedConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixer_base import MixerConfig
from retnet.layers.mixers import mixer_of
from retnet.layers.retention import RetentionConfig
from retnet.layers.state import LayerState
from retnet.layers.streams import StreamsConfig
from retnet.layers.token_layout import TokenLayout
from retnet.ops.rotary import Llama3, Yarn

D, B, T = 12, 3, 11
TOLERANCE = 1e-10

CASES: dict[str, MixerConfig] = {
    "retention": RetentionConfig(2, key_dim=8, value_dim=12),
    "gated retention": RetentionConfig(2, key_dim=8, value_dim=12, decay="gated"),
    "retention, convolution, unit q and k": RetentionConfig(2, 8, 12, conv_width=4, qk_norm="l2"),
    "retention, convolution of q and v, normed q and k": RetentionConfig(
        2,
        8,
        12,
        decay="gated",
        decay_scale=2.0,
        gated_start="paper",
        conv_width=3,
        conv_on=("q", "v"),
        qk_norm="rms",
        gate="sigmoid",
    ),
    "retention, partial rotary, YaRN": RetentionConfig(
        2, key_dim=14, value_dim=12, rotary="half", rotary_dim=4, rotary_scaling=Yarn(4.0, 8)
    ),
    "lightning attention": RetentionConfig(
        4,
        8,
        12,
        decay="alibi",
        decay_scale=0.4,
        rotary="none",
        qkv_activation="silu",
        gate="sigmoid",
        head_norm="rms",
        head_norm_affine="per_head",
        head_norm_groups=2,
    ),
    "attention": AttentionConfig(4, 4, head_dim=6),
    "attention, partial rotary": AttentionConfig(4, 2, head_dim=7, rotary_dim=4, rotary_scaling=Yarn(4.0, 8)),
    "attention, normed q and k, gate": AttentionConfig(4, 2, head_dim=6, qk_norm="rms", gate="sigmoid"),
    "attention, unit q and k in a window": AttentionConfig(4, 2, head_dim=6, qk_norm="l2", window=4),
    "attention without positions": AttentionConfig(2, 1, head_dim=5, rotary="none", qk_norm="rms", gate="sigmoid"),
    "grouped attention with bias": AttentionConfig(
        4, 2, head_dim=6, rotary="interleaved", qkv_bias=True, out_bias=True, scale=0.7
    ),
    "multi-query attention, scaled rotary": AttentionConfig(4, 1, head_dim=6, rotary_base=100.0, rotary_factor=2.0),
    "attention, YaRN": AttentionConfig(4, 2, head_dim=8, window=5, rotary_scaling=Yarn(4.0, 8, fast=2.0, slow=0.5)),
    "attention, Llama 3's scaling": AttentionConfig(2, 1, head_dim=8, rotary_base=50.0, rotary_scaling=Llama3(8.0, 32)),
    "window": AttentionConfig(4, 2, head_dim=6, window=4),
    "window of one": AttentionConfig(2, 2, head_dim=6, window=1),
    "alibi": AttentionConfig(4, 2, head_dim=6, rotary="none", alibi=True),
    "alibi in a window": AttentionConfig(3, 1, head_dim=6, rotary="none", alibi=True, window=3),
    "sinks": AttentionConfig(4, 2, head_dim=6, num_sinks=1),
    "two sinks, alibi in a window": AttentionConfig(
        4, 1, head_dim=5, rotary="none", alibi=True, window=4, num_sinks=2, gate="sigmoid"
    ),
    "sinks that stay 0": AttentionConfig(2, 2, head_dim=6, window=5, num_sinks=3, learnable_sinks=False),
    "latents": LatentAttentionConfig(4, 4, 6, latent_dim=5),
    "latents, rotary beside them": LatentAttentionConfig(
        4, 4, 5, "half", latent_dim=7, rope_dim=4, q_rank=6, latent_norm="rms", qkv_bias=True, out_bias=True
    ),
    "latents, rotary beside them in a window, groups, sinks": LatentAttentionConfig(
        4, 2, 5, "interleaved", latent_dim=7, rope_dim=2, window=4, num_sinks=1, gate="sigmoid"
    ),
    "latents, rotated keys": LatentAttentionConfig(4, 2, 6, "half", latent_dim=5, rotary_factor=2.0),
    "latents, some of the keys rotated, in a window": LatentAttentionConfig(
        2, 1, 7, "half", latent_dim=5, rotary_dim=4, window=3, qk_norm="rms"
    ),
    "latents, normed keys beside rotary": LatentAttentionConfig(
        2, 2, 4, "half", latent_dim=5, rope_dim=2, qk_norm="l2"
    ),
    "latents, alibi": LatentAttentionConfig(4, 1, 6, latent_dim=3, alibi=True, num_sinks=2, learnable_sinks=False),
    "mamba2": Mamba2Config(12, head_dim=3, state_dim=5),
    "mamba2, groups": Mamba2Config(12, head_dim=3, state_dim=4, num_groups=2, conv_width=3, bias=True, chunk_size=4),
    "mamba2 without convolution": Mamba2Config(6, head_dim=6, state_dim=4, conv_width=1, time_step_highest=0.05),
    "mamba2, norm before the gate, factors": Mamba2Config(
        12, head_dim=3, state_dim=5, num_groups=2, norm_before_gate=True, projection_scales=(0.5, 2.0, 3.0, 0.25, 1.5)
    ),
    "mamba2 without norm": Mamba2Config(12, head_dim=3, state_dim=5, norm="none"),
    "mamba1": Mamba1Config(14, time_step_rank=2, state_dim=3),
    "mamba1, biases": Mamba1Config(6, time_step_rank=1, state_dim=4, conv_width=2, conv_bias=False, bias=True),
    "mamba1, normed scan": Mamba1Config(14, time_step_rank=2, state_dim=3, scan_norm="rms"),
    "attention beside mamba2": BranchedConfig(
        (AttentionConfig(4, 2, head_dim=6), Mamba2Config(12, head_dim=3, state_dim=5)), "sum", (1.5, 1.0), (0.7, 2.0)
    ),
    "retention beside attention in a window, normed": BranchedConfig(
        (RetentionConfig(2, 8, 12, conv_width=3), AttentionConfig(2, 1, head_dim=4, window=4)), "mean"
    ),
    "three mixers and a gate": BranchedConfig(
        (Mamba1Config(14, time_step_rank=2, state_dim=3), RetentionConfig(2, 8, 12), HyenaConfig(filter_hidden=6)),
        "gate",
    ),
    "streams of blocks, concatenated": StreamsConfig(
        (
            (
                BlockConfig(RetentionConfig(2, 8, 12), FeedForwardConfig(10)),
                BlockConfig(AttentionConfig(2, 1, 6), None),
            ),
            (BlockConfig(Mamba2Config(12, head_dim=3, state_dim=5), None, norm="rms", residual_scale=0.5),),
        )
    ),
    "attention between streams": StreamsConfig(
        (
            (BlockConfig(RetentionConfig(2, 8, 12), None),),
            (BlockConfig(Mamba2Config(12, head_dim=3, state_dim=5), None),),
        ),
        "cross",
        AttentionConfig(4, 2, head_dim=6, rotary="none"),
        (1, 0),
    ),
    "streams with a gate": StreamsConfig(
        (
            (BlockConfig(AttentionConfig(4, 2, head_dim=6, window=4), FeedForwardConfig(10), residual="parallel"),),
            (BlockConfig(Mamba1Config(14, time_step_rank=2, state_dim=3), None, norm_position="post"),),
            (BlockConfig(HyenaConfig(filter_hidden=6), None),),
        ),
        "gate",
    ),
    "two of three mixers": BranchedConfig(
        (AttentionConfig(2, 2, head_dim=6), RetentionConfig(2, 8, 12), RetentionConfig(3, 6, 6, decay="gated")),
        "gate",
        top_k=2,
    ),
    "hyena": HyenaConfig(filter_hidden=6),
    "hyena of order three": HyenaConfig(order=3, filter_hidden=5, filter_decay=0.1, conv_width=1),
}
SETS = {
    "left": [(0, 3), (0, 0), (0, 6)],
    "right": [(8, 11), (11, 11), (5, 11)],
    "holes": [(2, 4), (0, 1), (3, 9)],
    "all but nothing": [(0, 11), (1, 11), (4, 5)],
}


@pytest.fixture(params=list(CASES))
def mixer(request) -> nn.Module:
    return unit_gain(CASES[request.param])


def unit_gain(config: MixerConfig) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    layer = mixer_of(config).module(config, D).double()
    layer.reset_own(generator)
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                if module.bias is not None and module.bias.abs().sum() == 0:
                    module.bias.normal_(generator=generator)
        for name, weight in layer.named_parameters():
            if name.endswith(("norm_weight", "sink_logits")):
                weight.normal_(generator=generator)
    return layer.eval()


def tokens(rows: int = B, length: int = T, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(
    mixer: nn.Module, x: Tensor, state: LayerState | None = None, *, in_place: bool = False, **kwargs
) -> tuple[Tensor, LayerState]:
    start = None if state is None else state.position
    layout = TokenLayout.of(tuple(x.shape[:2]), x.device, start=start, carry=True, in_place=in_place, **kwargs)
    return mixer(x, state, layout)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * (1 + b.norm()))


@pytest.mark.parametrize("in_place", [False, True])
def test_prefill_then_decode_equals_one_forward_from_any_split(mixer, in_place):
    x = tokens()
    full, last = run(mixer, x)
    with torch.no_grad():
        for split in range(T):
            out, state = run(mixer, x[:, :split])
            pieces = [out]
            for t in range(split, T):
                out, state = run(mixer, x[:, t : t + 1], state, in_place=in_place)
                pieces.append(out)
            assert close(torch.cat(pieces, 1), full), f"split at {split}"
            assert torch.equal(state.position, last.position)


@pytest.mark.parametrize("pieces", [[3, 1, 4, 3], [1, 6, 2, 2], [0, 5, 0, 6], [4, 1, 2, 2, 2]])
@pytest.mark.parametrize("in_place", [False, True])
def test_any_number_of_tokens_at_a_time_equals_one_forward(mixer, pieces, in_place):
    x = tokens()
    full, _ = run(mixer, x)
    outs, state, start = [], None, 0
    with torch.no_grad():
        for length in pieces:
            out, state = run(mixer, x[:, start : start + length], state, in_place=in_place)
            outs.append(out)
            start += length
    assert close(torch.cat(outs, 1), full)


@pytest.mark.parametrize("kind", list(SETS))
def test_padding_and_masked_tokens_change_nothing(mixer, kind):
    x, mask = tokens(), torch.ones(B, T, dtype=torch.bool)
    for row, (start, end) in enumerate(SETS[kind]):
        mask[row, start:end] = False
    with torch.no_grad():
        out, state = run(mixer, x, mask=mask)
        more = tokens(B, 4, seed=1)
        keep = torch.tensor([[True, False, True, True], [True] * 4, [False, False, False, True]])
        again, state = run(mixer, more, state, mask=keep)
        step, state = run(mixer, more[:, :1], state, mask=keep[:, 1:2], in_place=True)
        last, state = run(mixer, more[:, 3:], state)
        for row in range(B):
            alone = torch.cat([x[row][mask[row]], more[row][keep[row]], more[row, :1][keep[row, 1:2]], more[row, 3:]])
            expected, _ = run(mixer, alone[None])
            real = torch.cat([out[row][mask[row]], again[row][keep[row]], step[row][keep[row, 1:2]], last[row]])
            assert close(real, expected[0])
            assert state.position[row] == len(alone)


def test_packed_documents_equal_documents_alone_and_continue(mixer):
    lengths = [4, 0, 1, 6]
    bounds = torch.tensor([0, 4, 4, 5, 11])
    x, more = tokens(1), tokens(1, 7, seed=1)
    more_bounds = torch.tensor([0, 2, 3, 3, 7])
    with torch.no_grad():
        out, state = run(mixer, x, cu_seqlens=bounds)
        again, state = run(mixer, more, state, cu_seqlens=more_bounds)
        step, _ = run(mixer, tokens(4, 1, seed=2), state)
        for n in range(len(lengths)):
            first, second = slice(bounds[n], bounds[n + 1]), slice(more_bounds[n], more_bounds[n + 1])
            alone = torch.cat([x[:, first], more[:, second], tokens(4, 1, seed=2)[n : n + 1]], 1)
            expected, _ = run(mixer, alone)
            assert close(torch.cat([out[:, first], again[:, second], step[n : n + 1]], 1), expected)


def test_pack_with_pads_equals_documents_alone(mixer):
    bounds, x = torch.tensor([0, 5, 11]), tokens(1)
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, [0, 3, 10]] = False
    out, state = run(mixer, x, cu_seqlens=bounds, mask=mask)
    for n in range(2):
        one = torch.arange(bounds[n], bounds[n + 1])
        one = one[mask[0, one]]
        expected, _ = run(mixer, x[:, one])
        assert close(out[:, one], expected)
        assert state.position[n] == len(one)


def test_packed_documents_do_not_leak(mixer):
    bounds = torch.tensor([0, 4, 7, 11])
    x = tokens(1)
    changed = x.clone()
    changed[0, 6] += 1.0
    others = [0, 1, 2, 3, 7, 8, 9, 10]
    results = []
    for value in (x, changed):
        value.requires_grad_()
        out, _ = run(mixer, value, cu_seqlens=bounds)
        (grad,) = torch.autograd.grad(out.square().sum(), value)
        results.append((out, grad))
    (out, grad), (out_changed, grad_changed) = results
    assert torch.equal(out[:, others], out_changed[:, others])
    assert torch.equal(grad[:, others], grad_changed[:, others])
    assert not torch.equal(out[:, 6], out_changed[:, 6])


def test_no_token_depends_on_later_ones(mixer):
    x = tokens()
    changed = x.clone()
    changed[:, 7:] += 1.0
    out, _ = run(mixer, x)
    out_changed, _ = run(mixer, changed)
    prefix, _ = run(mixer, x[:, :7])
    assert close(out_changed[:, :7], out[:, :7])
    assert close(prefix, out[:, :7])
    assert not close(out_changed[:, 7:], out[:, 7:])


def test_a_state_is_unchanged_unless_in_place(mixer):
    x = tokens()
    with torch.no_grad():
        _, state = run(mixer, x)
        before = state.clone()
        for length in (1, 3):
            run(mixer, tokens(B, length, seed=1), state)
            assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), before.tensors().values()))


def test_selected_states_continue_like_their_sequences(mixer):
    x, more = tokens(), tokens(B, 2, seed=1)
    with torch.no_grad():
        _, state = run(mixer, x)
        expected, _ = run(mixer, more, state)
        index = torch.tensor([2, 0, 2])
        out, _ = run(mixer, more[index], state.select(index))
    assert close(out, expected[index])


def test_gradients_through_carried_states_equal_those_of_one_forward(mixer):
    x = tokens().requires_grad_()
    full, _ = run(mixer, x)
    weight = tokens(seed=3)
    (expected,) = torch.autograd.grad((full * weight).sum(), x)
    first, state = run(mixer, x[:, :5])
    second, state = run(mixer, x[:, 5:6], state)
    third, _ = run(mixer, x[:, 6:], state)
    (grad,) = torch.autograd.grad((torch.cat([first, second, third], 1) * weight).sum(), x)
    assert close(grad, expected)
