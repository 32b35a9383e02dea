"""Conversion of models: every option of a format, refusals and their messages, streaming, and the way back."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retnet.cli import main
from retnet.layers.attention import AttentionConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.models import convert
from retnet.models.config import ModelConfig
from retnet.models.directory import load_model, save_model
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset

from .peers import FLA_CONFIG, TORCHSCALE_ARGS, VOCAB, fla_logits, fla_state, torchscale_logits, torchscale_state

IDS = torch.randint(VOCAB, (2, 23), generator=torch.Generator().manual_seed(5))
SYNCDOTH = {"prefix": "model.", "head": "lm_head.weight"}
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 7, "rope_theta": 500.0}


def assert_equal_logits(model: LanguageModel, wanted: Tensor) -> None:
    with torch.no_grad():
        ours = model.double()(IDS).logits
    assert ((ours - wanted).abs().max() / wanted.abs().max()).item() < 1e-12


def write_fla(directory: Path, state: dict[str, Tensor] | None = None, **options) -> Tensor:
    """A directory as FLA writes it, with random weights if none are given. Returns FLA's logits for random weights."""
    config = FLA_CONFIG | options
    random = fla_state(config)
    directory.mkdir()
    save_file(random if state is None else state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return fla_logits(random, config, IDS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder_normalize_before": False, "subln": False},
        {"deepnorm": True, "decoder_normalize_before": False, "subln": False},
        {"deepnorm": True, "subln": False},
        {"no_scale_embedding": False, "layernorm_embedding": True},
        {"activation_fn": "swish", "layernorm_eps": 1e-3, "decoder_value_embed_dim": 32},
        {"use_lm_decay": True},  # of a fork; torchscale's decays differ only in the buffer
    ],
    ids=["plain", "post-norm", "deepnorm", "deepnorm before", "embedding norm", "swish", "other decays"],
)
def test_torchscale_options(options):
    args = TORCHSCALE_ARGS | options
    state = torchscale_state(args)
    model = convert.load(state, "torchscale", args)
    assert model.config.layers[0].mixer.decay == ("experiment" if "use_lm_decay" in options else "paper")
    assert_equal_logits(model, torchscale_logits(state, args, IDS))


def test_torchscale_decays_of_no_schedule_become_the_ones_stored():
    state = torchscale_state(TORCHSCALE_ARGS)
    state["retnet_rel_pos.decay"] = torch.tensor([0.5, 0.9, 0.99, 0.999]).log()
    model = convert.load(state, config=TORCHSCALE_ARGS)
    assert model.config.layers[0].mixer.decay == pytest.approx((0.5, 0.9, 0.99, 0.999))
    assert_equal_logits(model, torchscale_logits(state, TORCHSCALE_ARGS, IDS, stored_decay=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_keep_their_dtype_and_name_their_schedule(dtype):
    state = {name: x.to(dtype) for name, x in torchscale_state(TORCHSCALE_ARGS).items()}
    model = convert.load(state, config=TORCHSCALE_ARGS)
    assert model.config.dtype == str(dtype).removeprefix("torch.")
    assert model.embedding.weight.dtype == dtype
    assert model.config.layers[0].mixer.decay == "paper"


@pytest.mark.parametrize(
    ("wide", "dtype"),
    [("embed_tokens.weight", "float32"), ("fc1.weight", "float32"), ("norm.weight", "bfloat16"), ("none", "bfloat16")],
)
def test_the_dtype_of_a_mixed_checkpoint_is_one_wherever_it_is_said(wide, dtype, tmp_path):
    state = torchscale_state(TORCHSCALE_ARGS)
    state = {name: x if name.endswith(wide) else x.bfloat16() for name, x in state.items()}
    returned = convert.convert(state, tmp_path / "ours", config=TORCHSCALE_ARGS)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    loaded = convert.load(state, config=TORCHSCALE_ARGS)
    again = convert.load(tmp_path / "ours").config
    everywhere = [returned.dtype, written["dtype"], written["model_config"]["dtype"], loaded.config.dtype, again.dtype]
    assert everywhere == [dtype] * 5
    assert convert.convert(loaded, tmp_path / "twice") == returned


def test_torchscale_shares_the_embedding_with_the_head():
    args = TORCHSCALE_ARGS | {"share_decoder_input_output_embed": True, "vocab_size": -1}
    state = torchscale_state(args)
    with pytest.raises(ValueError, match=r"ties output_projection.weight to embed_tokens.weight, but they differ"):
        convert.load(state, config=args)
    state["output_projection.weight"] = state["embed_tokens.weight"]
    model = convert.load(state, config=args)
    assert model.head.weight is model.embedding.weight
    assert model.config.vocab_size == VOCAB
    assert_equal_logits(model, torchscale_logits(state, args, IDS))


@pytest.mark.parametrize("wrap", ["args", "cfg"])
def test_torchscale_checkpoints_with_their_arguments_inside(tmp_path, wrap):
    state = torchscale_state(TORCHSCALE_ARGS)
    args = argparse.Namespace(**TORCHSCALE_ARGS)
    inside = {"args": args} if wrap == "args" else {"args": None, "cfg": {"model": args}}
    torch.save({"model": {"decoder." + name: x for name, x in state.items()}, **inside}, tmp_path / "best.pt")
    model = convert.load(tmp_path / "best.pt")
    assert_equal_logits(model, torchscale_logits(state, TORCHSCALE_ARGS, IDS))


def test_arguments_may_be_an_object_and_weights_parameters():
    class RetNetConfig:
        def __init__(self):
            self.__dict__.update(TORCHSCALE_ARGS)

    state = {name: x.requires_grad_() for name, x in torchscale_state(TORCHSCALE_ARGS).items()}
    model = convert.load(state, config=RetNetConfig())
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    model.embedding.weight.data.zero_()
    assert state["embed_tokens.weight"].any()


def test_torchscale_chunkwise_training_is_warned_about():
    with pytest.warns(UserWarning, match="chunkwise_recurrent asks for their chunkwise form"):
        convert.load(torchscale_state(TORCHSCALE_ARGS), config=TORCHSCALE_ARGS | {"chunkwise_recurrent": True})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_lm_decay": True},
        {"use_glu": False, "activation_fn": "relu"},
        {"use_glu": False, "use_ffn_rms_norm": True},
        {"use_glu": False, "deepnorm": True, "decoder_normalize_before": False},
        {"tie_word_embeddings": True},
    ],
    ids=["plain", "lm decay", "sub-layer norm", "rms sub-layer norm", "deepnorm", "tied"],
)
def test_syncdoth_options(tmp_path, options):
    config = TORCHSCALE_ARGS | {"model_type": "retnet", "pad_token_id": 0} | options
    state = torchscale_state(config, **SYNCDOTH)
    if options.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = convert.load(tmp_path)
    assert model.config.pad_token_id == 0
    assert_equal_logits(model, torchscale_logits(state, config, IDS, **SYNCDOTH))


def test_syncdoth_resolves_contradictions_as_its_constructor_does():
    base = TORCHSCALE_ARGS | {"decoder_normalize_before": False}
    assert convert.syncdoth.config_of(base).layers[0].norm_position == "pre"  # subln, its default, wins
    assert convert.syncdoth.config_of(base | {"subln": False}).layers[0].norm_position == "post"
    deepnorm = convert.syncdoth.config_of(TORCHSCALE_ARGS | {"deepnorm": True}).layers[0]
    assert (deepnorm.norm_position, deepnorm.skip_scale) == ("post", pytest.approx(4**0.25))


FLA_OPTIONS = {
    "plain": {},
    "expansions": {"expand_k": 0.5, "expand_v": 1.5, "norm_eps": 1e-3},
    "shared keys": {"num_kv_heads": 2},
    "no gate": {"use_output_gate": False},
    "unfused": {"fuse_norm": False},
    "no affine": {"elementwise_affine": False},
    "tied": {"tie_word_embeddings": True},
    "hybrid": {"attn": ATTENTION},
}


@pytest.mark.parametrize("options", FLA_OPTIONS.values(), ids=FLA_OPTIONS)
def test_fla_options(tmp_path, options):
    wanted = write_fla(tmp_path / "theirs", **options)
    assert_equal_logits(convert.load(tmp_path / "theirs"), wanted)


@pytest.mark.parametrize("options", FLA_OPTIONS.values(), ids=FLA_OPTIONS)
def test_fla_round_trip_is_bit_identical(tmp_path, options):
    write_fla(tmp_path / "theirs", **options)
    first = convert.convert(tmp_path / "theirs", tmp_path / "ours")
    convert.convert(tmp_path / "ours", tmp_path / "written", to="fla")
    second = convert.convert(tmp_path / "written", tmp_path / "again")
    assert first == second
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if options != {"fuse_norm": False}:  # written fused, as FLA's default has it
        original, written = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "written"))
        assert original.keys() == written.keys()
        assert all(torch.equal(original[name], written[name]) for name in original)


CONVOLUTIONS = {
    "plain": {},
    "shared keys": {"num_kv_heads": 2, "conv_size": 3, "expand_k": 0.5},
    "hybrid": {"attn": ATTENTION},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_fla_convolutions_of_q_k_and_v_become_one(tmp_path, options):
    wanted = write_fla(tmp_path / "theirs", use_short_conv=True, **options)
    model = convert.load(tmp_path / "theirs")
    assert model.config.layers[0].mixer.conv_width == options.get("conv_size", 4)
    assert_equal_logits(model, wanted)


def test_fla_models_whose_blocks_build_no_convolution_have_none():
    with pytest.warns(UserWarning, match="use_short_conv has no effect: the weights include no convolution"):
        model = convert.load(fla_state(FLA_CONFIG), config=FLA_CONFIG | {"use_short_conv": True})
    assert model.config == convert.load(fla_state(FLA_CONFIG), config=FLA_CONFIG).config


def test_a_given_configuration_with_a_convolution_is_refused_for_fla_weights_without_one():
    config = convert.load(fla_state(FLA_CONFIG), config=FLA_CONFIG).config
    convolved = [replace(x, mixer=replace(x.mixer, conv_width=3)) for x in config.layers]
    with pytest.raises(ValueError, match=r"conv_width is 3, but the weights, read as fla, include no convolution"):
        convert.load(fla_state(FLA_CONFIG), config=replace(config, layers=tuple(convolved)))


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"k": None}, "q_conv1d"),
        ({"k": torch.zeros(32, 1, 3)}, "k_conv1d"),
        ({"k": torch.zeros(33, 1, 4), "q": torch.zeros(31, 1, 4)}, "k_conv1d"),
        ({"q": torch.zeros(())}, "q_conv1d"),
        ({"v": torch.zeros(64, 1, 4, dtype=torch.float64)}, "v_conv1d"),
    ],
    ids=["missing", "other width", "other channels", "scalar", "other dtype"],
)
def test_fla_convolutions_that_do_not_fit_are_named(change, left):
    config = FLA_CONFIG | {"use_short_conv": True}
    state = fla_state(config) | {f"model.layers.0.attn.{part}_conv1d.weight": x for part, x in change.items()}
    message = rf"0.attn.\[qkv\]_conv1d.weight is missing; .*0.attn.{left}.weight is left over"
    with pytest.raises(ValueError, match=message):
        convert.load({name: x for name, x in state.items() if x is not None}, config=config)


def test_fla_early_checkpoints_store_gate_and_up_as_one(tmp_path):
    state = fla_state(FLA_CONFIG)
    for i in range(3):
        gate, up = (state.pop(f"model.layers.{i}.mlp.{name}_proj.weight") for name in ("gate", "up"))
        state[f"model.layers.{i}.mlp.gate_proj.weight"] = torch.cat([gate, up])
    wanted = write_fla(tmp_path / "fused", state)
    assert_equal_logits(convert.load(tmp_path / "fused"), wanted)


def test_fla_intermediate_size_follows_from_the_ratio():
    config = FLA_CONFIG | {"intermediate_size": None, "hidden_size": 1024, "num_heads": 8}
    for ratio, width in ((2, 1536), (4, 2816), (None, 2816)):
        assert convert.fla.config_of(config | {"hidden_ratio": ratio}).layers[0].feed_forward.hidden_dim == width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "elu"}, "feature_map is 'elu'; accepted: None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'swish'"),
        ({"use_short_conv": True, "conv_size": 9}, "conv_size is 9 with use_short_conv; accepted: 2 to 8"),
        ({"attn_mode": "triton"}, "attn_mode is 'triton'; accepted: chunk"),
        ({"model_type": "gla"}, "model_type is 'gla'; accepted: retnet, transformer"),
        ({"attn": {"num_heads": 4}}, "attn: layers is missing; accepted: a list of layer numbers"),
        ({"attn": ATTENTION | {"sink": 1}}, "attn.sink is 1; accepted: layers"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; accepted: a divisor"),
        ({"bos_token_id": VOCAB}, f"bos_token_id is {VOCAB}; accepted: 0 to {VOCAB - 1}"),
    ],
)
def test_fla_features_that_we_lack_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        convert.fla.config_of(FLA_CONFIG | options)


def test_unknown_keys_are_warned_about():
    with pytest.warns(UserWarning, match=r"fla: unknown keys are ignored: \{'new_trick': 3\}"):
        convert.fla.config_of(FLA_CONFIG | {"new_trick": 3, "other_trick": None, "_name_or_path": "x"})


def test_every_tensor_is_used_once_or_conversion_fails(tmp_path):
    state = fla_state(FLA_CONFIG)
    del state["model.norm.weight"]
    state["model.layers.0.attn.q_conv1d.weight"] = torch.zeros(32, 1, 4)
    state["model.layers.1.attn.q_proj.weight"] = torch.zeros(32, 31)
    state["model.layers.2.mlp.down_proj.weight"] = torch.zeros(32, 40, dtype=torch.int8)
    write_fla(tmp_path / "broken", state)
    with pytest.raises(ValueError, match="not the weights of the configuration, read as fla") as caught:
        convert.convert(tmp_path / "broken", tmp_path / "out")
    for problem in (
        "model.norm.weight is missing",
        "model.layers.0.attn.q_conv1d.weight is left over",
        "model.layers.1.attn.q_proj.weight has shape [32, 31], not [32, 32]",
        "model.layers.2.mlp.down_proj.weight is torch.int8, not a floating-point dtype",
    ):
        assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_half_of_a_fused_tensor_is_not_enough():
    state = fla_state(FLA_CONFIG)
    gate = state["model.layers.0.mlp.gate_proj.weight"]
    state["model.layers.0.mlp.gate_proj.weight"] = torch.cat([gate, gate])  # while `up` is also present
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj.weight is not used exactly once"):
        convert.load(state, config=FLA_CONFIG)


def test_other_rotary_frequencies_are_refused():
    state = torchscale_state(TORCHSCALE_ARGS)
    state["retnet_rel_pos.angle"] = (10000 ** -(torch.arange(0, 8, 2) / 8)).repeat_interleave(2)  # FLA's
    with pytest.raises(ValueError, match=r"retnet_rel_pos.angle is not 10000\^-linspace"):
        convert.load(state, config=TORCHSCALE_ARGS)


def change(config: ModelConfig, **changes) -> ModelConfig:
    """The configuration with fields of its first layer's mixer, its feed-forward, the layer or the model changed."""
    layer = config.layers[0]
    for name, value in changes.items():
        for part in ("mixer", "feed_forward"):
            if hasattr(getattr(layer, part), name):
                layer = replace(layer, **{part: replace(getattr(layer, part), **{name: value})})
                break
        else:
            if hasattr(layer, name):
                layer = replace(layer, **{name: value})
            else:
                config = replace(config, **{name: value})
    return replace(config, layers=(layer, *config.layers[1:]))


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary": "interleaved"},
        {"rotary_base": 5e5},
        {"decay": "experiment"},
        {"decay": "gated"},
        {"learnable_decay": True},
        {"decay_norm": True},
        {"conv_width": 4},
        {"decay_scale": 0.5},
        {"qkv_activation": "silu"},
        {"head_norm_groups": 1},
        {"qk_norm": "rms"},
        {"gate": "sigmoid"},
        {"head_norm": "layer"},
        {"head_norm_affine": "per_head"},
        {"head_norm_affine": "none"},
        {"head_norm_eps": 1e-3},
        {"bias": True},
        {"gated": False},
        {"activation": "gelu"},
        {"inner_norm": "rms"},
        {"norm": "layer"},
        {"norm_position": "post"},
        {"residual": "parallel"},
        {"norm_position": "shared"},
        {"skip_scale": 2.0},
        {"feed_forward_skip_scale": 2.0},
        {"feed_forward_residual_scale": 2.0},
        {"dropout": 0.1},
        {"feed_forward": None},
        {"mixer": AttentionConfig(4, 4, 8, alibi=True, rotary="none")},
        {"embedding_scale": 2.0},
        {"embedding_norm": "rms"},
        {"final_norm": "layer"},
        {"logit_scale": 0.5},
        {"logit_soft_cap": 30.0},
        {"hidden_dim": 48},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_features_that_fla_cannot_express_are_named(tmp_path, changes):
    config = change(convert.fla.config_of(FLA_CONFIG), **changes)
    name = next(iter(changes))
    expected = {"mixer": "alibi", "hidden_dim": "hidden_dim is 40"}.get(name, name)  # the first layer is the pattern
    with pytest.raises(ValueError, match=f"FLA's RetNet cannot express this model: .*{expected}"):
        convert.convert(LanguageModel(config), tmp_path / "out", to="fla")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mixer", "named"),
    [
        (AttentionConfig(4, 4, 8, num_sinks=1), "mixer.num_sinks is 1"),
        (AttentionConfig(4, 4, 8, rotary_dim=4), "mixer.rotary_dim is 4"),
        (LatentAttentionConfig(4, 4, 8, latent_dim=6), "mixer is 'latent_attention'"),
    ],
)
def test_kinds_of_attention_that_fla_does_not_have_are_named(mixer, named):
    config = convert.fla.config_of(FLA_CONFIG)
    layers = (config.layers[0], replace(config.layers[1], mixer=mixer), *config.layers[2:])
    with pytest.raises(ValueError, match=named):
        convert.fla.config_to(replace(config, layers=layers))


def test_a_model_of_a_stack_file_is_written_without_the_file():
    config = convert.fla.config_of(FLA_CONFIG)
    assert convert.fla.config_to(replace(config, source="schema_version: 1")) == convert.fla.config_to(config)


def test_wide_key_heads_are_beyond_fla():
    config = convert.fla.config_of(FLA_CONFIG | {"hidden_size": 1024, "num_heads": 2})
    with pytest.raises(ValueError, match="heads of 512"):
        convert.fla.config_to(config)


def test_a_model_in_memory_is_written_in_either_format(tmp_path):
    model = LanguageModel(convert.fla.config_of(FLA_CONFIG))
    convert.convert(model, tmp_path / "fla", to="fla")
    convert.convert(model, tmp_path / "ours")
    with torch.no_grad():
        wanted = model(IDS).logits
        assert torch.equal(convert.load(tmp_path / "fla")(IDS).logits, wanted)
        assert torch.equal(load_model(tmp_path / "ours")(IDS).logits, wanted)
        assert torch.equal(convert.load(tmp_path / "ours")(IDS).logits, wanted)  # ours is recognised too


def test_unknown_formats_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"no known format \(its tensors: x, ...\); accepted: retnet, torchscale, fla"):
        convert.load({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"format is 'gpt2'; accepted: retnet, torchscale, fla, syncdoth"):
        convert.load({}, format="gpt2")
    with pytest.raises(ValueError, match=r"without a configuration; accepted: config="):
        convert.load(torchscale_state(TORCHSCALE_ARGS))
    with pytest.raises(ValueError, match=r"embed_tokens.weight is missing"):
        convert.load({"layers.0.retention.q_proj.weight": torch.zeros(1)}, config={"decoder_embed_dim": 1})
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        convert.load(tmp_path / "nothing")


def test_wrong_types_in_a_configuration_are_named():
    with pytest.raises(ValueError, match="activation_fn is 'relu6'; accepted: gelu, relu, swish"):
        convert.load(torchscale_state(TORCHSCALE_ARGS), config=TORCHSCALE_ARGS | {"activation_fn": "relu6"})


def test_a_directory_in_use_is_not_written_to(tmp_path):
    write_fla(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="accepted: a new or empty directory"):
        convert.convert(tmp_path / "theirs", tmp_path / "theirs")


def test_after_an_error_in_the_middle_the_directory_is_as_it_was(tmp_path):
    def full(done, total):
        raise OSError("no space left on device")

    model = convert.load(fla_state(FLA_CONFIG), config=FLA_CONFIG)
    for to in ("retnet", "fla"):
        with pytest.raises(OSError, match="no space left"):
            convert.convert(model, tmp_path / "new", to=to, on_bytes=full)
        assert not (tmp_path / "new").exists()


def test_tokenizer_files_come_along(tmp_path):
    write_fla(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "notes.txt").write_text("not needed")
    convert.convert(tmp_path / "theirs", tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "retnet_shim.py", "tokenizer.json"}


def test_the_command_converts_and_says_what_it_wrote(tmp_path, capsys):
    wanted = write_fla(tmp_path / "theirs")
    with pytest.raises(SystemExit) as done:
        main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out")])
    assert done.value.code == 0
    assert "3 layers of width 32" in capsys.readouterr().out
    assert_equal_logits(load_model(tmp_path / "out"), wanted)


def test_the_command_names_what_fla_cannot_express(tmp_path, capsys):
    save_model(LanguageModel(preset("retnet-tiny")), tmp_path / "tiny")
    with pytest.raises(SystemExit) as done:
        main(["convert", str(tmp_path / "tiny"), str(tmp_path / "out"), "--to", "fla"])
    assert done.value.code == 2
    layers = len(preset("retnet-tiny").layers)
    assert f"mixer.rotary is 'interleaved' (there: 'half') in {layers} layers" in capsys.readouterr().err
