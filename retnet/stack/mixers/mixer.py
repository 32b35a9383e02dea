"""`mixer`: the section that chooses a mixer by its `type`, with its settings under the key of that name."""

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, create_model

from .. import unsupported
from ..scalars import ONE_OF
from ..section import Section
from .settings import MixerSettings

# By the name in YAML; `retnet.stack.mixers` fills it.
MIXERS: dict[str, type[MixerSettings]] = {}


class Mixer(Section):
    """The type of a mixer, with its settings under the key of the same name. Types are the names in `MIXERS`."""

    UNSUPPORTED_VALUES = unsupported.MIXER_VALUES

    type: str

    @classmethod
    def keys(cls) -> dict[str, Any]:
        return {name: info.annotation for name, info in cls.with_known_mixers().model_fields.items()}

    @classmethod
    def with_known_mixers(cls) -> "type[Mixer]":
        """This section with one key per mixer that is registered now."""
        return _with_mixers(tuple(MIXERS.items()))

    @property
    def settings(self) -> MixerSettings:
        """The settings of the mixer, or their defaults."""
        return getattr(self, self.type) or MIXERS[self.type]()


@cache
def _with_mixers(mixers: tuple[tuple[str, type[MixerSettings]], ...]) -> type[Mixer]:
    names = tuple(name for name, _ in mixers)
    fields: dict[str, Any] = {"type": (Annotated[Literal[names], ONE_OF], ...)}
    fields |= {name: (settings | None, None) for name, settings in mixers}
    return create_model("Mixer", __base__=Mixer, **fields)


# The class is made when a file is read, so that a mixer may be registered after its section is imported.
AnyMixer = Annotated[Mixer, PlainValidator(lambda value: Mixer.with_known_mixers().model_validate(value))]
