"""The schedule written out: one `Layer` for every layer of the model, overrides applied, defaults filled in."""

from dataclasses import dataclass
from typing import TypeVar

from .schema import (
    DEFAULT_ACTIVATION,
    STATE_OF,
    Attention,
    Entry,
    Ffn,
    Hyena,
    Mamba,
    Norm,
    Override,
    Residual,
    Retnet,
    Section,
    Spec,
    Template,
)

MAX_LAYERS = 4096

S = TypeVar("S", bound=Section)
MixerSettings = Attention | Mamba | Retnet | Hyena
_SETTINGS = {"attention": Attention, "mamba": Mamba, "retnet": Retnet, "hyena": Hyena}


@dataclass(frozen=True)
class Layer:
    """Layer `index` of the model. `keeps_state`: whether the file lets it decode with a carried state."""

    index: int
    template: str
    entry: int
    mixer_type: str
    mixer: MixerSettings
    ffn: Ffn
    activation: str
    norm: Norm
    residual: Residual
    keeps_state: bool


def mixer_settings(template: Template) -> MixerSettings:
    """The settings of the template's mixer, all defaults if the file gives none."""
    kind = template.mixer.type
    return getattr(template.mixer, kind) or _SETTINGS[kind]()


def keeps_state(template: Template) -> bool:
    """Whether the layer carries its state in decoding: what `state` says, true where it says nothing.

    One key given makes the other false, so `state: {ssm_state: false}` also denies attention its cache. Hyena has no
    key of its own and always may.
    """
    key = STATE_OF[template.mixer.type]
    if key is None or template.state is None or not template.state.model_fields_set:
        return True
    return getattr(template.state, key)


def expand(spec: Spec) -> tuple[Layer, ...]:
    """All layers in order."""
    layers: list[Layer] = []
    for number, entry in enumerate(spec.layer_schedule):
        template = spec.layer_templates[entry.template]
        for _ in range(entry.repeat):
            layers.append(_layer(len(layers), number, entry, template))
    return tuple(layers)


def _layer(index: int, number: int, entry: Entry, template: Template) -> Layer:
    override = entry.override or Override()
    return Layer(
        index=index,
        template=entry.template,
        entry=number,
        mixer_type=template.mixer.type,
        mixer=_overridden(mixer_settings(template), override.attention),
        ffn=template.ffn,
        activation=_overridden(template.ffn, override.ffn).activation or DEFAULT_ACTIVATION[template.ffn.type],
        norm=_overridden(template.norm or Norm(), override.norm),
        residual=_overridden(template.residual or Residual(), override.residual),
        keeps_state=keeps_state(template),
    )


def _overridden(section: S, changes: Section | None) -> S:
    """The section with every value that `changes` gives."""
    return section.model_copy(update=changes.model_dump(exclude_none=True)) if changes else section
