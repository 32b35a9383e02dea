"""The stages that tuning measures, on random data: border states, and the segment kernel in its four roles."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from retnet.kernels.device import stored_dtype
from retnet.kernels.retention.portable.border_states import border_states
from retnet.kernels.retention.portable.segment_decay import SegmentDecay
from retnet.kernels.retention.portable.segment_kernel import read_segments
from retnet.kernels.retention.portable.segment_read import SegmentRead
from retnet.kernels.retention.tile_model import HEADS, SEQUENCES, TOKENS
from retnet.kernels.retention.tile_shapes import SegmentTile, StateTile
from retnet.kernels.retention.tune_search import Job
from retnet.kernels.segments import Segments

# (x, y, z, reversed, heads summed) of the segment kernel's roles, by stage.
ROLES = {
    "key_contraction": (("q", "k", "v", False, False), ("k", "q", "v", True, False)),  # out, dv
    "value_contraction": (("v", "v", "k", False, True), ("v", "v", "q", True, True)),  # dq, dk
}


@dataclass
class Stages:
    """Inputs for heads of K x V: more programs than any device runs at once. On the meta device nothing is stored."""

    K: int
    V: int
    dtype: str
    device: str
    _kept: torch.Tensor | None = field(default=None, init=False)

    def run(self, job: Job) -> None:
        """Run the stage of a job once: one kernel, or the two roles of its contraction."""
        if isinstance(job.tile, StateTile):
            self._border_states(job.segment, job.tile)
        else:
            self._read(job.stage, job.segment, job.tile)

    @cached_property
    def tokens(self) -> dict[str, torch.Tensor]:
        sizes = {"q": self.K, "k": self.K, "v": self.V}
        return {name: self._random(TOKENS, HEADS, size, getattr(torch, self.dtype)) for name, size in sizes.items()}

    def _random(self, rows: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(rows, heads, size, dtype=dtype, device=self.device)

    @cached_property
    def log_decay(self) -> torch.Tensor:
        return torch.linspace(-0.03, -0.001, HEADS, device=self.device)

    def _cut(self, segment: int) -> tuple[Segments, SegmentDecay]:
        segments = Segments.of(SEQUENCES, TOKENS // SEQUENCES, segment, None)
        return segments, SegmentDecay.of(self.log_decay, None, segments)

    def _border_states(self, segment: int, tile: StateTile) -> None:
        segments, decay = self._cut(segment)
        options: dict[str, Any] = {"scale": 1.0, "initial": None, "final_dtype": torch.float32, "reverse": False}
        border_states(self.tokens["k"], self.tokens["v"], decay, segments, tile, **options)

    def _states(self, segments: Segments) -> torch.Tensor:
        """The states of the last segment length that was asked for: one set fits small GPUs too."""
        if self._kept is None or self._kept.shape[0] != segments.num_slots:
            self._kept = None  # frees its memory first
            shape = (segments.num_slots, HEADS, self.K, self.V)
            states = torch.empty(shape, dtype=stored_dtype(self.tokens["q"].dtype), device=self.device)
            self._kept = states if self.device == "meta" else states.normal_()
        return self._kept

    def _read(self, stage: str, segment: int, tile: SegmentTile) -> None:
        segments, decay = self._cut(segment)
        states = self._states(segments)
        for x, y, z, reverse, sum_heads in ROLES[stage]:
            inputs = (self.tokens[name] for name in (x, y, z))
            read_segments(SegmentRead(*inputs, states, decay, segments, 1.0, 1.0, reverse, sum_heads), tile)
