"""The expanded schedule: one `Layer` per layer of the model, with overrides applied and defaults filled in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .mixers import MIXERS, MixerSettings
from .parallel import TYPE as PARALLEL
from .parallel import Parallel
from .schema import DEFAULT_ACTIVATION, Entry, Ffn, Merge, Norm, Override, ParallelEntry, Residual, Spec, Template
from .section import Section

MAX_LAYERS = 4096

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Layer:
    """Layer `index` of the model. entry: its place in layer_schedule. keeps_state: decoding carries its state.

    ffn None: a layer of parallel streams, whose layers have their own; `streams` are those.
    """

    index: int
    template: str
    entry: int
    mixer_type: str
    mixer: MixerSettings
    ffn: Ffn | None
    activation: str
    norm: Norm
    residual: Residual
    keeps_state: bool
    streams: tuple["Layer", ...] = ()

    @property
    def inner(self) -> tuple["Layer", ...]:
        """The layers of templates: this one, or those of its streams."""
        return self.streams or (self,)

    @property
    def mixers(self) -> tuple[tuple[str, MixerSettings], ...]:
        """The mixers that do the work, with their names in YAML: several in a branched layer."""
        return self.mixer.leaves(self.mixer_type)


def keeps_state(template: Template) -> bool:
    """Whether decoding carries the layer's state: as `state` says, true by default.

    Setting one key of `state` makes the other false, so `state: {ssm_state: false}` also denies attention its cache.
    A mixer without a key of its own always carries its state.
    """
    key = MIXERS[template.mixer.type].STATE_KEY
    if key is None or template.state is None or not template.state.model_fields_set:
        return True
    return getattr(template.state, key)


def expand(spec: Spec) -> tuple[Layer, ...]:
    """All layers in order."""
    layers: list[Layer] = []
    for number, entry in enumerate(spec.layer_schedule):
        if isinstance(entry, ParallelEntry):
            layers.append(_parallel_layer(len(layers), number, entry, spec))
            continue
        layer = _layer(len(layers), number, entry, spec.layer_templates[entry.template])
        layers += [replace(layer, index=len(layers) + i) for i in range(entry.repeat)]
    return tuple(layers)


def multi_token_layer(spec: Spec) -> Layer | None:
    """The layer that modules of multi-token prediction are made of; None without them."""
    mtp = spec.head.mtp
    if mtp is None:
        return None
    return _layer(0, 0, Entry(template=mtp.head_template), spec.layer_templates[mtp.head_template])


def one_per_entry(layers: Sequence[Layer]) -> list[Layer]:
    """The first layer of each entry of the schedule; the others of an entry differ from it in their index only."""
    return list({layer.entry: layer for layer in reversed(layers)}.values())


def _layer(index: int, number: int, entry: Entry, template: Template) -> Layer:
    override = entry.override or Override()
    return Layer(
        index=index,
        template=entry.template,
        entry=number,
        mixer_type=template.mixer.type,
        mixer=_overridden(template.mixer.settings, override.attention),
        ffn=template.ffn,
        activation=_overridden(template.ffn, override.ffn).activation or DEFAULT_ACTIVATION[template.ffn.type],
        norm=_overridden(template.norm or Norm(), override.norm),
        residual=_overridden(template.residual or Residual(), override.residual),
        keeps_state=keeps_state(template),
    )


def _parallel_layer(index: int, number: int, entry: ParallelEntry, spec: Spec) -> Layer:
    """The layer of streams; its norm is the one that a norm after it would have."""
    streams: dict[str, tuple[Layer, ...]] = {}
    for stream in entry.parallel:
        body: list[Layer] = []
        for part in stream.body:
            layer = _layer(index, number, Entry(template=part.template), spec.layer_templates[part.template])
            body += [layer] * part.repeat
        streams[stream.stream] = tuple(body)
    inner, merge = tuple(layer for body in streams.values() for layer in body), entry.merge or Merge()
    ends = (merge.target, merge.source) if merge.target and merge.source else None
    return Layer(
        index=index,
        template=" | ".join(streams),
        entry=number,
        mixer_type=PARALLEL,
        mixer=Parallel(streams=streams, merge=merge.type, ends=ends),
        ffn=None,
        activation="",
        norm=Norm(type=next(iter(streams.values()))[-1].norm.type),
        residual=Residual(),
        keeps_state=all(layer.keeps_state for layer in inner),
        streams=inner,
    )


def _overridden(section: S, changes: Section | None) -> S:
    """The section, updated with the values that `changes` gives."""
    return section.model_copy(update=changes.model_dump(exclude_none=True)) if changes else section
