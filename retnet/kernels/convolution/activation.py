"""The activation after the short convolution, and its derivative."""

import triton
import triton.language as tl


@triton.jit
def activated(pre, ACTIVATION: tl.constexpr):
    """silu(pre) = pre sigmoid(pre), or pre, in float32."""
    if ACTIVATION == "silu":
        return pre * tl.sigmoid(pre)
    return pre


@triton.jit
def activation_slope(pre, ACTIVATION: tl.constexpr):
    """d activated / d pre."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(pre)
        return gate * (1.0 + pre * (1.0 - gate))
    return tl.full(pre.shape, 1.0, tl.float32)
