"""Offsets beyond 2^31 elements: tokens that are far apart in memory give the results of tokens that lie together.

Only the interpreter runs these tests: there, pages of a buffer of several GB exist once touched. Whole segments
of retention are less than 2^31 elements long, so its offsets are 64-bit up to a segment's first token alone.
"""

from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the buffers would be real memory")
TOKENS = 9
ROW_STRIDES = [1 << 28, (1 << 29) + 16]  # the last token begins at 2^31, and beyond 2^32


def far(x: Tensor, stride: int) -> Tensor:
    """x [1, T, C] with tokens `stride` elements apart."""
    _, T, C = x.shape
    return torch.empty((T - 1) * stride + C, dtype=x.dtype).as_strided((1, T, C), (T * stride, stride, 1)).copy_(x)


def assert_equal(near: object, away: object) -> None:
    for a, b in zip(near, away, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("stride", ROW_STRIDES)
def test_short_convolution(stride):
    from retnet.kernels.convolution.short import Convolution, convolution_backward, convolution_forward

    x, dy, weight, bias = torch.randn(1, TOKENS, 16), torch.randn(1, TOKENS, 16), torch.randn(16, 1, 4), torch.randn(16)
    near, away = (Convolution(z, weight, bias, None, None, "silu") for z in (x, far(x, stride)))
    assert_equal(convolution_forward(near), convolution_forward(away))
    assert_equal(convolution_backward(near, dy, None), convolution_backward(away, far(dy, stride), None))


@pytest.mark.parametrize("stride", ROW_STRIDES)
def test_selective_scan(stride):
    from retnet.kernels.scan.backward import scan_backward
    from retnet.kernels.scan.forward import scan_forward
    from retnet.kernels.scan.inputs import Scan

    D, N = 16, 4
    x, step, write, read = torch.randn(1, TOKENS, D), torch.rand(1, TOKENS, D), *torch.randn(2, 1, TOKENS, N)
    dy, rate = torch.randn(1, TOKENS, D), -torch.rand(D, N)
    near = Scan.of(x, step, rate, write, read, None, None, 4)
    away = Scan.of(far(x, stride), far(step, stride), rate, far(write, stride), far(read, stride), None, None, 4)
    assert away.x.stride(1) == stride
    outputs = scan_forward(near)
    assert_equal(outputs, scan_forward(away))
    assert_equal(scan_backward(near, outputs[2], dy, None), scan_backward(away, outputs[2], dy, None))


@pytest.mark.parametrize("per_token", [False, True])
def test_retention(per_token):
    from retnet.kernels.retention.dispatch import retention_backward, retention_forward
    from retnet.kernels.retention.problem import RetentionProblem

    T, stride = 160, (1 << 24) + 16
    q, k, v, dout = torch.randn(4, 1, T, 16)
    log_decay = -torch.rand((1, T, 1) if per_token else (1,))

    def problem(*tensors: Tensor) -> RetentionProblem:
        return RetentionProblem(*(z[:, :, None] for z in tensors), log_decay, 0.25, None, None, None, 64)

    near, away = problem(q, k, v), problem(*(far(z, stride) for z in (q, k, v)))
    assert (T - 1) * away.q.stride(1) > 2**31
    assert_equal(retention_forward(near, torch.float32), retention_forward(away, torch.float32))
    grads = [
        retention_backward(p, dout[:, :, None], None, need_dlog_decay=True, need_dstate=False) for p in (near, away)
    ]
    assert_equal(*map(astuple, grads))
