"""The fused kernels of a decode step against their plain definitions (`ops/decode/` on a CPU)."""

import pytest
import torch

from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.lm import LanguageModel
from retnet.ops.decode.linear import ACTIVATIONS, InputNorm
from retnet.ops.decode.ring import Ring
from retnet.ops.decode.step import decode_step_
from retnet.ops.recurrence import StepDecay
from retnet.ops.rotary import rotation
from tests.small_models import small_model

pytest.importorskip("triton")


def norm_of(kind: str, groups: int, width: int, affine: str, device: str) -> InputNorm:
    shapes = {"none": None, "shared": (width // groups,), "whole": (width,)}
    weight = bias = None
    if shapes[affine] is not None:
        weight, bias = torch.randn(shapes[affine], device=device), torch.randn(shapes[affine], device=device)
    return InputNorm(kind, groups, 1e-5, weight, bias)


def described(norm: InputNorm) -> tuple:
    return norm.kind, norm.groups, norm.eps, norm.weight, norm.bias


@pytest.mark.parametrize(
    ("kind", "groups", "K", "affine", "gated", "activation"),
    [
        ("layer", 1, 48, "whole", False, "none"),
        ("rms", 1, 64, "whole", False, "none"),
        ("layer", 3, 96, "none", True, "swish"),
        ("rms", 3, 72, "shared", True, "swish"),
        ("layer", 2, 64, "whole", True, "gelu"),
        ("none", 1, 40, "none", True, "relu"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_a_fused_linear_layer_equals_norm_gate_product_and_residual_separately(
    kind, groups, K, affine, gated, activation, quantized, device
):
    from retnet.kernels.decode.linear import matvec, prepare

    torch.manual_seed(0)
    N, B = 9, 2
    both = torch.randn(B, 2 * K, device=device)
    x, gate = both[:, :K], both[:, K:] if gated else None  # columns of one product
    norm, bias, residual = norm_of(kind, groups, K, affine, device), torch.randn(N, device=device), torch.randn(B, N)
    weight, scale = torch.randn(N, K, device=device), None
    if quantized:
        weight, scale = torch.randint(-127, 128, (N, K), device=device).to(torch.int8), torch.rand(N, device=device)
    y = norm(x.double()) * (1 if gate is None else ACTIVATIONS[activation](gate.double()))
    wide = weight.double() * (1 if scale is None else scale.double()[:, None])
    product = y @ wide.mT + bias.double()
    out = torch.empty(B, N, device=device)
    matvec(x, gate, weight, scale, bias, described(norm), activation, out, None, 1.0, 1.0)
    torch.testing.assert_close(out.double(), product, rtol=1e-5, atol=1e-5 * float(product.abs().max()))
    stream = residual.to(device).clone()
    matvec(x, gate, weight, scale, bias, described(norm), activation, stream, stream, 0.5, 2.0)
    expected = 0.5 * residual.to(device).double() + 2 * product
    torch.testing.assert_close(stream.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    prepared = torch.empty(B, K, device=device)
    prepare(x, gate, described(norm), activation, prepared)
    torch.testing.assert_close(prepared.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("D", "H", "V"), [(768, 3, 512), (2048, 8, 512), (2560, 10, 512), (4096, 16, 512)])
def test_a_tile_has_few_padding_lanes(D, H, V):
    """A padding lane costs as much as a weight, so a tile is at most the next power of two in each direction."""
    from retnet.kernels.decode.linear import TILE, linear_tile

    for N, K, groups in ((6 * D, D, 1), (D, H * V, H), (2 * D, D, 1), (D, 2 * D, 1), (50304, D, 1)):
        tile = linear_tile(N, K, groups)
        assert max(tile.BG / groups, tile.BV / (K // groups)) < 2
        assert tile.BN == 1 or tile.BN * tile.BG * tile.BV <= TILE


def test_a_linear_layer_without_x_multiplies_the_activated_gate(device):
    from retnet.kernels.decode.linear import matvec

    torch.manual_seed(0)
    gate, weight = torch.randn(2, 24, device=device), torch.randn(16, 24, device=device)
    out = torch.empty(2, 16, device=device)
    matvec(None, gate, weight, None, None, described(InputNorm()), "gelu", out, None, 1.0, 1.0)
    torch.testing.assert_close(out, torch.nn.functional.gelu(gate) @ weight.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rotary", "H", "G", "per_token"),
    [("interleaved", 2, 2, False), ("half", 4, 2, True), ("none", 2, 2, True)],
)
@pytest.mark.parametrize("W", [0, 16])
def test_a_fused_step_equals_rotation_and_retention_separately(rotary, H, G, per_token, W, device):
    from retnet.kernels.decode.fused_step import decode_step

    torch.manual_seed(0)
    B, K, V = 3, 24, 40
    active = torch.tensor([True, False, True])
    state = torch.randn(B, H, K, V)
    ours = state.to(device).clone()
    # The rings of the sequences hold different numbers of tokens; the rest of a ring holds arbitrary numbers.
    pending = torch.tensor([12, 2, 15] if W else [0, 0, 0])
    ring = theirs = None
    if W:
        ring = Ring(torch.randn(B, G, W, K), torch.randn(B, G, W, V), -torch.rand(B, H, W), pending)
        theirs = tuple(x.to(device).clone() for x in (ring.keys, ring.values, ring.log_decay, ring.pending))
    for step in range(4):
        q, k, v = torch.randn(B, H, K), torch.randn(B, G, K), torch.randn(B, G, V)
        log_decay = -torch.rand(B, H) if per_token else torch.tensor([-1e-4, -2.0, -0.3, -0.01])[:H]
        if per_token and step == 2:
            log_decay[0, 0] = -torch.inf
        turn = None
        if rotary != "none":
            cos, sin = rotation(torch.full((B, 1), 1000 + step), rotary, K, 10000.0)
            turn = cos[:, 0], sin[:, 0]
        expected = decode_step_(
            q,
            k,
            v,
            turn,
            "half" if rotary == "none" else rotary,
            StepDecay(log_decay),
            state,
            active,
            ring=ring,
            scale=0.3,
        )
        out = decode_step(
            *(x.to(device) for x in (q, k, v)),
            None if turn is None else tuple(x.to(device).contiguous() for x in turn),
            rotary,
            log_decay.to(device),
            ours,
            active.to(device),
            theirs,
            0.3,
        )
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(ours.cpu(), state, rtol=2e-5, atol=2e-5)
        if ring is not None and theirs is not None:
            for counts in (ring.pending, theirs[3]):
                counts.add_(active.to(counts.device)).remainder_(W)


def shaped_model(variant: str) -> LanguageModel:
    if variant == "paper":
        mixer, feed_forward, norm = RetentionConfig(2, 8, 16), FeedForwardConfig(8), "layer"
    else:
        mixer = RetentionConfig(
            4, 16, 16, decay="gated", rotary="half", head_norm="rms", head_norm_affine="shared", num_kv_heads=2
        )
        feed_forward, norm = FeedForwardConfig(8, gated=True, activation="swish"), "rms"
    block = BlockConfig(mixer, feed_forward, norm=norm)
    return small_model([block], vocab_size=13, d_model=8, final_norm=norm)


@pytest.mark.parametrize(
    ("variant", "slots", "ring"), [("paper", 1, 16), pytest.param("fla", 1, 0, marks=pytest.mark.slow), ("paper", 8, 0)]
)
def test_an_engine_on_kernels_generates_what_the_model_predicts(variant, slots, ring, device, monkeypatch):
    """With more rows than `MATVEC_ROWS`, the library multiplies."""
    from retnet.models.decode.sampling import Sampling
    from retnet.serve.engine import Engine
    from retnet.serve.request import Request

    model = shaped_model(variant)
    prompt = [3, 11, 7, 1, 5, 2, 8]
    with torch.no_grad():
        ids = list(prompt)
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    monkeypatch.setattr("retnet.ops.device.uses_kernels", lambda x: True)
    engine = Engine(model.to(device), num_slots=slots, prompt_chunk=4, deferred_writes=ring)
    generation = engine.submit(Request(prompt, 3, Sampling(temperature=0)))
    engine.run()
    assert generation.tokens == ids[len(prompt) :]
