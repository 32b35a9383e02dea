"""The passes of a selective scan, recorded and replayed."""

from torch import Tensor

from retnet.kernels.layout import layout
from retnet.kernels.recording import Recordings
from retnet.kernels.scan.backward import scan_backward
from retnet.kernels.scan.forward import scan_forward
from retnet.kernels.scan.inputs import Scan

forward_passes, backward_passes = Recordings(), Recordings()


def scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`scan_forward` of one call's inputs."""
    inputs = x, step, rate, write, read, state, cu_seqlens
    key = (*map(layout, inputs), segment)
    y, final, starts = forward_passes.run(key, inputs, lambda: scan_forward(Scan.of(*inputs, segment)))
    return y, final, starts


def scan_gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    starts: Tensor,
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan_backward` of one call's inputs."""
    inputs = x, step, rate, write, read, state, cu_seqlens
    given = (*inputs, dy, dfinal, starts)
    dx, dstep, drate, dwrite, dread, dstate = backward_passes.run(
        (*map(layout, given), segment), given, lambda: scan_backward(Scan.of(*inputs, segment), starts, dy, dfinal)
    )
    return dx, dstep, drate, dwrite, dread, dstate
