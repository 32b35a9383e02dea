"""The decay of a float32 state in a kernel, accurate for decays near 1."""

import triton
import triton.language as tl


@triton.jit
def decay_parts(exponent):
    """(factor, rest) whose sum is exp(exponent): (1, expm1) above -1/2, (exp, 0) below.

    `S factor + S rest` multiplies a float32 state by a decay near 1 without rounding the decay, whose error would have
    the same sign every time and add up. Smaller decays forget the state before that matters.
    """
    # expm1 by its series (CUDA's and AMD's libraries name it differently); the tenth term is < 2^-32 of the first.
    x = tl.maximum(exponent, -0.5)
    series = 1.0 + x * (1.0 / 9.0)
    series = 1.0 + x * series * (1.0 / 8.0)
    series = 1.0 + x * series * (1.0 / 7.0)
    series = 1.0 + x * series * (1.0 / 6.0)
    series = 1.0 + x * series * (1.0 / 5.0)
    series = 1.0 + x * series * (1.0 / 4.0)
    series = 1.0 + x * series * (1.0 / 3.0)
    series = 1.0 + x * series * (1.0 / 2.0)
    slow = exponent > -0.5
    return tl.where(slow, 1.0, tl.exp(exponent)), tl.where(slow, x * series, 0.0)
