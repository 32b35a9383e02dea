"""The activation after the short convolution, and its derivative, in the units that cost the fewest instructions.

The sum before silu is counted in units of U = -ln 2: the taps and the bias come divided by U, so exp(-pre) is exp2 of
the sum. Without activation U = 1. The gradient of the sum is counted in its own units, U dpre, so that dx is
sum_i (weight_i / U) (U dpre), and only the sums over tokens are divided by U.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def per_unit(z, ACTIVATION: tl.constexpr):
    """z / U."""
    if ACTIVATION == "silu":
        return z * -LOG2_E
    return z


@triton.jit
def activated(pre, ACTIVATION: tl.constexpr):
    """silu(U pre) = U pre sigmoid(U pre), or pre, in float32."""
    if ACTIVATION == "silu":
        return -pre * _scaled_sigmoid(pre)
    return pre


@triton.jit
def activation_gradient(dy, pre, ACTIVATION: tl.constexpr):
    """U dy activation'(U pre): silu'(z) = s (1 + z (1 - s)), with s = sigmoid(z)."""
    if ACTIVATION == "silu":
        s = _scaled_sigmoid(pre)
        return (dy * s) * (pre * (LN_2 - s) - 1.0)
    return dy


@triton.jit
def _scaled_sigmoid(pre):
    """ln 2 sigmoid(U pre) = ln 2 / (1 + exp2(pre)) within 3e-7. A squared root takes two instructions, not eight."""
    root = tl.rsqrt(tl.exp2(pre) * LOG2_E + LOG2_E)
    return root * root
