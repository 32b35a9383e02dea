"""Latent attention: its formulas, transformers' DeepSeek-V3, absorbed and rebuilt decoding, and what is cached."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from retnet.layers.latent_attention import LatentAttention, LatentAttentionConfig
from retnet.layers.token_layout import TokenLayout
from retnet.ops.rotary import rotation
from tests.layers.devices import assert_equal_on

D, H, K = 12, 4, 6
WIDE = {"rtol": 1e-10, "atol": 1e-10}
ABSORBED = {
    "no positions": {},
    "rotary beside latents": {"rotary": "half", "rope_dim": 4, "q_rank": 7, "latent_norm": "rms", "qkv_bias": True},
    "groups, window, sinks": {"rotary": "interleaved", "rope_dim": 2, "num_kv_heads": 2, "window": 5, "num_sinks": 2},
    "alibi, gate": {"alibi": True, "gate": "sigmoid", "num_kv_heads": 1},
}
REBUILT = {
    "rotated keys": {"rotary": "half", "num_kv_heads": 2},
    "partly rotated keys in a window": {"rotary": "interleaved", "rotary_dim": 4, "window": 5},
    "normed keys": {"qk_norm": "rms", "latent_norm": "rms"},
    "normed keys beside rotary": {"qk_norm": "l2", "rotary": "half", "rope_dim": 4},
}
CASES = ABSORBED | REBUILT


def layer_of(latent_dim: int = 5, **options) -> LatentAttention:
    generator = torch.Generator().manual_seed(0)
    config = LatentAttentionConfig(H, options.pop("num_kv_heads", H), K, latent_dim=latent_dim, **options)
    layer = LatentAttention(config, D).double().eval()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1.0, generator=generator)
    return layer


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(layer: LatentAttention, x: Tensor, state=None, in_place: bool = False):
    start = None if state is None else state.position
    layout = TokenLayout.of(tuple(x.shape[:2]), x.device, start=start, carry=True, in_place=in_place)
    with torch.no_grad():
        return layer(x, state, layout)


@contextmanager
def rebuilding(layer: LatentAttention):
    """Counts the calls that make keys and values."""
    with patch.object(type(layer), "keys_values", autospec=True, side_effect=LatentAttention.keys_values) as made:
        yield made


def turned(x: Tensor, layer: LatentAttention) -> Tensor:
    """x [B, T, H, K] rotated by the definition: pairs as complex numbers."""
    config, T = layer.config, x.shape[1]
    width = config.rotary_dim or x.shape[-1]
    cos, sin = rotation(torch.arange(T)[None], config.rotary, width, config.rotary_base, dtype=torch.float64)
    first, rest = x[..., :width], x[..., width:]
    halves = (first[..., ::2], first[..., 1::2]) if config.rotary == "interleaved" else first.chunk(2, -1)
    out = torch.complex(*halves) * torch.complex(cos, sin)[:, :, None]
    if config.rotary == "interleaved":
        return torch.cat((torch.view_as_real(out).flatten(-2), rest), -1)
    return torch.cat((out.real, out.imag, rest), -1)


def normed(x: Tensor, kind: str, weight: Tensor | None = None) -> Tensor:
    if kind == "none":
        return x
    if kind == "l2":
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_definition(layer: LatentAttention, x: Tensor) -> Tensor:
    """The equations of DeepSeek-V2 on whole rows, with every matrix written out."""
    config, w, (B, T, _) = layer.config, dict(layer.named_parameters()), x.shape
    bias = {name: w.get(f"{name}.bias", 0) for name in ("q_down_proj", "latent_proj", "rope_key_proj", "q_proj")}
    q = x
    if config.q_rank:
        q = q @ w["q_down_proj.weight"].T + bias["q_down_proj"]
        q = normed(q, config.latent_norm, w.get("q_latent_norm.weight"))
    q = (q @ w["q_proj.weight"].T + bias["q_proj"]).view(B, T, H, config.query_dim)
    c = normed(x @ w["latent_proj.weight"].T + bias["latent_proj"], config.latent_norm, w.get("latent_norm.weight"))
    k = (c @ w["k_proj.weight"].T).view(B, T, -1, K).repeat_interleave(H // config.num_kv_heads, 2)
    v = (c @ w["v_proj.weight"].T).view(B, T, -1, K).repeat_interleave(H // config.num_kv_heads, 2)
    content = normed(q[..., :K], config.qk_norm, w.get("q_norm_weight"))
    k = normed(k, config.qk_norm, w.get("k_norm_weight"))
    if config.rope_dim:
        key = (x @ w["rope_key_proj.weight"].T + bias["rope_key_proj"])[:, :, None]
        q = torch.cat((content, turned(q[..., K:], layer)), -1)
        k = torch.cat((k, turned(key, layer).expand(-1, -1, H, -1)), -1)
    else:
        q = content if config.rotary == "none" else turned(content, layer)
        k = k if config.rotary == "none" else turned(k, layer)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / config.query_dim**0.5
    if config.alibi:
        scores = scores - 2.0 ** -(8 / H * torch.arange(1, H + 1).double())[:, None, None] * (i - j)
    seen = (j <= i) & (i - j < (config.window or T))
    weights = scores.exp() * seen
    sinks = w["sink_logits"].exp().sum(-1) if config.num_sinks else torch.zeros(H)
    weights = weights / (weights.sum(-1, keepdim=True) + sinks[:, None, None])
    out = torch.einsum("bhij,bjhv->bihv", weights, v).flatten(-2)
    if config.gate == "sigmoid":
        out = out * (x @ w["gate_proj.weight"].T).sigmoid()
    return out @ w["out_proj.weight"].T


@pytest.mark.parametrize("case", CASES)
def test_whole_rows_are_the_equations_of_the_paper(case):
    layer, x = layer_of(**CASES[case]), tokens(11)
    torch.testing.assert_close(run(layer, x)[0], by_definition(layer, x), **WIDE)


@pytest.mark.parametrize("q_rank", [None, 8])
def test_whole_rows_and_decoding_equal_transformers_deepseek_v3(q_rank):
    theirs = DeepseekV3Attention(
        DeepseekV3Config(
            hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=q_rank, kv_lora_rank=5,
            qk_rope_head_dim=4, qk_nope_head_dim=K, v_head_dim=K, attention_bias=q_rank is not None,
            rope_interleave=False, attn_implementation="sdpa",
        ),
        0,
    ).double()  # fmt: skip
    # Theirs would compute the norms in float32.
    theirs.kv_a_layernorm = nn.RMSNorm(5, eps=1e-6, dtype=torch.float64)
    if q_rank is not None:
        theirs.q_a_layernorm = nn.RMSNorm(q_rank, eps=1e-6, dtype=torch.float64)
    layer = layer_of(
        rotary="half", rope_dim=4, q_rank=q_rank, latent_norm="rms", qkv_bias=q_rank is not None,
        out_bias=q_rank is not None,
    )  # fmt: skip
    w = layer.state_dict()
    pairs = {"o_proj.weight": w["out_proj.weight"], "kv_a_layernorm.weight": w["latent_norm.weight"]}
    keys, values = (w[f"{name}_proj.weight"].view(H, K, 5) for name in "kv")
    pairs["kv_b_proj.weight"] = torch.cat((keys, values), 1).flatten(0, 1)
    for kind in ("weight", "bias") if q_rank else ("weight",):
        pairs[f"kv_a_proj_with_mqa.{kind}"] = torch.cat((w[f"latent_proj.{kind}"], w[f"rope_key_proj.{kind}"]))
    if q_rank:
        pairs |= {f"q_a_proj.{kind}": w[f"q_down_proj.{kind}"] for kind in ("weight", "bias")}
        pairs |= {"q_a_layernorm.weight": w["q_latent_norm.weight"], "q_b_proj.weight": w["q_proj.weight"]}
        pairs |= {"o_proj.bias": w["out_proj.bias"]}
    else:
        pairs["q_proj.weight"] = w["q_proj.weight"]
    theirs.load_state_dict(pairs)
    x = tokens(9)
    cos, sin = (z.repeat(1, 1, 2) for z in rotation(torch.arange(9)[None], "half", 4, 1e4, dtype=torch.float64))
    with torch.no_grad():
        expected = theirs(x, (cos, sin), torch.full((1, 1, 9, 9), -torch.inf, dtype=torch.float64).triu(1))[0]
    out, state = run(layer, x[:, :5])
    outs = [out]
    for t in range(5, 9):
        out, state = run(layer, x[:, t : t + 1], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, **WIDE)


@pytest.mark.parametrize("case", CASES)
def test_decoding_makes_no_keys_where_queries_can_absorb_them_and_equals_the_plain_form(case):
    layer, x = layer_of(**CASES[case]), tokens(13)
    _, before = run(layer, x[:, :7])
    outs, state = [], before.clone()
    with rebuilding(layer) as made:
        for t in range(7, 13):
            out, state = run(layer, x[:, t : t + 1], state, in_place=True)
            outs.append(out)
    assert made.call_count == (0 if case in ABSORBED else 6)
    assert layer.config.absorbs == (case in ABSORBED)
    torch.testing.assert_close(torch.cat(outs, 1), by_definition(layer, x)[:, 7:], **WIDE)
    with patch.object(LatentAttention, "_absorbs", return_value=False):
        state = before
        for t in range(7, 13):
            out, state = run(layer, x[:, t : t + 1], state)
            torch.testing.assert_close(out, outs[t - 7], **WIDE)


@pytest.mark.parametrize(("length", "made"), [(1, 0), (2, 0), (7, 0), (8, 1), (20, 1)])
def test_several_tokens_make_the_keys_where_that_costs_less(length, made):
    """With L = 28, T queries cost T (2 L - 2 K) = 44 T more per key and head, and making it costs 2 L K = 336."""
    layer, x = layer_of(latent_dim=28, rotary="half", rope_dim=2), tokens(5 + length)
    _, state = run(layer, x[:, :5])
    with rebuilding(layer) as calls:
        out, _ = run(layer, x[:, 5:], state)
    assert calls.call_count == made
    torch.testing.assert_close(out, by_definition(layer, x)[:, 5:], **WIDE)


@pytest.mark.parametrize("wrapped", ["k_proj", "v_proj"])
def test_a_map_that_is_more_than_its_weight_is_not_absorbed(wrapped):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer, x = layer_of(), tokens(9)
    proj = getattr(layer, wrapped)
    other = Doubled(proj.in_features, proj.out_features, bias=False, dtype=torch.float64)
    other.weight = proj.weight
    setattr(layer, wrapped, other)
    out, state = run(layer, x[:, :8])
    step, _ = run(layer, x[:, 8:], state)
    with torch.no_grad():
        proj.weight.mul_(2)
    setattr(layer, wrapped, proj)
    torch.testing.assert_close(torch.cat((out, step), 1), run(layer, x)[0], **WIDE)


@pytest.mark.parametrize(("rope_dim", "window", "kept"), [(None, None, 9), (4, None, 9), (4, 3, 3)])
def test_the_latent_and_the_rotated_key_alone_are_cached(rope_dim, window, kept):
    layer = layer_of(rotary="none" if rope_dim is None else "half", rope_dim=rope_dim, window=window)
    _, state = run(layer, tokens(9))
    assert set(state.tensors()) == {"position", "latents"}
    assert state.latents.shape == (2, kept, 5 + (rope_dim or 0))
    assert state.nbytes == 8 * 2 * kept * (5 + (rope_dim or 0)) + 8 * 2


def test_every_parameter_has_a_gradient():
    layer = layer_of(**ABSORBED["rotary beside latents"], num_sinks=1, gate="sigmoid").train()
    x = tokens(9)
    layer(x, None, TokenLayout.of((2, 9), x.device))[0].square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim is 0; accepted: a positive integer"),
        ({"rope_dim": 4}, "rope_dim is 4 with rotary 'none'; accepted: 'half' or 'interleaved'"),
        ({"rope_dim": 3, "rotary": "half"}, "rotary turns pairs, but rope_dim is 3; accepted: an even number"),
        ({"rope_dim": 4, "rotary": "half", "rotary_dim": 2}, "rotary_dim is 2 with rope_dim; accepted: None"),
        ({"q_rank": -1}, "q_rank is -1; accepted: a positive integer"),
        ({"rotary": "half", "alibi": True}, "alibi is true with rotary 'half'"),
        ({"latent_norm": "layer"}, "latent_norm is 'layer'"),
        ({"latent_norm_eps": -1.0}, "latent_norm_eps is -1.0"),
    ],
)
def test_invalid_configurations_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        LatentAttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "latent_dim": 5, **options})


def test_the_layer_says_whether_decoding_is_absorbed():
    assert "decoding is absorbed" in layer_of(rotary="half", rope_dim=2).config.on_device(None)
    assert "they rotate as a whole, without rope_dim" in layer_of(rotary="half").config.on_device(None)
    assert "they have a norm" in layer_of(qk_norm="l2").config.on_device(None)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_cuda_equals_cpu_for_packs_pads_and_decoding(case):
    options = {"head_dim": 32, "latent_dim": 48, **CASES[case]}
    config = LatentAttentionConfig(H, options.pop("num_kv_heads", H), **options)
    torch.manual_seed(0)
    layer = LatentAttention(config, 64).eval()
    assert_equal_on(("cpu", "cuda"), layer)
