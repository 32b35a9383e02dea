"""Variants of retention: equal to loops over tokens in every form, continued from states, apart in packed rows."""

import pytest
import torch
import torch.nn.functional as F
import variants
from quality_stacks import SHAPES, stack
from variants import VariantConfig, VariantRetention

from retnet import Engine, LanguageModel, Request, Sampling
from retnet.layers.rotary import rotate_heads
from retnet.layers.token_layout import TokenLayout
from retnet.models.cost import model_cost, parameter_counts
from retnet.models.presets import FORMS, retnet_config
from retnet.ops.rotary import frequencies

D, H, K, V = 12, 3, 4, 5
VARIANTS = {
    "signed": {"signed": True},
    "rotated": {"rotated": True},
    "two-tap": {"two_tap": True},
    "canon": {"canon": 4},
    "canon-silu": {"canon": 3, "canon_activation": "silu"},
    "all": {"signed": True, "rotated": True, "two_tap": True, "canon": 3, "conv_width": 3, "num_kv_heads": 1},
}
MODES = ("parallel", "chunkwise", "recurrent")


def mixer_of(name: str, mode="auto", decay="gated", **more) -> VariantRetention:
    config = VariantConfig(H, H * K, H * V, decay=decay, mode=mode, chunk_size=4, **(VARIANTS[name] | more))
    mixer = VariantRetention(config, D).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p) * (0.7 if p.dim() > 1 else 0.2))
    return mixer


def layout_of(x, **options) -> TokenLayout:
    return TokenLayout.of(x.shape[:2], x.device, **options)


def loop(mixer: VariantRetention, x):
    """One sequence [1, T, D], token by token, by the formulas of the module: (y [1, T, D], S after the last token).

    The rotation is applied to the memory itself, which is what a fold into q and k has to equal.
    """
    config = mixer.config
    if mixer.canon is not None:
        pad = F.pad(x.transpose(1, 2), (config.canon - 1, 0))
        y = F.conv1d(pad, mixer.canon.weight, groups=D).transpose(1, 2)
        x = x + (F.silu(y) if config.canon_activation == "silu" else y)
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    if mixer.conv is not None:
        joined = F.pad(torch.cat([q, k, v], -1).transpose(1, 2), (config.conv_width - 1, 0))
        joined = F.silu(F.conv1d(joined, mixer.conv.weight, groups=joined.shape[1])).transpose(1, 2)
        q, k, v = joined.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
    q, k = (z.unflatten(-1, (-1, K)) for z in (q, k))
    q, k = rotate_heads(config, layout_of(x), q, k)
    k, v = k[0].expand(-1, H, -1), v.unflatten(-1, (-1, V))[0].expand(-1, H, -1)
    decay = mixer.log_decay(x).exp().expand(1, x.shape[1], H)[0]
    S, outs, previous = torch.zeros(H, K, V).double(), [], torch.zeros(H, K, V).double()
    turns = frequencies("interleaved", K, config.rotary_base, dtype=torch.float64, device=torch.device("cpu"))
    for t in range(x.shape[1]):
        a = decay[t][:, None, None]
        if mixer.sign is not None:
            opened = x[0, t] @ mixer.sign.weight.T + mixer.sign.bias
            a = a * torch.where(opened < 0, -1, 1)[:, None, None]
            a = a * opened.abs().clamp_min(variants.SMALLEST_SIGN).tanh()[:, None, None]
        write, weight = k[t][..., None] * v[t][:, None], 1.0
        if mixer.tap is not None:
            weight = torch.sigmoid(x[0, t] @ mixer.tap.weight.T + mixer.tap.bias)[:, None, None]
            S = S + (1 - weight) * previous
        if mixer.step is not None:
            step = torch.pi * torch.tanh(x[0, t] @ mixer.step.weight.T + mixer.step.bias)
            # q U(now) U(then)^T k^T: the memory turns backwards, as q and k turn forwards.
            cos, sin = (step[:, None] * turns).cos()[..., None], (step[:, None] * turns).sin()[..., None]
            even, odd = S[:, 0::2], S[:, 1::2]
            S = torch.stack([even * cos + odd * sin, odd * cos - even * sin], 2).flatten(1, 2)
        S = a * S + weight * write
        previous = write
        outs.append((q[0, t][:, None] @ S)[:, 0] * K**-0.5)
    out = mixer._output(x, torch.stack(outs)[None], mixer.log_decay(x), layout_of(x))
    return out, S


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", ["gated", "paper"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_equals_a_loop_over_tokens(name, mode, decay):
    mixer, x = mixer_of(name, mode, decay), torch.randn(1, 11, D).double()
    if mixer.sign is not None:
        assert 0 < (mixer.sign(x) < 0).double().mean() < 1
    y, _ = mixer(x, None, layout_of(x))
    close(y, loop(mixer, x)[0])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_calls_continue_from_states(name, in_place):
    mixer, x = mixer_of(name), torch.randn(2, 13, D).double()
    whole, _ = mixer(x, None, layout_of(x))
    for empty in (None, mixer.init_state(2, x.device, x.dtype)):
        state, parts = empty, []
        with torch.no_grad():
            for part in x.split([5, 1, 1, 4, 1, 1], 1):
                start = None if state is None else state.position.clone()
                y, state = mixer(part, state, layout_of(part, start=start, carry=True, in_place=in_place))
                parts.append(y)
        close(torch.cat(parts, 1), whole)
        assert state.position.tolist() == [13, 13]


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_do_not_leak_and_continue(name):
    mixer, x = mixer_of(name), torch.randn(1, 17, D).double()
    for bounds in ([0, 6, 6, 7, 17], [0, 17, 17]):
        bounds = torch.tensor(bounds)
        first, state = mixer(x, None, layout_of(x, cu_seqlens=bounds, carry=True))
        second, _ = mixer(x, state, layout_of(x, cu_seqlens=bounds, carry=True, start=state.position))
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            document = x[:, start:end]
            if start < end:
                close(first[:, start:end], loop(mixer, document)[0])
                close(second[:, start:end], loop(mixer, torch.cat([document, document], 1))[0][:, end - start :])


@pytest.mark.parametrize("name", VARIANTS)
def test_masked_tokens_change_nothing(name):
    mixer, x = mixer_of(name), torch.randn(2, 7, D).double()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 1, 0]]).bool()
    y, state = mixer(x, None, layout_of(x, mask=mask, carry=True))
    for row in range(2):
        close(y[row][mask[row]][None], loop(mixer, x[row][mask[row]][None])[0])
    token, active = torch.randn(2, 1, D).double(), torch.tensor([[True], [False]])
    for in_place in (False, True):
        layout = layout_of(token, start=state.position, mask=active, carry=True, in_place=in_place)
        with torch.no_grad():
            stepped, after = mixer(token, state.clone(), layout)
        close(stepped[:1], loop(mixer, torch.cat([x[0][mask[0]], token[0]])[None])[0][:, -1:])
        for name_, tensor in after.slot(1).tensors().items():
            torch.testing.assert_close(tensor, getattr(state.slot(1), name_))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_the_loop(name):
    mixer, x = mixer_of(name), torch.randn(1, 9, D).double().requires_grad_()
    leaves = [x, *mixer.parameters()]
    weight = torch.randn(1, 9, D).double()
    ours = torch.autograd.grad((mixer(x, None, layout_of(x))[0] * weight).sum(), leaves)
    theirs = torch.autograd.grad((loop(mixer, x)[0] * weight).sum(), leaves)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_decay_lists_are_slopes_of_alibi_that_shrink_over_the_layers():
    config = retnet_config("tiny", 3, 32, 4, vocab_size=16)
    alibi, scaled = (variants.with_decay_list(config, by_layer=by_layer) for by_layer in (False, True))
    slopes = torch.exp2(torch.tensor([-2.0, -4, -6, -8]).double())
    for layer in alibi.layers:
        close(-layer.mixer.log_decay, slopes)
    for layer, scale in zip(scaled.layers, (1, 0.5, 0), strict=True):
        close(-layer.mixer.log_decay, slopes * (scale + 1e-5))
    with pytest.raises(ValueError, match="gated"):
        variants.with_decay_list(retnet_config("tiny", 1, 32, 4, vocab_size=16, form=FORMS["-gated"]), by_layer=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_language_model_of_a_variant_trains_generates_and_is_saved(name, tmp_path):
    values = {key: value for key, value in VARIANTS[name].items() if key != "num_kv_heads"}
    config = variants.with_variant(retnet_config("tiny", 2, 32, 4, vocab_size=16), **values)
    model, ids = LanguageModel(config).double(), torch.randint(16, (2, 9))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    engine = Engine(model, num_slots=1, max_tokens=32)
    result = engine.submit(Request(ids[0].tolist(), 6, Sampling(temperature=0), ignore_eos=True))
    engine.run()
    seen = ids[:1]
    assert len(result.tokens) == 6
    with torch.no_grad():
        for token in result.tokens:
            assert model(seen).logits[0, -1].argmax().item() == token
            seen = torch.cat([seen, torch.tensor([[token]])], 1)
        output = model(ids[:1], carry=True)
        output.state.save(tmp_path / "state.safetensors")
    assert model_cost(config, 64).state_bytes > 0


@pytest.mark.parametrize("suffix", ["signed", "rotated", "two-tap", "canon", "canon-silu", "alibi", "layer-decay"])
def test_stacks_of_the_comparison_of_quality_take_variants(suffix):
    base = "retnet-conv" if suffix in ("alibi", "layer-decay") else "gated-conv"
    plain, config = (stack(name, SHAPES["tiny"]) for name in (base, f"{base}+{suffix}"))
    assert config.layers != plain.layers
    counts = [parameter_counts(each)["total"] for each in (plain, config)]
    assert max(counts) <= 1.02 * min(counts)
