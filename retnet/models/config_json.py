"""`config.json` of a saved model: a ModelConfig, and beside it the fields that transformers reads and writes.

transformers, its Trainer and users change the token ids and the dtype beside `model_config`, so those take precedence.
`generation_config.json`, where there is one, takes precedence over both for token ids, as in transformers' `generate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from retnet.models.config import Dtype, ModelConfig

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = get_args(Dtype)


def outer_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that stand beside `model_config` and say the same."""
    ids = {name: getattr(config, name) for name in TOKEN_IDS}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in ids.items()} | {"dtype": config.dtype}


def merged(
    model_config: Mapping[str, Any], outer: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The configuration of a saved model.

    Args:
        model_config: `ModelConfig.to_dict()`.
        outer: config.json, which holds it.
        generation: generation_config.json.

    Raises ValueError that names a wrong key or value.
    """
    config = ModelConfig.from_dict(model_config)
    changes: dict[str, Any] = {}
    for name in TOKEN_IDS:
        for place, source in (("generation_config.json: ", generation or {}), ("", outer)):
            if source.get(name) is not None:
                changes[name] = token_ids_in_vocabulary(name, source[name], config.vocab_size, place)
                break
    dtype = outer.get("dtype") or outer.get("torch_dtype")  # the name before transformers 5
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
        if changes["dtype"] not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(_DTYPES)}")
    return replace(config, **changes)


def token_ids_in_vocabulary(name: str, value: Any, vocab_size: int, place: str = "") -> int | tuple[int, ...] | None:
    """A token id, or for eos several, of a transformers configuration; None where it names none.

    Negative ids stand for none. Ids beyond the vocabulary, which no model can produce, are left out with a warning.
    place: stands before the name in messages.

    Raises ValueError for anything but integers.
    """
    several = isinstance(value, (list, tuple)) and name == "eos_token_id"
    ids: list[Any] = list(value) if several else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        accepted = "an integer, a list of integers, or null" if name == "eos_token_id" else "an integer or null"
        raise ValueError(f"{place}{name} is {value!r}; accepted: {accepted}")
    beyond = [i for i in ids if i >= vocab_size]
    if beyond:
        warnings.warn(f"{place}{name} is {value}, beyond the vocabulary of {vocab_size}: ignored", stacklevel=3)
    kept = tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))
    return kept if several and kept else kept[0] if kept else None
