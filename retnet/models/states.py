"""The state of a whole model: one typed state per layer, saved and loaded as safetensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retnet.layers.draft import Draft
from retnet.layers.mixers import MIXERS, kind_of
from retnet.layers.multi_token import PreviousHidden
from retnet.layers.state import LayerState

_PREVIOUS_HIDDEN = "previous_hidden"  # names the first state of each module of multi-token prediction


@dataclass
class ModelDraft:
    """The draft updates of all layers for T tokens of each sequence, and those of multi-token prediction."""

    layers: tuple[Draft, ...]
    mtp: tuple[Draft, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(draft.nbytes for draft in (*self.layers, *self.mtp))

    def accept_(self, state: "ModelState", counts: Tensor) -> None:
        """Write the first counts[b] tokens of each sequence b into the state before them, in place."""
        for draft, layer in zip((*self.layers, *self.mtp), (*state.layers, *state.mtp), strict=True):
            draft.accept_(layer, counts)


@dataclass
class ModelState:
    """The states of all layers, for N sequences.

    mtp: the states of multi-token prediction (`layers/multi_token.py`), where drafts are to come from it. They change
    no result of the model. Iteration is over the layers alone.
    """

    layers: tuple[LayerState, ...]
    mtp: tuple[LayerState, ...] = ()

    def __iter__(self) -> Iterator[LayerState]:
        return iter(self.layers)

    @property
    def parts(self) -> tuple[LayerState, ...]:
        """The states of the layers, then those of multi-token prediction."""
        return (*self.layers, *self.mtp)

    @property
    def position(self) -> Tensor:
        """Real tokens seen by each sequence, [N]."""
        return self.layers[0].position

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def is_finite(self) -> bool:
        """Whether no tensor of the layers holds NaN or infinity. Reads them all."""
        return all(bool(x.isfinite().all()) for layer in self.layers for x in layer.tensors().values())

    def select(self, index: Tensor) -> "ModelState":
        """The states of sequences `index` [M], in that order, repetitions allowed (beams, forks)."""
        return self._each(lambda part: part.select(index))

    def repeat(self, times: int) -> "ModelState":
        """Every sequence `times` times in a row."""
        return self._each(lambda part: part.repeat(times))

    def clone(self) -> "ModelState":
        """A copy to roll back to, which later in-place updates do not change."""
        return self._each(lambda part: part.clone())

    def to(self, device: torch.device | str) -> "ModelState":
        return self._each(lambda part: part.to(device))

    def slot(self, index: int) -> "ModelState":
        """The state of one sequence as a view: in-place updates of it change this state."""
        return self._each(lambda part: part.slot(index))

    def write_(self, index: int, state: "ModelState") -> None:
        """Overwrite sequence `index` with the state of one sequence, whatever was there before.

        Multi-token prediction starts anew where `state` has none, and is left out where this state has none.
        """
        for mine, other in zip(self.layers, state.layers, strict=True):
            mine.write_(index, other)
        for i, mine in enumerate(self.mtp):
            if state.mtp:
                mine.write_(index, state.mtp[i])
            else:
                mine.clear_(index)

    def clear_(self, index: int) -> None:
        """Reset sequence `index` to the state before its first token."""
        for part in self.parts:
            part.clear_(index)

    def trim(self) -> "ModelState":
        """The state without unused capacity, to keep or to store."""
        return self._each(lambda part: part.trim())

    def _each(self, change: Callable[[LayerState], LayerState]) -> "ModelState":
        return ModelState(tuple(map(change, self.layers)), tuple(map(change, self.mtp)))

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, "<layer>.<kind>.<field>", as `from_named` reads them.

        The states of multi-token prediction are numbered on from the layers'.
        """
        return {
            f"{i}.{_PREVIOUS_HIDDEN if isinstance(part, PreviousHidden) else kind_of(part)}.{name}": x
            for i, part in enumerate(self.parts)
            for name, x in part.tensors().items()
        }

    @classmethod
    def from_named(cls, tensors: dict[str, Tensor]) -> "ModelState":
        """The inverse of `named_tensors`. Raises ValueError for names that it did not make."""
        parts: dict[int, dict[str, Tensor]] = {}
        kinds: dict[int, str] = {}
        states = _states_by_name()
        for key, x in tensors.items():
            index, kind, name = key.split(".") if key.count(".") == 2 else ("", "", "")
            if not index.isdecimal() or kind not in states:
                raise ValueError(f"{key!r} names no tensor of a state; accepted: <layer>.<kind>.<field>")
            kinds[int(index)] = kind
            parts.setdefault(int(index), {})[name] = x
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"the state has layers {sorted(parts)}; accepted: 0 to their number, none missing")
        found = tuple(states[kinds[i]].from_tensors(parts[i]) for i in range(len(parts)))
        num_layers = next((i for i in range(len(parts)) if kinds[i] == _PREVIOUS_HIDDEN), len(parts))
        return cls(found[:num_layers], found[num_layers:])

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


def _states_by_name() -> dict[str, type[LayerState]]:
    return {mixer.name: mixer.state for mixer in MIXERS.values()} | {_PREVIOUS_HIDDEN: PreviousHidden}
