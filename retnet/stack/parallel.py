"""`parallel` entries of the schedule: streams of layers that read the same input, as one layer of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from retnet.plots.palette import COLOURS, Fill

from .mixers import MixerSettings
from .mixers.composed import Composed

if TYPE_CHECKING:
    from retnet.layers.streams import StreamsConfig

    from .schema import Model, Spec

TYPE = "parallel"  # the name of such a layer's mixer in tables and pictures
_MERGES: dict[str, Literal["concat", "add", "gate", "cross"]] = {
    "concat": "concat", "add": "add", "gated": "gate", "cross_attn": "cross"
}  # fmt: skip


class Parallel(Composed):
    """The mixer that the streams are to the rest of the package. streams: by name the `Layer`s of each."""

    COLOUR: ClassVar[str] = COLOURS["tri-mixer"]

    streams: dict[str, Any]
    merge: str
    ends: tuple[str, str] | None = None  # with cross_attn, the streams that queries, and keys and values, are of

    def config(self, spec: Spec) -> StreamsConfig:
        from retnet.layers.streams import StreamsConfig

        from .build import block_of

        blocks = tuple(tuple(block_of(layer, spec) for layer in stream) for stream in self.streams.values())
        if self.ends is None:
            return StreamsConfig(blocks, _MERGES[self.merge])
        from retnet.layers.attention import AttentionConfig

        model, names = spec.model, list(self.streams)
        cross = AttentionConfig(model.n_heads, model.kv_heads, model.head_dim, rotary="none")
        return StreamsConfig(blocks, "cross", cross, tuple(names.index(end) for end in self.ends))

    @property
    def reaches_all(self) -> bool:
        return self.ends is not None or super().reaches_all

    @property
    def inside(self) -> tuple[tuple[str, MixerSettings], ...]:
        return tuple((layer.mixer_type, layer.mixer) for stream in self.streams.values() for layer in stream)

    def blocks_inside(self, block: Any) -> tuple[Any, ...]:
        return block.mixer.blocks

    def words(self, name: str) -> str:
        streams = [", then ".join(_runs(stream)) for stream in self.streams.values()]
        return " | ".join(streams) + f" ({self.merge})"

    def family(self, name: str) -> tuple[str, Fill]:
        kinds = [
            ", ".join(dict.fromkeys(layer.mixer.family(layer.mixer_type)[0] for layer in stream))
            for stream in self.streams.values()
        ]
        return f"{name}: {' | '.join(kinds)}", Fill(self.COLOUR)

    def estimate(self, model: Model) -> int:
        raise NotImplementedError("the estimate is that of the layers of all streams")


def _runs(stream: tuple[Any, ...]) -> list[str]:
    """'2 x retnet', 'attention, window 16': the mixers of a stream in words, equal ones counted."""
    words = [layer.mixer.words(layer.mixer_type) for layer in stream]
    found: list[tuple[str, int]] = []
    for each in words:
        if found and found[-1][0] == each:
            found[-1] = (each, found[-1][1] + 1)
        else:
            found.append((each, 1))
    return [each if count == 1 else f"{count} x {each}" for each, count in found]
