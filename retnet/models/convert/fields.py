"""Fields of another library's configuration: each is read with its type and range before anything is built from it.

A table of `Field`s says what a format's config.json may hold. `read` checks every key and reports all faults at once,
each with the key, the value given, and what is accepted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from retnet.models.config import MAX_LAYERS, Dtype
from retnet.models.config_json import TOKEN_IDS, token_id
from retnet.system.checks import is_integer, quoted

LARGEST = 2**31 - 1
MOST_TIMES = 1024  # the largest factor between two widths
_REQUIRED, _DEFAULT = object(), object()

# Keys that transformers writes into any config.json and that change no output.
_BOOKKEEPING = {
    "architectures", "auto_map", "id2label", "is_decoder", "label2id", "model_type", "return_dict", "tokenizer_class",
    "transformers_version", "use_cache",
}  # fmt: skip

# Keys by which libraries change what such a layer computes, each with the values that change nothing. Where a format
# does not read one, null, false and zero change nothing either.
_MATHEMATICS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "add_cross_attention", "alibi", "attention_bias", "attention_chunk_size", "attention_multiplier",
        "attention_sinks", "attn_logit_softcapping", "bias", "clip_qkv", "final_logit_softcapping",
        "is_encoder_decoder", "lm_head_bias", "mlp_bias", "no_rope_layers", "parallel_attn", "qk_layernorm", "qk_norm",
        "qkv_bias", "quantization_config", "query_pre_attn_scalar", "rope_interleaved", "scale_embedding",
        "scale_embeddings", "sliding_window", "use_bias", "use_parallel_residual", "use_qk_norm",
    ), ()),
    **dict.fromkeys((
        "attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier", "key_multiplier",
        "lm_head_multiplier", "logit_scale", "logits_scaling", "residual_multiplier", "ssm_in_multiplier",
        "ssm_out_multiplier",
    ), (1,)),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), (1,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (1,)),
    "hidden_activation": ("silu", "swish"),
    "norm_type": ("rms", "rmsnorm"),
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One key of a configuration.

    accepted: the accepted values, in words. check: whether a value is one of them. default: the value of a missing key.
    null: the value of null; the default if not given.
    """

    accepted: str
    check: Callable[[Any], bool]
    default: Any = _REQUIRED
    null: Any = _DEFAULT

    def read(self, source: Mapping[str, Any], key: str) -> Any:
        """The value of a key. Raises ValueError."""
        given = source.get(key)
        if given is None:
            value = self.default if key not in source or self.null is _DEFAULT else self.null
            if value is _REQUIRED:
                raise ValueError(f"{key} is {'null' if key in source else 'missing'}; accepted: {self.accepted}")
            return value
        if not self.check(given):
            raise ValueError(f"{key} is {quoted(given)}; accepted: {self.accepted}")
        return given


def read(format: str, source: Mapping[str, Any], fields: Mapping[str, Field], *, closed: bool = True) -> dict[str, Any]:
    """The value of every field. If `closed`, unknown keys that are set are warned about, or refused if they change the
    mathematics.

    Raises ValueError that lists every value that is not accepted.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    fields = {**fields, **_WEIGHTS} if closed else fields
    for key, field in fields.items():
        try:
            values[key] = field.read(source, key)
        except ValueError as error:
            problems.append(str(error))
    unknown = [k for k, v in source.items() if v and k not in fields and k not in _BOOKKEEPING] if closed else []
    unknown = [k for k in unknown if k not in TOKEN_IDS and not str(k).startswith("_")]
    for key in _MATHEMATICS.keys() & unknown:
        unknown.remove(key)
        neutral = _MATHEMATICS[key]
        if source[key] not in neutral:
            accepted = ", ".join(map(repr, neutral)) or "null or false"
            given = quoted(source[key])
            problems.append(f"{key} is {given}, which changes what the layers compute; accepted: {accepted}")
    refuse(format, problems)
    if unknown:
        listed = ", ".join(f"{key!r}: {quoted(source[key])}" for key in unknown)
        warnings.warn(f"{format}: unknown keys are ignored: {{{listed}}}", stacklevel=4)
    return values


# The dtype of transformers' weights, which is read from the weights.
_DTYPES = {name for dtype in get_args(Dtype) for name in (dtype, f"torch.{dtype}")}
_WEIGHTS = dict.fromkeys(
    ("dtype", "torch_dtype"),
    Field(", ".join(get_args(Dtype)), lambda x: str(x) in {*_DTYPES, "auto"}, None),
)


def token_ids(source: Mapping[str, Any], **defaults: int) -> dict[str, Any]:
    """bos, eos and pad of a transformers configuration, as ModelConfig has them."""
    return {name: token_id(name, source.get(name, defaults.get(name))) for name in TOKEN_IDS}


def head_width(value: Mapping[str, Any]) -> int:
    """The width of a head: as given, or the model's width over the number of heads."""
    return value["head_dim"] or value["hidden_size"] // value["num_attention_heads"]


def head_problems(value: Mapping[str, Any]) -> list[str]:
    """What is wrong with the number of heads where no width of a head is given: it has to divide the model's width."""
    width, heads = value["hidden_size"], value["num_attention_heads"]
    if value["head_dim"] is not None or width % heads == 0:
        return []
    return [f"num_attention_heads is {heads}; accepted: a divisor of hidden_size {width}"]


def refuse(format: str, problems: list[str]) -> None:
    """Raise ValueError if there are problems: features of one side that the other lacks."""
    if problems:
        raise ValueError(f"{format}: {'; '.join(problems)}")


def size(default: Any = _REQUIRED, *, least: int = 1, most: int = LARGEST, null: Any = _DEFAULT) -> Field:
    """An integer; never true or 2.0."""
    return Field(f"an integer from {least} to {most}", lambda x: is_integer(x, least, most), default, null)


def depth(default: int) -> Field:
    """The number of layers."""
    return size(default, most=MAX_LAYERS)


def number(default: Any, accepted: str, check: Callable[[float], bool], *, null: Any = _DEFAULT) -> Field:
    """A finite number with a further condition."""
    return Field(accepted, lambda x: is_number(x) and check(x), default, null)


def unit_interval(default: float) -> Field:
    """The eps of a norm, or a standard deviation of initial weights."""
    return number(default, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def at_least_zero(default: float) -> Field:
    return number(default, "a number of at least 0", lambda x: x >= 0)


def positive(default: Any) -> Field:
    return number(default, "a positive number", lambda x: x > 0)


def times(default: float, *, null: Any = _DEFAULT) -> Field:
    """A width as a multiple of another."""
    return number(default, f"a number above 0, at most {MOST_TIMES}", lambda x: 0 < x <= MOST_TIMES, null=null)


def rate(default: float) -> Field:
    """A rate of dropout."""
    return number(default, "0 <= rate < 1", lambda x: 0 <= x < 1)


def flag(default: bool) -> Field:
    """True or false. Null is neither: libraries take it for false, whatever their default."""
    return Field("true or false", lambda x: isinstance(x, bool), default, _REQUIRED if default else False)


def choice(default: Any, *accepted: str) -> Field:
    return Field(", ".join(accepted), lambda x: isinstance(x, str) and x in accepted, default)


def only(*accepted: Any) -> Field:
    """A feature that our models lack: the key is missing or has one of the values. Null is one only if it is listed."""
    words = ", ".join(map(repr, accepted))
    null = _DEFAULT if None in accepted else _REQUIRED
    return Field(words, lambda x: x in accepted, accepted[0], null)


def mapping() -> Field:
    return Field("an object, or null", lambda x: isinstance(x, Mapping), None)


def ignored(accepted: str, kind: type | tuple[type, ...]) -> Field:
    """A key without effect on outputs, or one that other keys imply."""
    return Field(accepted, lambda x: isinstance(x, kind), None)


def time_steps() -> Field:
    """The range of Mamba's time steps."""
    return Field("two numbers, the first at least 0 and at most the second", _is_range, (0.0, math.inf))


def time_step_bounds(given: Sequence[Any]) -> dict[str, Any]:
    """The fields of Mamba2Config for a value of `time_steps`."""
    lowest, highest = map(_maybe_infinite, given)
    return {"time_step_lowest": lowest, "time_step_highest": None if highest == math.inf else highest}


def _is_range(x: Any) -> bool:
    if not isinstance(x, (list, tuple)) or len(x) != 2:
        return False
    try:
        lowest, highest = map(_maybe_infinite, x)
    except (TypeError, ValueError, KeyError, OverflowError):
        return False
    return 0 <= lowest <= highest and lowest < math.inf


def _maybe_infinite(x: Any) -> float:
    """A number in a config.json; transformers 5 writes infinity as a mapping."""
    if isinstance(x, bool) or not isinstance(x, (int, float, Mapping)):
        raise TypeError(f"{x!r} is no number")
    return float(x["__float__"]) if isinstance(x, Mapping) else float(x)


def is_number(x: Any) -> bool:
    return (isinstance(x, float) and math.isfinite(x)) or is_integer(x, 1 - 2**53, 2**53 - 1)
