"""The activation after the short convolution, and its derivative."""

import triton
import triton.language as tl


@triton.jit
def activated(pre, ACTIVATION: tl.constexpr):
    """silu(pre) = pre sigmoid(pre), or pre, in float32."""
    if ACTIVATION == "silu":
        return pre * _sigmoid(pre)
    return pre


@triton.jit
def activation_gradient(dy, pre, ACTIVATION: tl.constexpr):
    """dy d activated / d pre: silu' = s + silu (1 - s), with s = sigmoid(pre)."""
    if ACTIVATION == "silu":
        s = _sigmoid(pre)
        y = pre * s
        return dy * (s + y - y * s)
    return dy


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) within 3e-7. exp2 is one instruction, exp four; a squared root two, a division eight."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root
