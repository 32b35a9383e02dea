"""`config.json` of a saved model: a ModelConfig, and beside it the fields that transformers reads and writes.

transformers, its Trainer, PEFT and users change the fields beside `model_config`, so those take precedence.
`generation_config.json`, where there is one, takes precedence over both for token ids, as in transformers' `generate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from retnet.layers.block import BlockConfig
from retnet.models.config import MAX_LAYERS, Dtype, ModelConfig
from retnet.system.suggest import choices

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = get_args(Dtype)
# transformers' name -> (ours, type)
_FIELDS = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("d_model", int),
    "tie_word_embeddings": ("tie_embeddings", bool),
    "initializer_range": ("init_std", float),
}


def outer_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that stand beside `model_config` and say the same."""
    return {
        **token_fields(config),
        "dtype": config.dtype,
        **{name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()},
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": _num_heads(config),
    }


def token_fields(config: ModelConfig) -> dict[str, Any]:
    """bos, eos and pad as JSON has them."""
    ids = {name: getattr(config, name) for name in TOKEN_IDS}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in ids.items()}


def merged(
    model_config: Mapping[str, Any], outer: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The configuration of a saved model.

    Args:
        model_config: `ModelConfig.to_dict()`.
        outer: config.json, which holds it. A field that is missing or null leaves that of model_config.
        generation: generation_config.json.

    Raises ValueError that names a wrong key or value.
    """
    config = ModelConfig.from_dict(model_config)
    changes: dict[str, Any] = {
        ours: _checked(name, outer[name], kind) for name, (ours, kind) in _FIELDS.items() if outer.get(name) is not None
    }
    vocab_size = changes.get("vocab_size", config.vocab_size)
    for name in TOKEN_IDS:
        for place, source in (("generation_config.json: ", generation or {}), ("", outer)):
            if source.get(name) is not None:
                changes[name] = token_ids_in_vocabulary(name, source[name], vocab_size, place)
                break
    dtype = outer.get("dtype") or outer.get("torch_dtype")  # the name before transformers 5
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
        if changes["dtype"] not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; {choices(dtype, _DTYPES)}")
    heads, own = outer.get("num_attention_heads"), _num_heads(config)
    if heads is not None and heads != own:
        raise ValueError(f"num_attention_heads is {heads!r}; accepted: {own}, as each layer's mixer gives its own")
    if outer.get("num_hidden_layers") is not None:
        count = _checked("num_hidden_layers", outer["num_hidden_layers"], int)
        changes["layers"] = _with_layers(config.layers, count)
    return replace(config, **changes)


def _num_heads(config: ModelConfig) -> int | None:
    """The heads of the first mixer that has heads."""
    mixers = (mixer for layer in config.layers for mixer in layer.mixer.leaves)
    return next((n for mixer in mixers if (n := getattr(mixer, "num_heads", None)) is not None), None)


def _checked(name: str, value: Any, kind: type) -> Any:
    """The value as `kind`. Raises ValueError for another type."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        accepted = {int: "an integer", bool: "true or false", float: "a number"}[kind]
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
    return value


def _with_layers(layers: tuple[BlockConfig, ...], count: int) -> tuple[BlockConfig, ...]:
    """The first `count` layers; more than there are only where all are equal."""
    alike = all(layer == layers[0] for layer in layers)
    most = MAX_LAYERS if alike else len(layers)
    if not 1 <= count <= most:
        why = "" if alike else ", because the layers differ"
        raise ValueError(f"num_hidden_layers is {count}; accepted: 1 to {most}{why}")
    return layers[:count] + layers[:1] * (count - len(layers))


def token_ids_in_vocabulary(name: str, value: Any, vocab_size: int, place: str = "") -> int | tuple[int, ...] | None:
    """`token_id` without ids beyond the vocabulary, which no model can produce: they are left out with a warning."""
    ids = token_id(name, value, place)
    if ids is None:
        return None
    several = isinstance(ids, tuple)
    kept = tuple(i for i in (ids if several else (ids,)) if i < vocab_size)
    if kept != ids and kept != (ids,):
        warnings.warn(f"{place}{name} is {value}, beyond the vocabulary of {vocab_size}: ignored", stacklevel=3)
    return kept if several and kept else kept[0] if kept else None


def token_id(name: str, value: Any, place: str = "") -> int | tuple[int, ...] | None:
    """A token id, or for eos several, of a transformers configuration; None where it names none, as -1 does.

    place: stands before the name in messages. Raises ValueError for anything but integers.
    """
    several = isinstance(value, (list, tuple)) and name == "eos_token_id"
    ids: list[Any] = list(value) if several else [value]
    if value is not None and not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        accepted = "an integer, a list of integers, or null" if name == "eos_token_id" else "an integer or null"
        raise ValueError(f"{place}{name} is {value!r}; accepted: {accepted}")
    kept = tuple(dict.fromkeys(i for i in ids if i is not None and i >= 0))
    return kept if several and kept else kept[0] if kept else None
