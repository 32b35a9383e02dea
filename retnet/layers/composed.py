"""Bases of mixers that are made of other mixers: configuration, state, draft and module, as tuples of those inside.

A composed state holds the states of the mixers inside, in their order, and has the same operations. Its tensors are
named "<number>/<kind>/<field>". All states inside count the same tokens; the position is the first one's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from retnet.layers.draft import Draft
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.registry import MIXERS, kind_of, mixer_of
from retnet.layers.state import LayerState
from retnet.layers.tensor_parallel import Splits
from retnet.layers.token_layout import TokenLayout
from retnet.ops.tensor_shard import TensorShard

REFUSALS = ("refused_by_engine", "refused_on_shards", "refused_when_split")


class ComposedConfig(MixerConfig):
    """Base of configurations of mixers that are made of others: what one of those refuses, the whole refuses."""

    refused_when_split = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in REFUSALS:
            reasons = (
                f"it contains {mixer.kind}: {getattr(mixer, name)}" for mixer in self.inside if getattr(mixer, name)
            )
            object.__setattr__(self, name, next(reasons, ""))

    @property
    def inside(self) -> tuple[MixerConfig, ...]:
        """The mixers inside, in the order of their states."""
        raise NotImplementedError

    @property
    def leaves(self) -> tuple[MixerConfig, ...]:
        return tuple(leaf for mixer in self.inside for leaf in mixer.leaves)

    @property
    def kept_tokens(self) -> float:
        return max(mixer.kept_tokens for mixer in self.inside)

    @property
    def longest_context(self) -> float:
        return min(mixer.longest_context for mixer in self.inside)

    def on_device(self, work: Workload) -> str | None:
        notes = dict.fromkeys(note for mixer in self.inside if (note := mixer.on_device(work)))
        return "; ".join(notes) or None


@dataclass
class ComposedState(LayerState):
    """states: those of the mixers inside."""

    states: tuple[LayerState, ...]

    @classmethod
    def of(cls, states: Sequence[LayerState]) -> Self:
        """The state that consists of these, whose position is the first one's tensor."""
        return cls(states[0].position, tuple(states))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for key, x in tensors.items():
            number, _, rest = key.partition("/")
            kind, _, name = rest.partition("/")
            if key == "position":
                continue
            if not number.isdecimal() or kind not in MIXERS or not name:
                raise ValueError(f"{key!r} names no tensor of a composed state; accepted: <number>/<kind>/<field>")
            parts.setdefault((int(number), kind), {})[name] = x
        if [number for number, _ in sorted(parts)] != list(range(len(parts))) or not parts:
            raise ValueError(f"the state has parts {sorted(parts)}; accepted: 0 to their number, one kind each")
        position = tensors["position"]
        return cls.of([
            MIXERS[kind].state.from_tensors({"position": position.clone(), **parts[number, kind]})
            for number, kind in sorted(parts)
        ])  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"position": self.position}
        for i, state in enumerate(self.states):
            inside = state.tensors()
            tensors |= {f"{i}/{kind_of(state)}/{name}": x for name, x in inside.items() if name != "position"}
        return tensors

    def replaced(self, tensors: Mapping[str, Tensor]) -> Self:
        parts = []
        for i, state in enumerate(self.states):
            prefix = f"{i}/{kind_of(state)}/"
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            parts.append(state.replaced(own))
        return self.of(parts)

    @property
    def per_token(self) -> tuple[str, ...]:
        return tuple(f"{i}/{kind_of(state)}/{name}" for i, state in enumerate(self.states) for name in state.per_token)

    @property
    def leaves(self) -> tuple[LayerState, ...]:
        return tuple(leaf for state in self.states for leaf in state.leaves)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    def select(self, index: Tensor) -> Self:
        return self._each(lambda state: state.select(index))

    def clone(self) -> Self:
        return self._each(lambda state: state.clone())

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda state: state.to(device))

    def slot(self, index: int) -> Self:
        return self._each(lambda state: state.slot(index))

    def trim(self) -> Self:
        return self._each(lambda state: state.trim())

    def write_(self, index: int, state: LayerState) -> None:
        assert isinstance(state, ComposedState)
        for mine, other in zip(self.states, state.states, strict=True):
            mine.write_(index, other)

    def clear_(self, index: int) -> None:
        for state in self.states:
            state.clear_(index)

    def _each(self, change: Callable[[LayerState], LayerState]) -> Self:
        return self.of([change(state) for state in self.states])


@dataclass
class ComposedDraft(Draft):
    """drafts: those of the mixers inside."""

    drafts: tuple[Draft, ...]

    @property
    def nbytes(self) -> int:
        return sum(draft.nbytes for draft in self.drafts)

    def accept_(self, state: ComposedState, counts: Tensor) -> None:
        for draft, inside in zip(self.drafts, state.states, strict=True):
            draft.accept_(inside, counts)


class ComposedModule(MixerModule):
    """Base of mixers that are made of others. STATE, DRAFT: their classes."""

    STATE: type[ComposedState]
    DRAFT: type[ComposedDraft]

    def inside(self) -> dict[str, MixerModule]:
        """The mixers inside by the names of their modules, in the order of their states."""
        raise NotImplementedError

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        for mixer in self.inside().values():
            mixer.prepare(layout, dtype)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> ComposedState:
        """The states of `batch` sequences before their first token, with room for `num_tokens` where they grow."""
        return self.STATE.of([mixer.init_state(batch, device, dtype, num_tokens) for mixer in self.inside().values()])

    def composed(self, results: Sequence[Any], layout: TokenLayout) -> ComposedState | ComposedDraft | None:
        """The second result of `forward`, from those of the mixers inside."""
        if layout.deferred:
            return self.DRAFT(tuple(results))
        return self.STATE.of(results) if layout.carry else None

    def splits(self) -> Splits:
        return {
            f"{path}.{name}": split for path, mixer in self.inside().items() for name, split in mixer.splits().items()
        }

    def state_splits(self) -> Splits:
        parts = enumerate(self.inside().values())
        return {f"{i}/{m.config.kind}/{name}": split for i, m in parts for name, split in m.state_splits().items()}

    def split_(self, shard: TensorShard) -> None:
        """Each mixer inside keeps its own heads, and adds the outputs of all processes itself."""
        states, part = self.state_splits(), self.config.part(shard.rank, shard.size)
        for mixer in self.inside().values():
            mixer.split_(shard)
        self.shard, self.config, self.states_split_by = shard, part, states


def composed_flops(mixers: Sequence[MixerConfig], work: Workload) -> MixerFlops:
    """The operations of all mixers inside."""
    costs = [mixer_of(mixer).flops(mixer, work) for mixer in mixers]
    return MixerFlops(sum(cost.forward for cost in costs), sum(cost.decode for cost in costs))
