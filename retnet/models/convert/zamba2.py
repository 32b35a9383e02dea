"""transformers' Zamba2 (arXiv 2411.15242) as far as its layers are Mamba-2 alone; shared blocks are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.layers.block import BlockConfig
from retnet.layers.mamba2 import Mamba2Config
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import Field, depth, flag, positive, read, refuse, size, times, unit_interval
from retnet.models.convert.hybrid_fields import hybrid_model, inner_width
from retnet.system.checks import quoted

_LAYERS = ("mamba", "linear_attention")  # the second is transformers 5's name of the first
_FIELDS = {
    "add_bias_linear": flag(False),
    "hidden_size": size(2560),
    "initializer_range": unit_interval(0.02),
    "layers_block_type": Field("a list of text", lambda x: isinstance(x, list), None),
    "mamba_d_conv": size(4),
    "mamba_d_state": size(64),
    "mamba_expand": times(2),
    "mamba_ngroups": size(1),
    "n_mamba_heads": size(8),
    "num_hidden_layers": depth(54),
    "rms_norm_eps": unit_interval(1e-5),
    "tie_word_embeddings": flag(True),
    "time_step_floor": positive(1e-4),
    "time_step_max": positive(0.1),
    "time_step_min": positive(1e-3),
    "vocab_size": size(),
}


def zamba2_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """The config.json of a Zamba2 of Mamba-2 layers alone as our configuration."""
    value = read("zamba2", source, _FIELDS, closed=False)  # its other keys are those of the shared blocks
    kinds: list[Any] = value["layers_block_type"] or []
    shared = {i: kind for i, kind in enumerate(kinds) if kind not in _LAYERS}
    if shared or not kinds:
        where = f"{quoted(shared)}" if kinds else "missing, which means shared blocks"
        refuse(
            "zamba2",
            [
                f"layers_block_type is {where}: a shared block has the same weights in several layers, with adapters "
                "of each layer's own, reads the embedding beside the hidden state, and adds to the input of Mamba "
                f"alone; accepted: layers of {' or '.join(_LAYERS)}"
            ],
        )
    if len(kinds) != value["num_hidden_layers"]:
        refuse("zamba2", [f"layers_block_type has {len(kinds)} entries; accepted: {value['num_hidden_layers']}"])
    inner, heads = inner_width("zamba2", value), value["n_mamba_heads"]
    if inner % heads:
        refuse("zamba2", [f"n_mamba_heads is {heads}; accepted: a divisor of {inner}"])
    mixer = Mamba2Config(
        inner_dim=inner,
        head_dim=inner // heads,
        state_dim=value["mamba_d_state"],
        num_groups=value["mamba_ngroups"],
        conv_width=value["mamba_d_conv"],
        bias=value["add_bias_linear"],
        time_step_min=value["time_step_min"],
        time_step_max=value["time_step_max"],
        time_step_floor=value["time_step_floor"],
        time_step_lowest=value["time_step_min"],
    )
    layer = BlockConfig(mixer, None, norm="rms", norm_eps=value["rms_norm_eps"])
    return hybrid_model("zamba2", source, value, [layer] * len(kinds))
