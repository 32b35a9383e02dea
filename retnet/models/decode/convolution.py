"""The short convolution of a retention layer in the fused decode step, on the product q | k | v | g in place."""

from __future__ import annotations

from torch import Tensor

from retnet.layers.retention import MultiScaleRetention, RetentionConfig, RetentionState
from retnet.ops.decode.short_convolution import short_convolution_step_
from retnet.ops.short_convolution import Activation, short_convolution


class FusedConvolution:
    """The convolution of those of q, k and v that have one. Columns that follow each other are one launch."""

    def __init__(self, mixer: MultiScaleRetention):
        self.conv = mixer.conv
        self.activation: Activation = mixer.config.conv_activation
        self.runs = [] if mixer.conv is None else _runs(mixer.config)

    def step_(self, product: Tensor, state: RetentionState, active: Tensor | None) -> None:
        """One token per sequence: product [S, q | k | v | g] and the state's last inputs are overwritten."""
        for columns, weight, recent in self._parts(state):
            x = product[:, columns]
            short_convolution_step_(x, weight, None, recent, active, activation=self.activation)

    def read_(self, product: Tensor, state: RetentionState) -> None:
        """The next tokens of one sequence: product [T, q | k | v | g] and the state's last inputs are overwritten."""
        for columns, weight, recent in self._parts(state):
            x = product[None, :, columns]
            y, after = short_convolution(x, weight, activation=self.activation, recent=recent)
            x.copy_(y)
            recent.copy_(after)

    def _parts(self, state: RetentionState) -> list[tuple[slice, Tensor, Tensor]]:
        """(columns of the product, weight, last inputs) of each run."""
        if self.conv is None:
            return []
        weight, recent = self.conv.weight, state.recent
        assert recent is not None
        return [(columns, weight[channels], recent[..., channels]) for columns, channels in self.runs]


def _runs(config: RetentionConfig) -> list[tuple[slice, slice]]:
    """Convolved columns of q | k | v that follow each other, each with its channels of the convolution."""
    runs: list[tuple[slice, slice]] = []
    column = channel = 0
    for part, width in config.projected.items():
        if part in config.conv_on:
            if runs and runs[-1][0].stop == column:
                runs[-1] = (slice(runs[-1][0].start, column + width), slice(runs[-1][1].start, channel + width))
            else:
                runs.append((slice(column, column + width), slice(channel, channel + width)))
            channel += width
        column += width
    return runs
