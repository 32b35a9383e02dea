"""The mixers of a student, from a stack file: its schedule, and the keys of its retnet mixers that the file sets.

Sizes, attention, feed-forward, norms and embedding are the teacher's. A size or attention that the file gives
differently is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.stack.layers import Layer
from retnet.stack.load import Stack
from retnet.system.checks import quoted
from retnet.train.distil.student import retention_of

Mixers = list[RetentionConfig | None]

# Keys of a retnet mixer that set a field of RetentionConfig of another name.
_FIELDS = {"rope": "rotary", "chunkwise": "mode"}
_NOT_COMPARED = ("kind", "dropout", "qk_norm_eps")


def all_retention(teacher: ModelConfig) -> Mixers:
    """Retention as `student.DEFAULTS` has it in place of every attention layer."""
    return [
        retention_of(layer.mixer, {}) if isinstance(layer.mixer, AttentionConfig) else None for layer in teacher.layers
    ]


def stack_mixers(teacher: ModelConfig, stack: Stack) -> Mixers:
    """By layer: the retention of a retnet layer, None where the teacher's mixer stays.

    Raises ValueError for a stack that is not of the teacher's sizes, and for other mixers than retnet and attention.
    """
    problems = list(_other_sizes(teacher, stack))
    if problems:
        raise ValueError(f"{stack.origin or 'the stack'} is not of the teacher's sizes: {'; '.join(problems)}")
    mixers: Mixers = []
    for layer, taught in zip(stack.layers, teacher.layers, strict=True):
        try:
            if layer.residual.hyper is not None and taught.hyper is None:
                raise ValueError("its residual is hyper_connection; accepted: the teacher's, so leave it out")
            mixers.append(_mixer(layer, taught.mixer, stack))
        except ValueError as error:
            raise ValueError(f"{stack.origin or 'the stack'}, layer {layer.index}: {error}") from error
    if not any(mixers):
        raise ValueError(f"{stack.origin or 'the stack'} has no retnet layer; accepted: at least one")
    return mixers


def retention_everywhere(teacher: ModelConfig, mixers: Sequence[RetentionConfig | None], stack: Stack) -> Mixers:
    """The mixers, with the stack's first retention in place of the attention that it keeps."""
    first = next(layer for layer in stack.layers if layer.mixer_type == "retnet")
    given = _given(first, stack)
    return [
        retention_of(layer.mixer, given) if mixer is None and isinstance(layer.mixer, AttentionConfig) else mixer
        for layer, mixer in zip(teacher.layers, mixers, strict=True)
    ]


def _mixer(layer: Layer, taught: Any, stack: Stack) -> RetentionConfig | None:
    if layer.mixer_type not in ("retnet", "attention"):
        raise ValueError(f"its mixer is {layer.mixer_type}; accepted: retnet, attention")
    if not isinstance(taught, AttentionConfig):
        raise ValueError(f"the teacher's mixer is {taught.kind}; accepted: a teacher with attention there")
    if layer.mixer_type == "retnet":
        return retention_of(taught, _given(layer, stack))
    asked = layer.mixer.config(stack.spec)
    for field in fields(AttentionConfig):
        value, default = getattr(asked, field.name), None if field.default is MISSING else field.default
        was = getattr(taught, field.name)
        if field.name in _NOT_COMPARED or field.name.startswith("rotary") or value in (default, was):
            continue
        raise ValueError(f"{field.name} of attention is {quoted(value)} and the teacher's is {quoted(was)}")
    return None


def _given(layer: Layer, stack: Stack) -> dict[str, Any]:
    """The fields of RetentionConfig that the file sets in this layer."""
    config = layer.mixer.config(stack.spec)
    names = {_FIELDS.get(key, key) for key in layer.mixer.model_fields_set}
    return {field.name: getattr(config, field.name) for field in fields(RetentionConfig) if field.name in names}


def _other_sizes(teacher: ModelConfig, stack: Stack) -> Iterator[str]:
    """The sizes that the file gives and the teacher does not have."""
    model, first = stack.spec.model, teacher.layers[0].mixer
    sizes = [
        ("the schedule's layers", len(stack.layers), len(teacher.layers)),
        ("d_model", model.d_model, teacher.d_model),
        ("vocab_size", model.vocab_size, teacher.vocab_size),
    ]
    if isinstance(first, AttentionConfig):
        sizes.append(("n_heads", model.n_heads, first.num_heads))
        if model.n_kv_heads is not None:
            sizes.append(("n_kv_heads", model.n_kv_heads, first.num_kv_heads))
    for name, given, taught in sizes:
        if given != taught:
            yield f"{name} {given}, the teacher's {taught}"
