"""`type: branched`: several mixers side by side, whose outputs a gate weighs, or are added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from retnet.plots.palette import COLOURS, Fill
from retnet.system.suggest import nearest

from ..errors import Fault, listing, plain
from ..scalars import ONE_OF, MaybePositiveInt, Positive
from ..section import OURS, Section
from .composed import Composed
from .mixer import MIXERS, AnyMixer, Mixer
from .settings import MixerSettings

if TYPE_CHECKING:
    from retnet.layers.branched import BranchedConfig

    from ..schema import Embedding, Model, Spec


class Selector(Section):
    """How a gate weighs the branches. learned_gate: all of them, or the top_k largest; top_k: the top_k largest."""

    type: Annotated[Literal["learned_gate", "top_k"], ONE_OF] = "learned_gate"
    top_k: MaybePositiveInt = None
    input: Annotated[Literal["hidden"], ONE_OF] = "hidden"

    @property
    def used(self) -> int | None:
        """How many branches a token uses; None: all."""
        return 1 if self.top_k is None and self.type == "top_k" else self.top_k


class Branched(Composed):
    """Branches by name; scales are numbers by the names of branches."""

    GUIDE = "branched"
    COLOUR: ClassVar[str] = COLOURS["hybrid"]

    branches: dict[str, AnyMixer] = Field(default={})
    selector: Selector | None = None
    merge: Annotated[Literal["gate", "sum", "mean"], ONE_OF] = Field(default="gate", alias=OURS + "merge")
    input_scales: dict[str, Positive] = Field(default={}, alias=OURS + "input_scales")
    output_scales: dict[str, Positive] = Field(default={}, alias=OURS + "output_scales")

    def config(self, spec: Spec) -> BranchedConfig:
        from retnet.layers.branched import BranchedConfig

        selector = self.selector or Selector()
        return BranchedConfig(
            branches=tuple(mixer.settings.config(spec) for mixer in self.branches.values()),
            merge=self.merge,
            input_scales=self._in_order(self.input_scales),
            output_scales=self._in_order(self.output_scales),
            top_k=selector.used if self.merge == "gate" else None,
        )

    def _in_order(self, scales: dict[str, float]) -> tuple[float, ...]:
        return tuple(scales.get(name, 1.0) for name in self.branches) if scales else ()

    @property
    def inside(self) -> tuple[tuple[str, MixerSettings], ...]:
        return tuple((mixer.type, mixer.settings) for mixer in self.branches.values())

    def words(self, name: str) -> str:
        used = (self.selector or Selector()).used
        merge = self.merge if used is None else f"gate, {used} of {len(self.branches)}"
        return " + ".join(mixer.settings.words(mixer.type) for mixer in self.branches.values()) + f" ({merge})"

    def family(self, name: str) -> tuple[str, Fill]:
        names = [mixer.settings.family(mixer.type)[0] for mixer in self.branches.values()]
        return f"{name}: {' + '.join(names)}", Fill(self.COLOUR, striped=self.merge == "gate")

    def faults(self, model: Model | None, embedding: Embedding | None) -> Iterator[Fault]:
        if len(self.branches) < 2:
            what = f"expected at least two branches, got {len(self.branches)}"
            yield Fault(("branches",), what, "add branches: {ssm: {type: mamba}, attn: {type: attention}}")
        for name, mixer in self.branches.items():
            yield from _branch_faults(("branches", name), mixer, model, embedding)
        if self.selector is not None and self.merge != "gate":
            what = f"a selector is the gate of the branches, not of merge: {self.merge}"
            yield Fault(("selector",), what, f"remove it, or write {OURS}merge: gate")
        elif self.selector is not None and (self.selector.top_k or 1) > max(len(self.branches), 2):
            what = f"top_k {self.selector.top_k} is more than the {len(self.branches)} branches"
            yield Fault(("selector", "top_k"), what, f"write {len(self.branches)} or less")
        for key, scales in (("input_scales", self.input_scales), ("output_scales", self.output_scales)):
            for name in sorted(scales.keys() - self.branches.keys()):
                close = nearest(name, tuple(self.branches))
                fix = f"did you mean {plain(close)}?" if close else f"the branches are: {listing(self.branches)}"
                yield Fault((OURS + key, name), f"there is no branch '{plain(name)}'", fix)


def _branch_faults(
    path: tuple[str, ...], mixer: Mixer, model: Model | None, embedding: Embedding | None
) -> Iterator[Fault]:
    if mixer.type == "branched":
        yield Fault(path, "a branch cannot be branched itself", "write its branches beside the others")
        return
    for other in sorted(MIXERS.keys() & mixer.model_fields_set - {mixer.type}):
        what = f"`{other}` cannot be given with type: {mixer.type}"
        yield Fault(path, what, f"remove it, or write type: {other}")
    for fault in mixer.settings.faults(model, embedding):
        yield replace(fault, path=(*path, mixer.type, *fault.path))
