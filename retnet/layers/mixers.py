"""The registry of mixers: one line each, read by everything that depends on which mixers there are.

To add a mixer, write its file beside this one (configuration, state, draft, module, operations; bases in
`mixer_base.py`) and its line here, and its entry in `retnet.stack.mixers` for stack files. A mixer outside the package
is added by `register`, before a configuration names it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from retnet.layers.attention import Attention, AttentionConfig, AttentionDraft, AttentionState, attention_flops
from retnet.layers.draft import Draft
from retnet.layers.hyena import Hyena, HyenaConfig, HyenaState, hyena_flops
from retnet.layers.mamba1 import Mamba1, Mamba1Config, Mamba1Draft, Mamba1State, mamba1_flops
from retnet.layers.mamba2 import Mamba2, Mamba2Config, Mamba2State, mamba2_flops
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule
from retnet.layers.moe import MoE
from retnet.layers.retention import (
    MultiScaleRetention,
    RetentionConfig,
    RetentionDraft,
    RetentionState,
    retention_flops,
)
from retnet.layers.state import LayerState


@dataclass(frozen=True)
class Mixer:
    """A mixer's classes. name: the `kind` of its configuration, and of its tensors in files of states.

    draft None: drafts of several tokens are not supported, and so neither is speculative decoding.
    """

    name: str
    config: type[MixerConfig]
    module: type[MixerModule]
    state: type[LayerState]
    draft: type[Draft] | None
    flops: Callable[..., MixerFlops]


MIXERS: dict[str, Mixer] = {}


def register(mixer: Mixer) -> None:
    """Add a mixer. Raises ValueError if another has its name, state, or a configuration of another kind."""
    kind = getattr(mixer.config, "kind", None)
    if kind != mixer.name:
        raise ValueError(f"{mixer.config.__name__}.kind is {kind!r}; accepted: the mixer's name, {mixer.name!r}")
    for other in MIXERS.values():
        if other.name == mixer.name or other.state is mixer.state:
            raise ValueError(f"{mixer.name!r} with {mixer.state.__name__}: {other.name!r} has that name or state")
    MIXERS[mixer.name] = mixer


def mixer_of(config: MixerConfig) -> Mixer:
    """The mixer that a configuration is of."""
    return MIXERS[config.kind]


def mixer_configs() -> Mapping[str, type[MixerConfig]]:
    """The configuration class of every mixer, by kind."""
    return {name: mixer.config for name, mixer in MIXERS.items()}


def float32_parameters() -> set[str]:
    """Names of the parameters and buffers that stay float32 in a model of half precision, over all layers."""
    mixers = {name for mixer in MIXERS.values() for name in mixer.module.FLOAT32_PARAMETERS}
    return mixers | set(MoE.FLOAT32_PARAMETERS)


register(Mixer("retention", RetentionConfig, MultiScaleRetention, RetentionState, RetentionDraft, retention_flops))
register(Mixer("attention", AttentionConfig, Attention, AttentionState, AttentionDraft, attention_flops))
register(Mixer("mamba1", Mamba1Config, Mamba1, Mamba1State, Mamba1Draft, mamba1_flops))
register(Mixer("mamba2", Mamba2Config, Mamba2, Mamba2State, RetentionDraft, mamba2_flops))
register(Mixer("hyena", HyenaConfig, Hyena, HyenaState, None, hyena_flops))
