"""Formats of other libraries, and the rule of reading them: each tensor is used exactly once, in its shape.

A format is a table from our parameter names to theirs, and a function from their configuration to ours. All that tells
two conventions apart (rotary frequencies, which half of a GLU takes the activation, norms, decay) is a value of our
configuration, so that tensors are copied as they are; a table only renames, and cuts a fused tensor into its parts.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from retnet.models.config import ModelConfig
from retnet.models.directory import build_empty, stored_tensors
from retnet.models.tensor_files import Tensors

_LAYER = re.compile(r"^layers\.(\d+)\.")
_TIED = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class Part:
    """The `index`-th of `of` equal parts of the rows of tensor `name`, which stores several of our matrices."""

    name: str
    index: int
    of: int


# Our name ({} is the layer) -> theirs, or alternatives of which the first that is there in the right shape is taken.
Entry = str | Part | tuple[str | Part, ...]
Table = Mapping[str, Entry]


@dataclass(frozen=True)
class Format:
    """names: the table for a model of ours. config_of: their configuration -> ours, ValueError for what we lack.

    marker: a tensor that this format alone has. embedding: the one whose rows are the vocabulary.
    prefix: what whole checkpoints may put before every name.
    settle: reads the tensors that are no parameters; returns the configuration as they have it, and their names.
    config_to: our configuration -> theirs, ValueError naming what they lack; None where we only read.
    """

    name: str
    names: Callable[[ModelConfig], Table]
    config_of: Callable[[Mapping[str, Any]], ModelConfig]
    marker: str
    embedding: str
    prefix: str = ""
    settle: Callable[[ModelConfig, Tensors], tuple[ModelConfig, set[str]]] | None = None
    config_to: Callable[[ModelConfig], dict[str, Any]] | None = None


def in_our_names(format: Format, config: ModelConfig, theirs: Tensors) -> tuple[ModelConfig, Tensors]:
    """Their tensors under our names, and the configuration with what the tensors alone tell: dtype, decays.

    Raises ValueError that lists tensors missing, left over, used twice, misshapen or of a dtype that is not a float.
    """
    config, consumed = format.settle(config, theirs) if format.settle else (config, set())
    wanted, table = stored_tensors(build_empty(config)), format.names(config)
    consumed |= _tied_head(config, table, theirs)
    sources: dict[str, Part] = {}
    problems: list[str] = []
    for name, spec in wanted.items():
        source, problem = _source(name, spec, table, theirs.specs)
        if source is not None:
            sources[name] = source
        if problem:
            problems.append(problem)
    problems += _accounting(sources.values(), theirs.specs, consumed)
    problems += [
        f"{part.name} is {theirs.specs[part.name].dtype}, no floating-point dtype"
        for part in sources.values()
        if not theirs.specs[part.name].is_floating_point()
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"these are not the weights of the configuration, read as {format.name}: {shown}")
    held = [theirs.specs[part.name].dtype for part in sources.values()]
    config = replace(config, dtype=str(reduce(torch.promote_types, held)).removeprefix("torch."))
    return config, Tensors(
        {name: wanted[name].to(theirs.specs[part.name].dtype) for name, part in sources.items()},
        lambda name: _cut(theirs.read(sources[name].name), sources[name]),
    )


def in_their_names(format: Format, config: ModelConfig, ours: Tensors) -> Tensors:
    """Our tensors under their names, the first alternatives of the table."""
    table = format.names(config)
    names: dict[str, str] = {}
    for name in ours.specs:
        entry = _alternatives(name, table)[0]
        names[entry.name] = name
    return ours.renamed(names)


def refuse(format: str, problems: list[str]) -> None:
    """Raise ValueError if there are problems: features of one side that the other lacks."""
    if problems:
        raise ValueError(f"{format}: {'; '.join(problems)}")


def unsupported(source: Mapping[str, Any], accepted: Mapping[str, Any]) -> list[str]:
    """A line for each key whose value is not the accepted one; a missing key has it."""
    return [
        f"{key} is {source[key]!r}; accepted: {value!r}"
        for key, value in accepted.items()
        if key in source and source[key] != value
    ]


def warn_unknown(format: str, source: Mapping[str, Any], known: Collection[str]) -> None:
    """Warn of keys that the reader of `format` has never heard of and that are set: they may change the model."""
    unknown = {
        k: v for k, v in source.items() if k not in known and k not in _BOOKKEEPING and not k.startswith("_") and v
    }
    if unknown:
        warnings.warn(f"{format}: not understood and left out: {unknown}", stacklevel=2)


# Keys that transformers writes into any config.json and that change no output.
_BOOKKEEPING = {
    "architectures", "auto_map", "dtype", "id2label", "is_decoder", "label2id", "model_type", "return_dict",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def token_ids(source: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos and pad of a transformers configuration; of several ends of text, the first; negative means none."""
    ids: dict[str, int | None] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = source.get(key)
        value = value[0] if isinstance(value, list) and value else value
        ids[key] = value if isinstance(value, int) and value >= 0 else None
    return ids


def _alternatives(name: str, table: Table) -> list[Part]:
    """What the table says of our parameter `name`, with its layer's number put in; whole tensors are parts 0 of 1."""
    layer = _LAYER.match(name)
    entry = table.get(_LAYER.sub("layers.{}.", name))
    if entry is None:
        return []
    number = layer.group(1) if layer else ""
    parts = (Part(e, 0, 1) if isinstance(e, str) else e for e in (entry if isinstance(entry, tuple) else (entry,)))
    return [replace(part, name=part.name.format(number)) for part in parts]


def _source(name: str, spec: Tensor, table: Table, held: Mapping[str, Tensor]) -> tuple[Part | None, str | None]:
    """Where our parameter comes from, and what is wrong with that."""
    parts = _alternatives(name, table)
    if not parts:
        return None, f"{name} has no counterpart"
    there = [part for part in parts if part.name in held]
    if not there:
        return None, f"{parts[0].name} is missing"
    for part in there:
        rows, *rest = held[part.name].shape or (0,)
        if rows == spec.shape[0] * part.of and tuple(rest) == tuple(spec.shape[1:]):
            return part, None
    wanted = [spec.shape[0] * there[0].of, *spec.shape[1:]]
    return there[0], f"{there[0].name} has shape {list(held[there[0].name].shape)}, not {wanted}"


def _accounting(parts: Collection[Part], held: Mapping[str, Tensor], consumed: set[str]) -> list[str]:
    """Tensors that are not used exactly once."""
    uses = Counter((part.name, part.index) for part in parts)
    shares = {part.name: part.of for part in parts}
    problems = [f"{name} is left over" for name in sorted(held.keys() - shares.keys() - consumed)]
    for name, of in shares.items():
        counts = [uses[name, index] for index in range(of)]
        if max(counts) > 1 or min(counts) < 1 or name in consumed:
            problems.append(f"{name} is not used exactly once")
    return problems


def _tied_head(config: ModelConfig, table: Table, theirs: Tensors) -> set[str]:
    """The names under which a tied model may hold its head beside its embedding, if they are one."""
    if not config.tie_embeddings:
        return set()
    embedding, heads = ([p.name for p in _alternatives(name, table) if p.name in theirs.specs] for name in _TIED)
    heads = [name for name in heads if name not in embedding]
    for head in heads:
        if embedding and not torch.equal(theirs.read(embedding[0]), theirs.read(head)):
            raise ValueError(f"the configuration ties {head} to {embedding[0]}, but they differ")
    return set(heads)


def _cut(x: Tensor, part: Part) -> Tensor:
    return x if part.of == 1 else x.chunk(part.of)[part.index].clone()
