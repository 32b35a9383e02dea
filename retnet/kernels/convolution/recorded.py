"""The passes of a short convolution, recorded and replayed."""

from torch import Tensor

from retnet.kernels.convolution.short import Convolution, convolution_backward, convolution_forward
from retnet.kernels.layout import layout
from retnet.kernels.recording import Recordings

forward_passes, backward_passes = Recordings(), Recordings()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor | None, cu_seqlens: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """`convolution_forward` of one call's inputs."""
    inputs = x, weight, bias, recent, cu_seqlens
    key = (*map(layout, inputs), activation)
    y, final = forward_passes.run(key, inputs, lambda: convolution_forward(Convolution(*inputs, activation)))
    return y, final


def convolve_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recent: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`convolution_backward` of one call's inputs."""
    inputs = x, weight, bias, recent, cu_seqlens
    given = (*inputs, dy, dfinal)
    dx, dweight, dbias, drecent = backward_passes.run(
        (*map(layout, given), activation),
        given,
        lambda: convolution_backward(Convolution(*inputs, activation), dy, dfinal),
    )
    return dx, dweight, dbias, drecent
