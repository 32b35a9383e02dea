"""Layers split by heads: which part of each weight a process holds, and where the processes' results are added.

A split layer is the same layer with fewer heads: its configuration, weights and states are those of its own heads, and
its output projection adds the outputs of all processes. Where one product is several maps (Mamba-2's projection, the
short convolution of q, k and v), each process has its heads of every map.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.ops.tensor_shard import TensorShard


class Part(NamedTuple):
    """`size` places of a weight or a state, which the processes divide among them, or hold all of."""

    size: int
    divided: bool = True


class Split(NamedTuple):
    """The parts of a tensor, one after another along dimension `dim`."""

    dim: int
    parts: tuple[Part, ...]

    def take(self, x: Tensor, shard: TensorShard) -> Tensor:
        """This process's share of the whole tensor, in memory of its own."""
        pieces = x.split([part.size for part in self.parts], self.dim)
        own = [
            piece.chunk(shard.size, self.dim)[shard.rank] if part.divided else piece
            for piece, part in zip(pieces, self.parts, strict=True)
        ]
        return torch.cat(own, self.dim).clone(memory_format=torch.contiguous_format)

    def join(self, x: Tensor, shard: TensorShard) -> Tensor:
        """The inverse of `take`; all processes call it."""
        own = [part.size // shard.size if part.divided else part.size for part in self.parts]
        shares = [share.split(own, self.dim) for share in shard.all_gather(x).unbind()]
        pieces = [
            torch.cat(found, self.dim) if part.divided else found[0]
            for found, part in zip(zip(*shares, strict=True), self.parts, strict=True)
        ]
        return torch.cat(pieces, self.dim)

    def held(self, shard: TensorShard) -> list[slice]:
        """The places of a share along `dim` that all processes hold."""
        places, begin = [], 0
        for part in self.parts:
            end = begin + (part.size // shard.size if part.divided else part.size)
            if not part.divided:
                places.append(slice(begin, end))
            begin = end
        return places


Splits = Mapping[str, Split]


def by_rows(name: str, *parts: Part) -> dict[str, Split]:
    """The splits of a linear map (or a convolution) by outputs: its weight [out, ...] and its bias."""
    return {f"{name}.weight": Split(0, parts), f"{name}.bias": Split(0, parts)}


def by_columns(name: str, size: int) -> dict[str, Split]:
    """The split of an output projection by inputs; its bias is added once, to the sum."""
    return {f"{name}.weight": Split(1, (Part(size),))}


def per_process(name: str, count: int, size: int, *, or_one: bool = False) -> int:
    """`count` heads or channels divided by `size` processes; with `or_one` a single one is held by all of them.

    Raises ValueError where they do not divide.
    """
    if or_one and count == 1:
        return 1
    if count % size:
        accepted = f"a multiple of {size}" + (", or 1" if or_one else "")
        raise ValueError(f"{name} is {count} on {size} processes; accepted: {accepted}")
    return count // size


class OutputLinear(nn.Linear):
    """An output projection split by its inputs: x [..., in / size] -> the sum over the processes [..., out]."""

    shard: TensorShard

    def forward(self, input: Tensor) -> Tensor:
        out = self.shard.total(F.linear(input, self.weight))
        return out if self.bias is None else out + self.bias


class TensorParallel(nn.Module):
    """Base of modules that are split by heads or channels. shard: None as long as the module is whole."""

    shard: TensorShard | None = None
    split_by: Splits = MappingProxyType({})  # of the weights of a split module
    states_split_by: Splits = MappingProxyType({})

    def splits(self) -> Splits:
        """How the weights of the whole module are split, by name; every process holds the others whole."""
        raise NotImplementedError

    def state_splits(self) -> Splits:
        """How the fields of the whole module's states are split."""
        return {}

    def split_(self, shard: TensorShard) -> None:
        """Keep this process's share of the weights, which are equal on all processes before.

        Raises ValueError for projections that are not plain linear layers, such as adapters and quantised ones.
        """
        if self.shard is not None:
            raise ValueError(f"the module is {self.shard} already; accepted: a whole module")
        found = {name: split for name, split in self.splits().items() if owned(self, name) is not None}
        owners = {name: self.get_submodule(name.rpartition(".")[0]) for name in found}
        for name, owner in owners.items():
            check_plain(owner, name)
        for name, split in found.items():
            keep_share_(owners[name], name.rpartition(".")[2], split, shard)
        self.shard, self.split_by, self.states_split_by = shard, found, self.state_splits()
        self._summed: dict[str, ref] = {}

    def entered(self, x: Tensor) -> Tensor:
        """The module's input, whose gradient is the sum of those of all processes."""
        if self.shard is None:
            return x
        if torch.is_grad_enabled():
            self._sum_gradients_of_held_weights()
        return self.shard.share(x)

    def _sum_gradients_of_held_weights(self) -> None:
        """Let gradients of weights that all processes hold, but use for their own heads, be those of all heads.

        By a hook on the parameter, set anew where a copy or a loader has put another one in its place.
        """
        for name, split in self.split_by.items():
            weight, shard = owned(self, name), cast(TensorShard, self.shard)
            places = split.held(shard)
            if weight is None or not places or not weight.requires_grad:
                continue
            if name not in self._summed or self._summed[name]() is not weight:
                weight.register_hook(_SumOfHeld(split.dim, places, shard))
                self._summed[name] = ref(weight)


class _SumOfHeld:
    """A gradient with its places [begin, end) along `dim` summed over the processes."""

    def __init__(self, dim: int, places: list[slice], shard: TensorShard):
        self.dim, self.places, self.shard = dim, places, shard

    def __call__(self, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        for place in self.places:
            part = grad.narrow(self.dim, place.start, place.stop - place.start)
            part.copy_(self.shard.sum_(part.contiguous()))
        return grad


def check_plain(owner: nn.Module, name: str) -> None:
    """Raise ValueError unless a parameter is a plain tensor of a plain layer."""
    kind, weight = type(owner), owner.get_parameter(name.rpartition(".")[2])
    if isinstance(owner, nn.Linear) and not kind.__module__.startswith(("torch.nn.", "retnet.")):
        raise ValueError(f"{name} is of a {kind.__name__}; accepted: a plain linear layer, before adapters are added")
    if type(weight.data) is not Tensor:
        raise ValueError(
            f"{name} is a {type(weight.data).__name__}; accepted: a plain tensor, neither quantised nor sharded"
        )


def keep_share_(owner: nn.Module, attribute: str, split: Split, shard: TensorShard) -> None:
    """Replace a parameter by this process's share of it; one that was loaded as a share stays."""
    parameter = cast(nn.Parameter, getattr(owner, attribute))
    if parameter.shape[split.dim] == sum(part.size for part in split.parts):
        parameter.grad = None
        parameter.data = split.take(parameter.data, shard)
    if isinstance(owner, nn.Linear) and attribute == "weight":
        owner.out_features, owner.in_features = owner.weight.shape
        if split.dim == 1 and type(owner) is nn.Linear:
            become_(owner, OutputLinear, shard)


def become_(module: nn.Module, kind: type[nn.Module], shard: TensorShard) -> None:
    """Make a module one of `kind`, a subclass of its class that differs by its `forward` and the shard.

    The object stays, and with it its parameters, its hooks and whoever refers to it; a new module would lose them.
    """
    module.__class__ = kind
    module.shard = shard  # type: ignore[assignment]


def owned(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name; None where the module has none, or no such submodule."""
    path, _, attribute = name.rpartition(".")
    owner: Any = module
    for child in filter(None, path.split(".")):
        owner = getattr(owner, child, None)
    return getattr(owner, attribute, None)
