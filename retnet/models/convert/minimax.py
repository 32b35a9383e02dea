"""transformers' `MiniMaxForCausalLM` (MiniMax-Text-01 and -M1, arXiv 2501.08313), and the authors' checkpoints.

Lightning attention is retention with decays from ALiBi's slopes, which shrink from layer to layer. Some layers are
softmax attention, and every feed-forward is a mixture of experts. A layer adds its branches to the norm's output.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.moe import MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    Field,
    depth,
    flag,
    head_problems,
    head_width,
    ignored,
    number,
    only,
    rate,
    read,
    refuse,
    size,
    unit_interval,
)  # fmt: skip
from retnet.models.convert.rms_model import rms_model
from retnet.models.convert.rope import ROPE_FIELDS, rope_options
from retnet.models.convert.table import Format, Part, Table
from retnet.models.tensor_files import Tensors
from retnet.system.checks import quoted

EMBEDDING = "model.embed_tokens.weight"
_MIXER, _EXPERTS, _THEIRS = (
    f"model.layers.{{}}.{name}" for name in ("self_attn", "mlp.experts", "block_sparse_moe.experts.[]")
)
_KINDS = ("full_attention", "linear_attention")
MOST_HEADS = 65536  # whose decays are listed in the configuration, before the weights have been looked at
_NORM_EPS = 1e-6  # of the norm over all heads, which no key of theirs sets
# What their modules compute from the configuration and keep with the weights.
_CONSTANTS = ("query_decay", "key_decay", "diagonal_decay")
# Keys of the authors' own configuration, under transformers' names.
_AUTHORS_TYPES = ("minimax_text_01", "MiniMaxText01", "minimax_m1", "MiniMaxM1")
_AUTHORS_KEYS = {
    f"layernorm_{theirs}_{letter}": f"{ours}_{letter}_factor"
    for theirs, ours in (("full_attention", "full_attn"), ("linear_attention", "linear_attn"), ("mlp", "mlp"))
    for letter in ("alpha", "beta")
}

_FACTOR = number(1.0, "a number", lambda x: True)
_FIELDS: dict[str, Field] = {
    "attention_dropout": rate(0.0),
    "full_attn_alpha_factor": _FACTOR,
    "full_attn_beta_factor": _FACTOR,
    "head_dim": size(None),
    "hidden_act": only("silu"),
    "hidden_size": size(4096),
    "initializer_range": unit_interval(0.02),
    "intermediate_size": size(14336),
    "layer_types": Field(
        f"a list of {' and '.join(_KINDS)}",
        lambda x: isinstance(x, list) and all(isinstance(kind, str) and kind in _KINDS for kind in x),
        None,
    ),
    "linear_attn_alpha_factor": _FACTOR,
    "linear_attn_beta_factor": _FACTOR,
    "max_position_embeddings": size(131072),
    "mlp_alpha_factor": _FACTOR,
    "mlp_beta_factor": _FACTOR,
    "num_attention_heads": size(32, most=MOST_HEADS),
    "num_experts_per_tok": size(2),
    "num_hidden_layers": depth(32),
    "num_key_value_heads": size(8, null=None),
    "num_local_experts": size(8),
    "output_router_logits": flag(False),
    "postnorm": only(True),
    **ROPE_FIELDS,
    "rms_norm_eps": unit_interval(1e-5),
    "rotary_dim": size(None),
    "router_aux_loss_coef": number(0.001, "a number of at least 0", lambda x: x >= 0),
    "router_jitter_noise": only(0),
    "shared_intermediate_size": only(0, [0], None),
    "sliding_window": size(None),
    "tie_word_embeddings": flag(False),
    "vocab_size": size(),
    # Without effect on outputs: a way to compute, a mode of experts that are not there.
    "block_size": size(None), "shared_moe_mode": ignored("text", str),
}  # fmt: skip


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    source = _transformers_keys(source)
    value = read("minimax", source, _FIELDS)
    heads, L = value["num_attention_heads"], value["num_hidden_layers"]
    _check(value)
    kinds = value["layer_types"] or [_KINDS[i % 2] for i in range(L)]
    head_dim = head_width(value)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=value["num_key_value_heads"] or heads,
        head_dim=head_dim,
        rotary="half",
        rotary_dim=_rotary_dim(value, head_dim),
        window=value["sliding_window"],
        dropout=value["attention_dropout"],
        **rope_options("minimax", {**value, "rope_theta": value["rope_theta"] or 1e6}),
    )
    experts = MoEConfig(
        num_experts=value["num_local_experts"],
        top_k=value["num_experts_per_tok"],
        hidden_dim=value["intermediate_size"],
        load_balance_coef=value["router_aux_loss_coef"] if value["output_router_logits"] else 0.0,
    )
    layers = []
    for i, kind in enumerate(kinds):
        name = "full_attn" if kind == "full_attention" else "linear_attn"
        layers.append(
            BlockConfig(
                attention if kind == "full_attention" else lightning(heads, head_dim, i, L),
                experts,
                norm="rms",
                norm_eps=value["rms_norm_eps"],
                norm_position="shared",
                skip_scale=value[f"{name}_alpha_factor"],
                residual_scale=value[f"{name}_beta_factor"],
                feed_forward_skip_scale=value["mlp_alpha_factor"],
                feed_forward_residual_scale=value["mlp_beta_factor"],
            )
        )
    return rms_model("minimax", source, value, layers, value["rms_norm_eps"], {"bos_token_id": 1, "eos_token_id": 2})


def lightning(heads: int, head_dim: int, layer: int, num_layers: int) -> RetentionConfig:
    """Their lightning attention.

    Slopes are 2^(-8 h / H) for any number of heads H. They do not scale q, and ours is scaled by K^(-1/2): under the
    head norm that is an eps divided by K.
    """
    is_power = heads & (heads - 1) == 0
    slopes = torch.exp2(-8 / heads * torch.arange(1, heads + 1, dtype=torch.float64))
    return RetentionConfig(
        num_heads=heads,
        key_dim=heads * head_dim,
        value_dim=heads * head_dim,
        decay="alibi" if is_power else tuple(torch.exp(-slopes).tolist()),
        decay_scale=1 - layer / (num_layers - 1 + 1e-5) + 1e-5,
        rotary="none",
        qkv_activation="silu",
        gate="sigmoid",
        head_norm="rms",
        head_norm_affine="per_head",
        head_norm_eps=_NORM_EPS / head_dim,
        head_norm_groups=1,
    )


def _transformers_keys(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of the authors' own code under transformers' names; one of transformers as it is."""
    if source.get("model_type") not in _AUTHORS_TYPES:
        return source
    named = {_AUTHORS_KEYS.get(key, key): x for key, x in source.items() if key != "attn_type_list"}
    kinds = source.get("attn_type_list")
    if isinstance(kinds, list) and all(kind in (0, 1) for kind in kinds):
        named["layer_types"] = [_KINDS[0] if kind else _KINDS[1] for kind in kinds]
    elif kinds is not None:
        refuse("minimax", [f"attn_type_list is {quoted(kinds)}; accepted: a list of 0 (linear) and 1 (softmax)"])
    return {"postnorm": False, **named}  # what their code takes for a missing key


def _check(value: Mapping[str, Any]) -> None:
    kinds = value["layer_types"]
    problems = head_problems(value)
    if kinds is not None and len(kinds) != value["num_hidden_layers"]:
        problems.append(
            f"layer_types has {len(kinds)} entries; accepted: num_hidden_layers {value['num_hidden_layers']}"
        )
    if value["num_experts_per_tok"] == 1 < value["num_local_experts"]:
        problems.append(
            "num_experts_per_tok is 1, whose weight would be 1 and not the router's probability; accepted: 2 or more"
        )
    refuse("minimax", problems)


def _rotary_dim(value: Mapping[str, Any], head_dim: int) -> int | None:
    """The components of a head that rotate in softmax attention; None for all."""
    rotated = value["rotary_dim"]
    if rotated in (None, head_dim):
        return None
    warnings.warn(
        f"minimax: rotary_dim is {rotated}: so many components of a head rotate, as in the authors' code; transformers "
        f"ignores the key and rotates all {head_dim}",
        stacklevel=4,
    )
    return rotated


def names(config: ModelConfig) -> Table:
    """The table: weights as saved by transformers and by the authors, or as in transformers' state dict."""
    lightning = (layer.mixer for layer in config.layers if isinstance(layer.mixer, RetentionConfig))
    heads = next((mixer.num_heads for mixer in lightning), 1)
    fused = [Part(f"{_MIXER}.qkv_proj.weight", i, 3, groups=heads) for i in range(3)]
    return {
        "embedding.weight": EMBEDDING,
        "layers.{}.mixer_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.mixer.q_proj.weight": (f"{_MIXER}.q_proj.weight", fused[0]),
        "layers.{}.mixer.k_proj.weight": (f"{_MIXER}.k_proj.weight", fused[1]),
        "layers.{}.mixer.v_proj.weight": (f"{_MIXER}.v_proj.weight", fused[2]),
        "layers.{}.mixer.gate_proj.weight": f"{_MIXER}.output_gate.weight",
        "layers.{}.mixer.head_norm_weight": Part(f"{_MIXER}.norm.weight", flat=True),
        "layers.{}.mixer.out_proj.weight": (f"{_MIXER}.o_proj.weight", f"{_MIXER}.out_proj.weight"),
        "layers.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.feed_forward.router.weight": (
            "model.layers.{}.block_sparse_moe.gate.weight",
            "model.layers.{}.mlp.gate.weight",
        ),
        "layers.{}.feed_forward.gate_proj.weight": (
            f"{_THEIRS}.w1.weight",
            Part(f"{_EXPERTS}.gate_up_proj", 0, 2, dim=1),
        ),
        "layers.{}.feed_forward.up_proj.weight": (
            f"{_THEIRS}.w3.weight",
            Part(f"{_EXPERTS}.gate_up_proj", 1, 2, dim=1),
        ),
        "layers.{}.feed_forward.down_proj.weight": (f"{_THEIRS}.w2.weight", f"{_EXPERTS}.down_proj"),
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }


def settle(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, set[str]]:
    """The configuration, and the decays that transformers keeps beside the weights.

    They are computed from the configuration here. Raises ValueError where the stored slopes are others.
    """
    consumed: set[str] = set()
    for i, layer in enumerate(config.layers):
        place = _MIXER.format(i)
        if not isinstance(layer.mixer, RetentionConfig):
            continue
        consumed |= {f"{place}.{name}" for name in _CONSTANTS} & tensors.specs.keys()
        name = f"{place}.slope_rate"
        if name not in tensors.specs:
            continue
        consumed.add(name)
        stored, expected = tensors.read(name).double().flatten(), -_log_decay(layer.mixer)
        # As far as bfloat16 and float16 hold them.
        if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=2**-7, atol=1e-6):
            raise ValueError(f"minimax: {name} is not that of layer {i} of {len(config.layers)}")
    return config, consumed


def _log_decay(mixer: RetentionConfig) -> torch.Tensor:
    found = mixer.log_decay
    assert found is not None  # it is fixed
    return found


FORMAT = Format(
    name="minimax",
    names=names,
    config_of=config_of,
    marker="model.layers.0.self_attn.qkv_proj.weight",
    embedding=EMBEDDING,
    settle=settle,
    model_types=("minimax", *_AUTHORS_TYPES),
)
