"""The base class of the settings of mixers that are made of others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .settings import MixerSettings

if TYPE_CHECKING:
    from retnet.models.config import ModelConfig


class Composed(MixerSettings):
    """Settings that are those of the mixers inside, put together."""

    NEEDS_REGULARISATION = True

    @property
    def inside(self) -> tuple[tuple[str, MixerSettings], ...]:
        """The mixers inside with their names in YAML, in the order of their states."""
        raise NotImplementedError(f"{type(self).__name__}.inside")

    def blocks_inside(self, block: Any) -> tuple[Any, ...]:
        """One block per mixer inside, from that of the whole layer."""
        return tuple(replace(block, mixer=mixer) for mixer in block.mixer.inside)

    def leaves(self, name: str) -> tuple[tuple[str, MixerSettings], ...]:
        return tuple(leaf for kind, settings in self.inside for leaf in settings.leaves(kind))

    @property
    def rotates_heads(self) -> bool:
        return any(settings.rotates_heads for _, settings in self.inside)

    @property
    def reaches_all(self) -> bool:
        return any(settings.reaches_all for _, settings in self.inside)

    @property
    def reach_depends_on_input(self) -> bool:
        return not self.reaches_all and any(settings.reach_depends_on_input for _, settings in self.inside)

    def reach(self, config: ModelConfig) -> tuple[float, ...] | None:
        """The reaches of all heads, mixer after mixer."""
        found: list[float] = []
        blocks = self.blocks_inside(config.layers[0])
        for (_, settings), block in zip(self.inside, blocks, strict=True):
            reach = settings.reach(replace(config, layers=(block,)))
            if reach is None:
                return None
            found += reach
        return tuple(found)
