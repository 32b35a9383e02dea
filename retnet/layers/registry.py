"""The registry of mixers: the classes of each, by the `kind` of its configuration.

`mixers.py` fills it with the mixers of the package; it is a module of its own for mixers that are made of others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from retnet.layers.draft import Draft
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule
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


def kind_of(state: LayerState) -> str:
    """The name of the mixer that a state is of."""
    return next(mixer.name for mixer in MIXERS.values() if mixer.state is type(state))


def mixer_configs() -> Mapping[str, type[MixerConfig]]:
    """The configuration class of every mixer, by kind."""
    return {name: mixer.config for name, mixer in MIXERS.items()}
