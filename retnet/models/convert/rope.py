"""The rotary settings of transformers' configurations, as the rotary fields of AttentionConfig.

Of the ways to extend a trained context, those that are fixed when the model is built are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retnet.models.convert.fields import Field, choice, flag, is_number, mapping, only, positive, read, refuse, size
from retnet.ops.rotary import Llama3, Yarn
from retnet.system.checks import quoted

# The keys of a config.json that `rope_options` reads, beside max_position_embeddings.
ROPE_FIELDS: dict[str, Field] = {
    "original_max_position_embeddings": size(None),
    "rope_parameters": mapping(),
    "rope_scaling": mapping(),
    "rope_theta": positive(None),
}
_KINDS = ("default", "linear", "llama3", "yarn")
_NEEDED = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_ROPE = {
    "rope_theta": positive(None),
    "rope_type": choice(None, *_KINDS),
    "type": choice(None, *_KINDS),
    "partial_rotary_factor": only(1, None),
    "factor": positive(None),
    "original_max_position_embeddings": size(None),
    # llama3
    "low_freq_factor": positive(None), "high_freq_factor": positive(None),
    # yarn
    "attention_factor": positive(None), "beta_fast": positive(32.0), "beta_slow": positive(1.0),
    "mscale": Field("a number", is_number, None), "mscale_all_dim": Field("a number", is_number, None),
    "truncate": flag(True),
    # of types that are refused by name
    "long_factor": Field("nothing", lambda x: False, None), "short_factor": Field("nothing", lambda x: False, None),
}  # fmt: skip


def rope_options(family: str, value: Mapping[str, Any], partial: float = 1.0) -> dict[str, Any]:
    """The rotary fields of AttentionConfig, from one mapping (transformers 5) or from several keys (earlier ones).

    partial: the share of a head that rotates, which the settings may state and not change.
    """
    name = "rope_scaling" if value["rope_scaling"] else "rope_parameters"
    given = value[name] or {}
    unknown = [key for key, x in given.items() if key not in _ROPE and x is not None]
    refuse(family, [f"{name}.{key} is {quoted(given[key])}; accepted: {', '.join(_ROPE)}" for key in unknown])
    kind = given.get("rope_type", given.get("type"))
    if kind in ("dynamic", "longrope"):
        refuse(family, [f"{name}.rope_type is {kind!r}, which changes with the length; accepted: {', '.join(_KINDS)}"])
    rope = read(f"{family}: {name}", given, {**_ROPE, "partial_rotary_factor": only(partial, None)})
    kind = rope["rope_type"] or rope["type"] or "default"
    most = value["max_position_embeddings"]
    length = value["original_max_position_embeddings"] or rope["original_max_position_embeddings"] or most
    if kind == "yarn" and rope["factor"] is None and "factor" in given:
        rope["factor"] = most / length
    missing = [key for key in _NEEDED.get(kind, ()) if rope[key] is None]
    refuse(family, [f"{name}.{key} is missing; accepted with {kind}: a positive number" for key in missing])
    factor: Any = rope["factor"]
    options: dict[str, Any] = {"rotary_base": rope["rope_theta"] or value["rope_theta"] or 10000.0}
    if kind == "linear":
        options["rotary_factor"] = factor
    elif kind == "yarn":
        temperature = _temperature(rope)
        options["rotary_scaling"] = Yarn(
            factor, length, rope["beta_fast"], rope["beta_slow"], temperature, rope["truncate"]
        )
    elif kind == "llama3":
        options["rotary_scaling"] = Llama3(factor, length, rope["low_freq_factor"], rope["high_freq_factor"])
    return options


def _temperature(rope: Mapping[str, Any]) -> float | None:
    """The gain of YaRN: as given, or the quotient of two paper's gains (DeepSeek's `mscale`)."""
    if rope["attention_factor"] is not None:
        return rope["attention_factor"]
    if not (rope["mscale"] and rope["mscale_all_dim"]):
        return None
    factor = rope["factor"]
    above, below = (
        1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
        for scale in (rope["mscale"], rope["mscale_all_dim"])
    )
    return above / below
