"""The student's start: the teacher's weights in retention layers, and what attention does not have."""

import pytest
import torch

from retnet.layers.retention import RetentionConfig
from retnet.models.directory import load_model, save_model
from retnet.ops.rotary import Llama3, rotate, rotation
from retnet.train.distil.fit import fit_outputs_, layer_error, layer_errors, scale_heads_to_, watched
from retnet.train.distil.student import converted_layers, make_student, retention_of, scale_heads_, student_config
from tests.small_models import random_ids
from tests.train.distil.models import sample, teacher

PLAIN = {"decay": "paper", "gate": "none", "head_norm": "none", "head_norm_affine": "none", "conv_width": None}


def student_of(model, layers=(0,), **given):
    mixers = [retention_of(layer.mixer, given) if i in layers else None for i, layer in enumerate(model.config.layers)]
    return make_student(model, student_config(model.config, mixers))


@pytest.mark.parametrize("attention", [{}, {"qk_norm": "rms"}, {"num_kv_heads": 4}, {"qkv_bias": True}])
def test_the_start_is_attention_without_softmax_and_with_decay(attention):
    taught = teacher(1, options={"dtype": "float64"}, **attention)
    config, mixer = taught.config.layers[0].mixer, taught.layers[0].mixer
    with torch.no_grad():
        for name, weight in mixer.named_parameters():
            if name.endswith(("bias", "norm_weight")):
                weight.uniform_(0.5, 1.5)
    student = student_of(taught, **PLAIN)
    x = torch.randn(1, 11, taught.config.d_model, dtype=torch.float64)
    H, K, T = config.num_heads, config.head_dim, x.shape[1]
    q, k, v = (
        proj(x).unflatten(-1, (-1, K)).repeat_interleave(H // proj(x).unflatten(-1, (-1, K)).shape[2], 2)
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    if config.qk_norm == "rms":
        q, k = (
            z * z.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * w
            for z, w in ((q, mixer.q_norm_weight), (k, mixer.k_norm_weight))
        )
    cos, sin = rotation(torch.arange(T)[None], "half", K, 10000.0, dtype=torch.float64)
    q, k = rotate(q, cos, sin, "half"), rotate(k, cos, sin, "half")
    gamma = 1 - 2.0 ** -(5 + torch.arange(H, dtype=torch.float64))
    steps = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.where(steps >= 0, gamma[:, None, None] ** steps.clamp_min(0), 0)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5 * mask
    wanted = mixer.out_proj(torch.einsum("bhts,bshv->bthv", scores, v).flatten(2))
    captured = {}
    hook = student.layers[0].mixer.register_forward_hook(lambda _, given, made: captured.update(y=made[0]))
    with torch.no_grad(), watched({0: taught.layers[0].mixer}):
        student.layers[0].mixer_norm.register_forward_hook(lambda *_: x)
        student.hidden(random_ids(1, T))
    hook.remove()
    torch.testing.assert_close(captured["y"], wanted, rtol=1e-10, atol=1e-10)


def test_gate_convolution_and_decay_start_without_effect():
    taught = teacher(1, options={"dtype": "float64"})
    plain, whole = student_of(taught, **PLAIN), student_of(taught, **(PLAIN | {"gate": "sigmoid", "conv_width": 4}))
    gated = student_of(taught, **(PLAIN | {"decay": "gated", "gated_start": "paper"}))
    ids = random_ids(2, 12)
    with torch.no_grad():
        wanted = plain.hidden(ids)[0]
        scale_heads_(whole.layers[0].mixer, torch.full((4, 1), 2.0))  # the gate is 1/2
        torch.testing.assert_close(whole.hidden(ids)[0], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gated.hidden(ids)[0], wanted, rtol=1e-10, atol=1e-10)


def test_other_layers_are_the_teachers_and_share_its_memory(tmp_path):
    taught = teacher(3)
    student = student_of(taught, layers=(0, 2))
    assert converted_layers(taught.config, student.config) == [0, 2]
    assert student.config.layers[1] == taught.config.layers[1]
    own = dict(student.state_dict())
    for name, weight in taught.state_dict().items():
        if not name.startswith(("layers.0.mixer.", "layers.2.mixer.")):
            assert own[name].data_ptr() == weight.data_ptr(), name
    save_model(student, tmp_path)
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids).logits, student(ids).logits)


@pytest.mark.parametrize("affine", ["per_head", "none"])
def test_heads_are_scaled_to_the_least_error_of_the_heads(affine):
    taught, samples = teacher(2), [sample(seed=1), sample(seed=2)]
    student = student_of(taught, layers=(0, 1), head_norm_affine=affine)
    before = layer_errors(student, taught, [0, 1], samples)
    scale_heads_to_(student, taught, [0, 1], samples)
    after = layer_errors(student, taught, [0, 1], samples)
    assert all(after[i] < min(before[i], 1.0) for i in (0, 1))
    if affine == "per_head":
        again = {name: x.clone() for name, x in student.state_dict().items()}
        scale_heads_to_(student, taught, [0, 1], samples)  # the best factor is then 1
        for name, x in student.state_dict().items():
            torch.testing.assert_close(x, again[name], rtol=1e-4, atol=1e-5)


def test_output_projections_are_fitted_near_the_teachers():
    taught, samples = teacher(2), [sample(seed=1), sample(seed=2)]
    student = student_of(taught, layers=(0, 1))
    scale_heads_to_(student, taught, [0, 1], samples)
    before = layer_errors(student, taught, [0, 1], samples)
    fit_outputs_(student, taught, [0, 1], samples)
    after = layer_errors(student, taught, [0, 1], samples)
    assert all(after[i] < 0.9 * before[i] for i in (0, 1))
    copied = student_of(taught, layers=(0, 1))
    fit_outputs_(copied, copied, [0, 1], samples)  # outputs that are right already move nothing
    torch.testing.assert_close(copied.layers[0].mixer.out_proj.weight, taught.layers[0].mixer.out_proj.weight)


def test_a_layer_that_gives_nothing_but_zeros_is_fitted_to_zeros():
    taught = teacher(1)
    with torch.no_grad():
        for weight in (taught.layers[0].mixer.v_proj.weight, taught.layers[0].mixer.out_proj.weight):
            weight.zero_()
    student = student_of(taught)
    scale_heads_to_(student, taught, [0], [sample()])
    fit_outputs_(student, taught, [0], [sample()])
    assert not student.layers[0].mixer.out_proj.weight.any()
    assert layer_errors(student, taught, [0], [sample()]) == {0: 0.0}


def test_the_layer_error_is_relative():
    wanted = torch.randn(3, 5, 7)
    assert float(layer_error(wanted, wanted)) == 0
    assert float(layer_error(torch.zeros_like(wanted), wanted)) == pytest.approx(1)
    assert float(layer_error(3 * wanted, wanted)) == pytest.approx(4)


def test_sizes_heads_and_rotation_are_the_teachers():
    taught = teacher(1, rotary_base=5e5, rotary_factor=2.0, qk_norm="rms", qk_norm_eps=1e-5)
    config = retention_of(taught.config.layers[0].mixer, {"conv_width": 2})
    assert isinstance(config, RetentionConfig)
    assert (config.num_heads, config.num_kv_heads, config.key_dim, config.value_dim) == (4, 2, 32, 32)
    assert (config.rotary, config.rotary_base, config.rotary_factor) == ("half", 5e5, 2.0)
    stretched = teacher(1, rotary_scaling=Llama3(8.0, 32)).config.layers[0].mixer
    assert retention_of(stretched, {}).position_scaling == stretched.position_scaling
    assert (config.qk_norm, config.qk_norm_eps, config.conv_width, config.gate) == ("rms", 1e-5, 2, "sigmoid")


@pytest.mark.parametrize(
    ("attention", "given", "message"),
    [
        ({"rotary": "none", "alibi": True}, {}, "alibi True, which retention has no counterpart of"),
        ({"num_sinks": 1}, {}, "num_sinks 1, which retention has no counterpart of; accepted: num_sinks 0"),
        ({}, {"key_dim": 64}, "key_dim is 64 and the teacher's is 32"),
        ({}, {"gate": "swish"}, "gate is 'swish', which has no weights at which it is constant"),
        ({"qk_norm": "rms"}, {"qk_norm": "l2"}, "qk_norm is 'l2' and the teacher's is 'rms'"),
    ],
)
def test_what_retention_cannot_take_over_is_refused(attention, given, message):
    taught = teacher(1, **attention)
    with pytest.raises(ValueError, match=message):
        retention_of(taught.config.layers[0].mixer, given)
