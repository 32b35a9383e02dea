"""The state of a whole model: one typed state per layer, saved and loaded as safetensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retnet.layers.draft import Draft
from retnet.layers.mixers import MIXERS, kind_of
from retnet.layers.state import LayerState


@dataclass
class ModelDraft:
    """The draft updates of all layers for T tokens of each sequence."""

    layers: tuple[Draft, ...]

    @property
    def nbytes(self) -> int:
        return sum(draft.nbytes for draft in self.layers)

    def accept_(self, state: "ModelState", counts: Tensor) -> None:
        """Write the first counts[b] tokens of each sequence b into the state before them, in place."""
        for draft, layer in zip(self.layers, state.layers, strict=True):
            draft.accept_(layer, counts)


@dataclass
class ModelState:
    """The states of all layers, for N sequences."""

    layers: tuple[LayerState, ...]

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.layers)

    @property
    def position(self) -> Tensor:
        """Real tokens seen by each sequence, [N]."""
        return self.layers[0].position

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def is_finite(self) -> bool:
        """Whether no tensor holds NaN or infinity. Reads them all."""
        return all(bool(x.isfinite().all()) for layer in self.layers for x in layer.tensors().values())

    def select(self, index: Tensor) -> "ModelState":
        """The states of sequences `index` [M], in that order, repetitions allowed (beams, forks)."""
        return ModelState(tuple(layer.select(index) for layer in self.layers))

    def repeat(self, times: int) -> "ModelState":
        """Every sequence `times` times in a row."""
        return ModelState(tuple(layer.repeat(times) for layer in self.layers))

    def clone(self) -> "ModelState":
        """A copy to roll back to, which later in-place updates do not change."""
        return ModelState(tuple(layer.clone() for layer in self.layers))

    def to(self, device: torch.device | str) -> "ModelState":
        return ModelState(tuple(layer.to(device) for layer in self.layers))

    def slot(self, index: int) -> "ModelState":
        """The state of one sequence as a view: in-place updates of it change this state."""
        return ModelState(tuple(layer.slot(index) for layer in self.layers))

    def write_(self, index: int, state: "ModelState") -> None:
        """Overwrite sequence `index` with the state of one sequence, whatever was there before."""
        for mine, other in zip(self.layers, state.layers, strict=True):
            mine.write_(index, other)

    def clear_(self, index: int) -> None:
        """Reset sequence `index` to the state before its first token."""
        for layer in self.layers:
            layer.clear_(index)

    def trim(self) -> "ModelState":
        """The state without unused capacity, to keep or to store."""
        return ModelState(tuple(layer.trim() for layer in self.layers))

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, "<layer>.<kind>.<field>", as `from_named` reads them."""
        return {
            f"{i}.{kind_of(layer)}.{name}": x
            for i, layer in enumerate(self.layers)
            for name, x in layer.tensors().items()
        }

    @classmethod
    def from_named(cls, tensors: dict[str, Tensor]) -> "ModelState":
        """The inverse of `named_tensors`. Raises ValueError for names that it did not make."""
        parts: dict[int, dict[str, Tensor]] = {}
        kinds: dict[int, str] = {}
        for key, x in tensors.items():
            index, kind, name = key.split(".") if key.count(".") == 2 else ("", "", "")
            if not index.isdecimal() or kind not in MIXERS:
                raise ValueError(f"{key!r} names no tensor of a state; accepted: <layer>.<kind>.<field>")
            kinds[int(index)] = kind
            parts.setdefault(int(index), {})[name] = x
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"the state has layers {sorted(parts)}; accepted: 0 to their number, none missing")
        return cls(tuple(MIXERS[kinds[i]].state.from_tensors(parts[i]) for i in range(len(parts))))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that `load` reads."""
        tensors = {name: x.contiguous() for name, x in self.named_tensors().items()}
        save_file(tensors, path, metadata={"format": "retnet-state"})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "ModelState":
        """Read what `save` wrote. Raises ValueError for a file that is something else or is damaged."""
        try:
            with safe_open(path, "pt", device=device) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "retnet-state":
                    raise ValueError(f"{path} is not a saved retnet state (format {metadata.get('format')!r})")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        return cls.from_named(tensors)
