"""Formats of other libraries, read by one rule: each tensor is used exactly once, in its own shape.

A format is a table from our parameter names to theirs, and a function from their configuration to ours. Differences of
convention (rotary frequencies, which half of a GLU takes the activation, norms, decay) are values of our configuration.
So tensors are copied unchanged: a table only renames them, cuts a fused tensor into its parts, joins parts that are one
tensor here, and stacks the tensors of experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, get_args

import torch
from torch import Tensor

from retnet.models.config import Dtype, ModelConfig
from retnet.models.directory import build_empty, dtype_of, size_problems, stored_tensors
from retnet.models.tensor_files import Tensors

_LAYER = re.compile(r"^layers\.(\d+)\.")
_THEIR_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")
_TIED = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class Part:
    """One of our tensors in the fused tensor `name`: part `index` of its dimension `dim`.

    of: the number of equal parts, or the size of each. groups: equal runs of the dimension that each have all the
    parts, such as heads. flat: theirs is ours without its division into dimensions.
    """

    name: str
    index: int = 0
    of: int | tuple[int, ...] = 1
    dim: int = 0
    groups: int = 1
    flat: bool = False

    @property
    def count(self) -> int:
        """Parts of the fused tensor."""
        return self.of if isinstance(self.of, int) else len(self.of)


# Our name ({} is the layer) -> theirs. Of several alternatives, the first that exists in the right shape is taken.
# A name with [] stands for tensors numbered from 0 in its place, one per expert: they are stacked in a new first
# dimension.
Entry = str | Part | tuple[str | Part, ...]
Table = Mapping[str, Entry]
# The table's name of a joined tensor -> the names of its parts and the rows of each, in order.
Joined = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Format:
    """A format of another library.

    names: the table for a configuration of ours.
    config_of: their configuration -> ours; raises ValueError for features that our models lack.
    marker: a tensor that only this format has. embedding: the tensor with one row per token of the vocabulary.
    joined: their tensors that are one of ours together, for a configuration of ours; None: there are none.
    effective: a configuration read from theirs, without the features that have no tensors; None: it is taken as it is.
    model_types: of configurations of transformers in this format, which tell it before the marker does.
    prefix: a prefix that complete checkpoints may put before every name.
    settle: reads the tensors that are not parameters; returns the configuration completed from them, and their names.
    config_to: our configuration -> theirs; raises ValueError for features that their models lack. None: only read.
    """

    name: str
    names: Callable[[ModelConfig], Table]
    config_of: Callable[[Mapping[str, Any]], ModelConfig]
    marker: str
    embedding: str
    joined: Callable[[ModelConfig], Joined] | None = None
    effective: Callable[[ModelConfig, Tensors], ModelConfig] | None = None
    model_types: tuple[str, ...] = ()
    prefix: str = ""
    settle: Callable[[ModelConfig, Tensors], tuple[ModelConfig, set[str]]] | None = None
    config_to: Callable[[ModelConfig], dict[str, Any]] | None = None


def in_our_names(format: Format, config: ModelConfig, theirs: Tensors) -> tuple[ModelConfig, Tensors]:
    """Their tensors under our names, and the configuration completed from the tensors (dtype, decays).

    Raises ValueError that lists the tensors that are missing, left over, used twice, of the wrong shape, or not
    floating point.
    """
    table = format.names(config)
    embedding = [part.name for part in _alternatives(_TIED[0], table)]
    embedding = next((name for name in embedding if name in theirs.specs), embedding[0])
    held_layers = {int(n) for name in theirs.specs for n in _THEIR_LAYER.findall(name)}
    problems = size_problems(config, embedding, theirs.specs.get(embedding), held_layers)
    if problems:
        raise ValueError(
            f"these are not the weights of the configuration, read as {format.name}: {'; '.join(problems)}"
        )
    theirs = _join(theirs, format.joined(config) if format.joined else {}, held_layers)
    theirs = _stack(theirs, table)
    config, consumed = format.settle(config, theirs) if format.settle else (config, set())
    wanted = stored_tensors(build_empty(config))
    consumed |= _tied_head(config, table, theirs)
    sources: dict[str, Part] = {}
    for name, spec in wanted.items():
        source, problem = _source(name, spec, table, theirs.specs)
        if source is not None:
            sources[name] = source
        if problem:
            problems.append(problem)
    problems += _accounting(sources.values(), theirs.specs, consumed)
    problems += [
        f"{part.name} is {theirs.specs[part.name].dtype}, not a floating-point dtype"
        for part in sources.values()
        if str(theirs.specs[part.name].dtype).removeprefix("torch.") not in get_args(Dtype)
    ]
    problems += [
        f"{part.name} is {theirs.specs[part.name].layout}, not a dense tensor"
        for part in sources.values()
        if theirs.specs[part.name].layout is not torch.strided
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"these are not the weights of the configuration, read as {format.name}: {shown}")
    specs = {name: wanted[name].to(theirs.specs[part.name].dtype) for name, part in sources.items()}
    tensors = Tensors(specs, lambda name: _cut(theirs.read(sources[name].name), sources[name], wanted[name].shape))
    return replace(config, dtype=dtype_of(specs)), tensors


def in_their_names(format: Format, config: ModelConfig, ours: Tensors) -> Tensors:
    """Our tensors under their names. Of several alternatives in the table, the first is written."""
    table = format.names(config)
    names: dict[str, str] = {}
    for name in ours.specs:
        entry = _alternatives(name, table)[0]
        names[entry.name] = name
    return ours.renamed(names)


def _join(theirs: Tensors, joined: Joined, layers: Collection[int]) -> Tensors:
    """Their tensors, with each complete group of `joined` under one name. Other groups stay as they are."""
    groups: dict[str, list[str]] = {}
    specs = dict(theirs.specs)
    for name, rows in joined.items():
        for layer in layers:
            whole, group = name.format(layer), {part.format(layer): count for part, count in rows.items()}
            held = [specs[part] for part, count in group.items() if part in specs and specs[part].shape[:1] == (count,)]
            kinds = {(x.dtype, x.layout, x.shape[1:]) for x in held}
            if len(held) < len(group) or len(kinds) != 1 or held[0].layout is not torch.strided or whole in specs:
                continue
            groups[whole] = list(group)
            for part in group:
                del specs[part]
            specs[whole] = held[0].new_empty(sum(group.values()), *held[0].shape[1:])
    if not groups:
        return theirs

    def read(name: str) -> Tensor:
        return torch.cat([theirs.read(part) for part in groups[name]]) if name in groups else theirs.read(name)

    return Tensors(specs, read, theirs.extra)


def _stack(theirs: Tensors, table: Table) -> Tensors:
    """Their tensors, with those of a layer's experts under one name, in a dtype that holds them all.

    Incomplete sets stay as they are.
    """
    entries = [e for entry in table.values() for e in (entry if isinstance(entry, tuple) else (entry,))]
    wanted = {name for e in entries if "[]" in (name := e if isinstance(e, str) else e.name)}
    if not wanted:
        return theirs
    groups: dict[str, dict[int, str]] = {}
    patterns = [re.compile(_numbered(name)) for name in wanted]
    for name in theirs.specs:
        for found in filter(None, (pattern.fullmatch(name) for pattern in patterns)):
            start, end = found.span("expert")
            groups.setdefault(f"{name[:start]}[]{name[end:]}", {})[int(found["expert"])] = name
    specs, stacks = dict(theirs.specs), {}
    for whole, group in groups.items():
        held = [specs[group[i]] for i in range(len(group)) if i in group]
        kinds = {(x.is_floating_point(), x.layout, x.shape) for x in held}
        if len(held) < len(group) or len(kinds) != 1 or held[0].layout is not torch.strided or whole in specs:
            continue
        stacks[whole] = [group[i] for i in range(len(group))]
        for part in stacks[whole]:
            del specs[part]
        dtype = reduce(torch.promote_types, (x.dtype for x in held))
        specs[whole] = held[0].new_empty(len(held), *held[0].shape, dtype=dtype)

    def read(name: str) -> Tensor:
        if name not in stacks:
            return theirs.read(name)
        first = theirs.read(stacks[name][0])
        whole = first.new_empty(len(stacks[name]), *first.shape, dtype=specs[name].dtype)
        for i, part in enumerate(stacks[name]):
            whole[i] = first if i == 0 else theirs.read(part)
        return whole

    return Tensors(specs, read, theirs.extra)


def _numbered(name: str) -> str:
    """The pattern of a table's name, with a group for the number of an expert."""
    return re.escape(name).replace(r"\{\}", r"(?:0|[1-9]\d{0,8})").replace(r"\[\]", r"(?P<expert>0|[1-9]\d{0,8})")


def _alternatives(name: str, table: Table) -> list[Part]:
    """The table's entries for our parameter `name`, with the layer's number. A whole tensor is part 0 of 1."""
    layer = _LAYER.match(name)
    entry = table.get(_LAYER.sub("layers.{}.", name))
    if entry is None:
        return []
    number = layer.group(1) if layer else ""
    parts = (Part(e, 0, 1) if isinstance(e, str) else e for e in (entry if isinstance(entry, tuple) else (entry,)))
    return [replace(part, name=part.name.format(number)) for part in parts]


def _source(name: str, spec: Tensor, table: Table, held: Mapping[str, Tensor]) -> tuple[Part | None, str | None]:
    """The source of our parameter, and the problem with it, if any."""
    parts = _alternatives(name, table)
    if not parts:
        return None, f"{name} has no counterpart"
    there = [part for part in parts if part.name in held]
    if not there:
        return None, f"{parts[0].name} is missing"
    for part in there:
        if list(held[part.name].shape) == _fused_shape(spec, part):
            return part, None
    wanted = _fused_shape(spec, there[0])
    return there[0], f"{there[0].name} has shape {list(held[there[0].name].shape)}, not {wanted}"


def _fused_shape(spec: Tensor, part: Part) -> list[int]:
    """The shape of the tensor that our parameter is a part of."""
    if part.flat:
        return [spec.numel()]
    shape = list(spec.shape)
    if isinstance(part.of, int):
        shape[part.dim] *= part.of
    else:
        shape[part.dim] += part.groups * (sum(part.of) - part.of[part.index])
    return shape


def _accounting(parts: Collection[Part], held: Mapping[str, Tensor], consumed: set[str]) -> list[str]:
    """Tensors that are not used exactly once."""
    uses = Counter((part.name, part.index) for part in parts)
    shares = {part.name: part.count for part in parts}
    problems = [f"{name} is left over" for name in sorted(held.keys() - shares.keys() - consumed)]
    for name, of in shares.items():
        counts = [uses[name, index] for index in range(of)]
        if max(counts) > 1 or min(counts) < 1 or name in consumed:
            problems.append(f"{name} is not used exactly once")
    return problems


def _tied_head(config: ModelConfig, table: Table, theirs: Tensors) -> set[str]:
    """The names under which a tied model also stores its head. Raises ValueError if it differs from the embedding."""
    if not config.tie_embeddings:
        return set()
    embedding, heads = ([p.name for p in _alternatives(name, table) if p.name in theirs.specs] for name in _TIED)
    heads = [name for name in heads if name not in embedding]
    for head in heads:
        if embedding and not torch.equal(theirs.read(embedding[0]), theirs.read(head)):
            raise ValueError(f"the configuration ties {head} to {embedding[0]}, but they differ")
    return set(heads)


def _cut(x: Tensor, part: Part, shape: torch.Size) -> Tensor:
    """Our tensor of this shape, from the whole one."""
    if part.flat:
        return x.view(shape)
    if part.count == 1:
        return x
    grouped = x.unflatten(part.dim, (part.groups, -1))
    dim = part.dim + 1
    pieces = grouped.chunk(part.of, dim) if isinstance(part.of, int) else grouped.split(part.of, dim)
    return pieces[part.index].flatten(part.dim, dim).clone(memory_format=torch.contiguous_format)
