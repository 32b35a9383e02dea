"""Agreement of the forms of retention: whole models and the operator, compared with their parallel form in float64.

Every row is one way to compute the same numbers: a form, a chunk size, or prefill followed by decode. Models are
compared by their logits, the operator by its outputs and final state.

The limit follows from the dtype. The operator's error may reach `FLOOR`, the effect of another order of summation. A
model's parallel form may reach sqrt(eps), as its layers amplify rounding errors; every other way of running that model
may reach twice the error of its parallel form, or `FLOOR` if that is more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retnet.layers.retention import RetentionConfig
from retnet.models.lm import LanguageModel
from retnet.ops import reference
from retnet.ops.decay import paper_log_decay
from retnet.ops.dtypes import DTYPES, resolve_dtype, wide_dtype
from retnet.ops.retention import Mode, retention

FLOOR = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CHUNK_SIZES = (1, 16, 64, 100)
DECODE_BLOCK = 7  # tokens per call where several are decoded at a time; divides no other size here


@dataclass(frozen=True)
class Agreement:
    """One way to compute, compared with float64.

    max_difference: absolute. relative: norm(x - ref) / norm(ref). limit: the largest accepted `relative`.
    changed: positions, out of `tokens`, whose likeliest token differs; None for the operator, which predicts none.
    """

    way: str
    dtype: str
    max_difference: float
    relative: float
    limit: float
    changed: int | None = None
    tokens: int | None = None

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit  # False for nan


# A way to compute: its name, and a function that returns its results: logits, or outputs and final state.
Way = tuple[str, Callable[[], tuple[Tensor, ...]]]


def check_model(
    model: LanguageModel, ids: Tensor, dtypes: Sequence[str], chunk_sizes: Sequence[int] = CHUNK_SIZES
) -> Iterator[Agreement]:
    """Rows for a model on ids [B, T], T >= 2: per dtype the parallel form first, then every other way.

    The reference is the parallel form in float64 with the same weights rounded to the dtype.

    Raises ValueError for an unknown dtype or fewer than two tokens.
    """
    if ids.shape[1] < 2:
        raise ValueError(f"ids has shape {list(ids.shape)}; a prompt and a token after it need T >= 2")
    for name in dtypes:
        rounded = _in_form(model, _dtype(name), "parallel", None)
        expected = _logits(_in_form(rounded, torch.float64, "parallel", None), ids)
        rows = _compare(name, expected, _model_ways(rounded, ids, chunk_sizes))
        baseline = next(rows)
        yield replace(baseline, limit=math.sqrt(torch.finfo(DTYPES[name]).eps))
        for row in rows:
            yield replace(row, limit=max(2 * baseline.relative, row.limit))


def check_operator(
    shape: tuple[int, int, int, int, int],
    dtypes: Sequence[str],
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Iterator[Agreement]:
    """Rows for the operator on random q, k, v of shape (B, T, H, K, V): with the paper's decay, then per-token decay.

    The reference is `retnet.ops.reference.parallel` in float64 on the same rounded inputs.

    Raises ValueError for an unknown dtype or a shape that is not positive.
    """
    B, T, H, K, V = shape
    if min(shape) < 1 or T < 2:
        raise ValueError(f"shape (B, T, H, K, V) is {shape}; accepted: positive sizes, T >= 2")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, H, D, generator=generator, dtype=torch.float64) for D in (K, K, V))
    per_token = -(torch.rand(B, T, H, generator=generator, dtype=torch.float64) ** 4)
    for decay_name, log_decay in (("", paper_log_decay(H, dtype=torch.float64)), (", per token", per_token)):
        for name in dtypes:
            dtype = _dtype(name)
            wide = wide_dtype(dtype)
            inputs = [x.to(device, dtype) for x in (q, k, v)] + [log_decay.to(device, wide)]
            expected = reference.parallel(*(x.double() for x in inputs))
            ways = ((way + decay_name, run) for way, run in _operator_ways(inputs, chunk_sizes))
            yield from _compare(name, expected, ways)


def _compare(dtype: str, expected: tuple[Tensor, ...], ways: Iterator[Way]) -> Iterator[Agreement]:
    """One row per way, of its worst result. A single result is a model's logits, which predict tokens."""
    predicts = len(expected) == 1
    for way, run in ways:
        results = run()
        differences = [(got.double() - want).abs() for got, want in zip(results, expected, strict=True)]
        yield Agreement(
            way,
            dtype,
            max_difference=max(difference.max().item() for difference in differences),
            relative=max((d.norm() / want.norm()).item() for d, want in zip(differences, expected, strict=True)),
            limit=FLOOR[DTYPES[dtype]],
            changed=int((results[0].argmax(-1) != expected[0].argmax(-1)).sum()) if predicts else None,
            tokens=expected[0][..., 0].numel() if predicts else None,
        )


def _model_ways(model: LanguageModel, ids: Tensor, chunk_sizes: Sequence[int]) -> Iterator[Way]:
    T = ids.shape[1]
    dtype = model.embedding.weight.dtype
    yield "parallel", lambda: _logits(model, ids)
    recurrent = _in_form(model, dtype, "recurrent", None)
    yield "recurrent", lambda: _logits(recurrent, ids)
    for size in chunk_sizes:
        chunked = _in_form(model, dtype, "chunkwise", size)
        yield f"chunkwise, C = {size}", lambda chunked=chunked: _logits(chunked, ids)
    usual = _in_form(model, dtype, "auto", None)
    for split in sorted({1, T // 3, T - 1}):
        yield f"prefill {split}, decode by 1", lambda split=split: _decode(usual, ids, split, 1)
    yield f"prefill {T // 2}, decode by {DECODE_BLOCK}", lambda: _decode(usual, ids, T // 2, DECODE_BLOCK)


def _operator_ways(inputs: list[Tensor], chunk_sizes: Sequence[int]) -> Iterator[Way]:
    T = inputs[0].shape[1]

    def whole(mode: Mode, chunk_size: int | None = None) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: _retain(*inputs, mode=mode, chunk_size=chunk_size)

    yield "parallel", whole("parallel")
    yield "recurrent", whole("recurrent")
    for size in chunk_sizes:
        yield f"chunkwise, C = {size}", whole("chunkwise", size)
    for split in sorted({1, T // 3, T - 1}):
        yield f"{split} tokens, then {T - split}", lambda split=split: _in_two(inputs, split)


@torch.inference_mode()
def _logits(model: LanguageModel, ids: Tensor) -> tuple[Tensor]:
    return (model(ids).logits,)


@torch.inference_mode()
def _decode(model: LanguageModel, ids: Tensor, split: int, block: int) -> tuple[Tensor]:
    """Logits [B, T, vocab]: prefill of `split` tokens, then decode of the others, `block` tokens per call."""
    output = model(ids[:, :split], carry=True)
    logits, state = [output.logits], output.state
    for piece in ids[:, split:].split(block, 1):
        output = model(piece, state, carry=True, in_place=True)
        logits.append(output.logits)
        state = output.state
    return (torch.cat(logits, 1),)


def _in_two(inputs: list[Tensor], split: int) -> tuple[Tensor, Tensor]:
    """Outputs and final state of two calls: the first `split` tokens, then the others from their state."""
    q, k, v, log_decay = inputs

    def part(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        decay = log_decay if log_decay.dim() == 1 else log_decay[:, tokens]
        return _retain(q[:, tokens], k[:, tokens], v[:, tokens], decay, state=state)

    first, state = part(slice(None, split), None)
    rest, state = part(slice(split, None), state)
    return torch.cat([first, rest], 1), state


def _retain(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, state = retention(*inputs, **options)
    assert state is not None  # return_state is True by default
    return out, state


def _in_form(model: LanguageModel, dtype: torch.dtype, mode: Mode, chunk_size: int | None) -> LanguageModel:
    """The same model in a dtype, with every retention layer in one form; weights of that dtype are shared."""
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, mode=mode, chunk_size=chunk_size))
        if isinstance(layer.mixer, RetentionConfig)
        else layer
        for layer in model.config.layers
    )
    with torch.device("meta"):
        other = LanguageModel(replace(model.config, layers=layers))
    other.load_state_dict({name: x.to(dtype) for name, x in model.state_dict().items()}, assign=True)
    if model.config.tie_embeddings:
        other.head.weight = other.embedding.weight
    return other.eval()


def _dtype(name: str) -> torch.dtype:
    dtype = resolve_dtype(name)
    assert dtype is not None  # a name was given
    return dtype
