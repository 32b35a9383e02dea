"""Axes with readable numbers: bytes in KiB to TiB, tokens in powers of two, times in steps of 1, 2 and 5."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from retnet.plots.numbers import bytes_of, plain
from retnet.system.extras import needs

with needs("plots", "A picture"):
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator

MOST_TICKS = 7
BYTE_STEPS = 4  # most steps from zero to the highest value of a linear axis of bytes
LEAST_SPAN = 4.0  # highest / lowest value of a logarithmic axis
_PAD = 0.05  # of a logarithmic axis at each end
Form = Callable[[float], str]


def log_axis(axes: Axes, which: Literal["x", "y"], form: Form = plain, *, base: Literal[2, 10] = 10) -> None:
    """Make an axis logarithmic. Call it after everything is drawn: its ends and ticks are fixed by the finite data.

    Ticks are powers of two for base 2, otherwise 1, 2 and 5 times powers of ten, or powers alone over many decades.
    """
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_data_interval()
    if not (math.isfinite(low) and math.isfinite(high) and high > 0):
        low, high = 1.0, LEAST_SPAN
    low = low if low > 0 else float(axis.get_minpos())
    low, high = spanned(low, high)
    getattr(axes, f"set_{which}lim")(low, high)  # first, because the scale would warn of data without logarithms
    getattr(axes, f"set_{which}scale")("log", base=base)
    axis.set_ticks(log_ticks(low, high, base))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_locator(NullLocator())


def linear_axis(axes: Axes, which: Literal["x", "y"], form: Form = plain) -> None:
    """Write the numbers of a linear axis by `form`, without offsets or powers of ten.

    Call it after everything is drawn: bytes have ticks at multiples of a power of two, which the finite data decides.
    """
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    low, high = axis.get_data_interval()
    if form is bytes_of and math.isfinite(high - low) and high > 0:
        axis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(high / BYTE_STEPS))))


def spanned(low: float, high: float) -> tuple[float, float]:
    """The ends of a logarithmic axis around data from low to high: padded, and at least `LEAST_SPAN` apart."""
    middle, half = math.sqrt(low) * math.sqrt(high), max(high / low, LEAST_SPAN) ** (0.5 + _PAD)
    return middle / half, middle * half


def log_ticks(low: float, high: float, base: Literal[2, 10], most: int = MOST_TICKS) -> list[float]:
    """At most `most` round values from low to high, at equal steps where powers alone are left."""
    if base == 10:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for steps in ((1, 2, 5), (1, 3)):
            values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            values = [value for value in values if low <= value <= high]
            if len(values) <= most:
                return values
    powers = range(math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9) + 1)
    step = max(1, math.ceil(len(powers) / most))
    return [float(base) ** power for power in powers if power % step == 0]
