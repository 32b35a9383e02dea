"""The state of a whole model: one typed state a layer, saved and loaded as safetensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retnet.layers.state import AttentionState, HyenaState, LayerState, Mamba1State, Mamba2State, RetentionState

STATES: dict[str, type[LayerState]] = {
    "retention": RetentionState,
    "attention": AttentionState,
    "mamba1": Mamba1State,
    "mamba2": Mamba2State,
    "hyena": HyenaState,
}
_NAMES = {cls: name for name, cls in STATES.items()}


@dataclass
class ModelState:
    """What a model carries from one call to the next, for N sequences."""

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

    def select(self, index: Tensor) -> "ModelState":
        """The states of sequences `index` [M], in that order, repetitions allowed (beams, forks)."""
        return ModelState(tuple(layer.select(index) for layer in self.layers))

    def repeat(self, times: int) -> "ModelState":
        """Every sequence `times` times in a row."""
        return ModelState(tuple(layer.repeat(times) for layer in self.layers))

    def clone(self) -> "ModelState":
        """A checkpoint to roll back to, left alone by later in-place updates."""
        return ModelState(tuple(layer.clone() for layer in self.layers))

    def to(self, device: torch.device | str) -> "ModelState":
        return ModelState(tuple(layer.to(device) for layer in self.layers))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that `load` reads."""
        tensors = {
            f"{i}.{_NAMES[type(layer)]}.{name}": x.contiguous()
            for i, layer in enumerate(self.layers)
            for name, x in layer.tensors().items()
        }
        save_file(tensors, path, metadata={"format": "retnet-state", "layers": str(len(self.layers))})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "ModelState":
        """Read what `save` wrote. Raises ValueError for a file that is something else or is damaged."""
        try:
            with safe_open(path, "pt", device=device) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "retnet-state":
                    raise ValueError(f"{path} is not a saved retnet state (format {metadata.get('format')!r})")
                parts: list[dict[str, Tensor]] = [{} for _ in range(int(metadata["layers"]))]
                kinds = [""] * len(parts)
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    index, kind, name = key.split(".")
                    kinds[int(index)] = kind
                    parts[int(index)][name] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        return cls(tuple(STATES[kind](**part) for kind, part in zip(kinds, parts)))
