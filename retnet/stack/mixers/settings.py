"""`MixerSettings`: the base class of a mixer's entry, with defaults for what an entry may leave out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from retnet.plots.palette import COLOURS, Fill

from ..errors import Fault
from ..section import OURS, Section

if TYPE_CHECKING:
    from retnet.layers.mixer_base import MixerConfig
    from retnet.models.config import ModelConfig

    from ..schema import Embedding, Model, Spec


class MixerSettings(Section):
    """The settings of one type of mixer: its keys are the fields of the subclass."""

    # The key of `state` that the layer may set; None: it may set neither.
    STATE_KEY: ClassVar[Literal["kv_cache", "ssm_state"] | None] = None
    # The section of docs/reference/stack.md that errors about the mixer's keys point to.
    GUIDE: ClassVar[str] = "mixer"
    COLOUR: ClassVar[str] = COLOURS["other"]  # in pictures
    # Whether the report advises dropout or checkpointing for deep stacks with this mixer.
    NEEDS_REGULARISATION: ClassVar[bool] = False

    def config(self, spec: Spec) -> MixerConfig:
        """The configuration of the layer. Imports of torch belong inside: checking a file does not need it."""
        raise NotImplementedError(f"{type(self).__name__}.config")

    def words(self, name: str) -> str:
        """The mixer in a table of layers; `name` is its name in YAML."""
        return name

    def family(self, name: str) -> tuple[str, Fill]:
        """The mixer's label and fill in pictures; `name` is its name in YAML."""
        return name, Fill(self.COLOUR)

    def faults(self, model: Model | None, embedding: Embedding | None) -> Iterator[Fault]:
        """Values that contradict each other or other sections, with paths that start at this one.

        A section that is invalid by itself is None.
        """
        yield from ()

    @property
    def rotates_heads(self) -> bool:
        """Whether rotary positions apply to all d_model / n_heads components of a head."""
        return False

    def leaves(self, name: str) -> tuple[tuple[str, MixerSettings], ...]:
        """The mixers that do the work, with their names in YAML: this one, or those inside it."""
        return ((name, self),)

    @property
    def reaches_all(self) -> bool:
        """Whether every token can use all tokens before it."""
        return not self.reach_depends_on_input

    @property
    def reach_depends_on_input(self) -> bool:
        """Whether no limit is known because the mixer decides from its inputs what it forgets."""
        return False

    def reach(self, config: ModelConfig) -> tuple[float, ...] | None:
        """How many tokens back each head can use, None without a limit. config: a model of this layer only."""
        return None

    def estimate(self, model: Model) -> int:
        """EulerStack's estimate of the mixer's parameters; 0 for a mixer that EulerStack does not have."""
        return 0


def partial_rotation_faults(rotary_dim: int | None, head_dim: int | None, rotates: bool) -> Iterator[Fault]:
    """Faults of the number of components of a head that rotate. head_dim None: not known."""
    path = (OURS + "rotary_dim",)
    if rotary_dim is None:
        return
    if not rotates:
        yield Fault(path, f"rotary_dim {rotary_dim} in a layer without rotary positions", "remove it")
    elif rotary_dim % 2:
        yield Fault(path, f"rotary positions rotate pairs, but rotary_dim is {rotary_dim}", f"write {rotary_dim + 1}")
    elif head_dim is not None and rotary_dim > head_dim:
        yield Fault(
            path, f"rotary_dim {rotary_dim} is more than the width of a head", f"write {head_dim // 2 * 2} or less"
        )
