"""The selective scan's kernels against its definition in float64: outputs, states, gradients; packs, strides, tails."""

import pytest
import torch
from torch import Tensor

from retnet.ops.ragged import equal_blocks

pytest.importorskip("triton")


def by_definition(x, step, rate, write, read, state, bounds):
    """y [B, T, D] and the last states [S, D, N], token after token."""
    outs, finals = [], []
    for rows, span, sequences in equal_blocks(x.shape[0], x.shape[1], bounds):
        h, out = state[sequences], []
        for t in range(span.start, span.stop):
            decay = (step[rows, t, :, None] * rate).exp()
            h = decay * h + torch.einsum("bd,bn->bdn", step[rows, t] * x[rows, t], write[rows, t])
            out.append(torch.einsum("bdn,bn->bd", h, read[rows, t]))
        outs.append(torch.stack(out, 1) if out else x[rows, :0])
        finals.append(h)
    return torch.cat(outs, 1), torch.cat(finals)


def inputs(B: int, T: int, D: int, N: int, sequences: int, device: str) -> list[Tensor]:
    """write and read are parts of one wider tensor, as the layer's are; one channel's decay underflows to 0."""
    torch.manual_seed(0)
    x, step = torch.randn(B, T, D, device=device), torch.rand(B, T, D, device=device) + 0.01
    rate = -torch.rand(D, N, device=device) * torch.tensor([0.01, 0.1, 1.0], device=device)[torch.arange(N) % 3]
    rate[0, 0] = -1e4
    joint = torch.randn(B, T, 2 * N + 3, device=device)
    return [x, step, rate, joint[..., 3 : 3 + N], joint[..., 3 + N :], torch.randn(sequences, D, N, device=device)]


def both(tensors, cu_seqlens, dy, dfinal):
    """Results and gradients of the kernels."""
    from retnet.kernels.scan.backward import scan_backward
    from retnet.kernels.scan.forward import scan_forward
    from retnet.kernels.scan.inputs import Scan

    scan = Scan.of(*tensors, cu_seqlens, segment=16)
    y, final, starts = scan_forward(scan)
    dx, dstep, drate, dwrite, dread, dstate = scan_backward(scan, starts, dy, dfinal)
    return [y, final, dx, dstep, drate, dwrite, dread, dstate]


CASES = [
    pytest.param(2, 37, 5, 4, None, id="ragged tails"),
    pytest.param(1, 1, 3, 1, None, id="one token"),
    pytest.param(1, 45, 70, 16, [0, 33, 33, 34, 45], id="packed"),
    pytest.param(2, 0, 3, 4, None, id="no tokens"),
]


@pytest.mark.parametrize(("B", "T", "D", "N", "bounds"), CASES)
def test_kernels_agree_with_the_definition(B, T, D, N, bounds, device):
    sequences = B if bounds is None else len(bounds) - 1
    tensors = inputs(B, T, D, N, sequences, device)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    wide = [z.double().requires_grad_() for z in tensors]
    expected = by_definition(*wide, bounds)
    dy, dfinal = (torch.randn_like(z) for z in expected)
    loss = (expected[0] * dy).sum() + (expected[1] * dfinal).sum()
    expected = [*expected, *torch.autograd.grad(loss, wide, materialize_grads=True)]
    names = ("y", "final", "dx", "dstep", "drate", "dwrite", "dread", "dstate")
    found = both(tensors, cu_seqlens, dy.float(), dfinal.float())
    for name, a, b in zip(names, found, expected, strict=True):
        assert a.shape == b.shape, name
        assert (a.double() - b).norm() <= 2e-6 * b.norm(), name


def test_a_packed_sequence_is_bit_identical_to_the_same_sequence_alone(device):
    tensors = inputs(1, 70, 6, 4, 2, device)
    *tokens, state = tensors
    dy = torch.randn(1, 70, 6, device=device)
    packed = both(tensors, torch.tensor([0, 40, 70], device=device), dy, None)
    first = [z if z is tokens[2] else z[:, :40] for z in tokens]
    alone = both([*first, state[:1]], None, dy[:, :40], None)
    for a, b in zip(packed[:1] + packed[2:4] + packed[5:7], alone[:1] + alone[2:4] + alone[5:7], strict=True):
        assert torch.equal(a[:, :40], b)
    assert torch.equal(packed[1][:1], alone[1])
    assert torch.equal(packed[7][:1], alone[7])


def test_calls_of_one_kind_are_replayed_on_their_own_tensors(device):
    from retnet.kernels.scan import recorded

    recorded.forward_passes.forget()
    recorded.backward_passes.forget()
    cu_seqlens = torch.tensor([0, 7, 19], device=device)
    first = inputs(1, 19, 5, 4, 2, device)
    joint = torch.randn(1, 19, 11, device=device)
    second = [first[0] / 2, first[1] / 3, first[2] / 4, joint[..., 3:7], joint[..., 7:], first[5] / 5]
    dys = [torch.randn(1, 19, 5, device=device) for _ in range(2)]
    for n in range(4):  # the first runs, the second is recorded
        tensors, dy = (first, second)[n % 2], dys[n % 2]
        y, final, starts = recorded.scan(*tensors, cu_seqlens, 16)
        gradients = recorded.scan_gradients(dy, None, starts, *tensors, cu_seqlens, 16)
        for a, b in zip((y, final, *gradients), both(tensors, cu_seqlens, dy, None), strict=True):
            assert torch.equal(a, b)
    assert any(recorded.forward_passes._found.values())
    assert any(recorded.backward_passes._found.values())


def test_the_operator_has_the_shapes_and_gradients_of_its_kernels(device):
    """`torch.ops.retnet.selective_scan` and its autograd, on a CPU through kernels registered there."""
    from retnet.kernels.scan.recorded import scan, scan_gradients
    from retnet.ops import selective_scan as ops

    if device == "cpu":

        def forward(*arguments):
            return scan(*arguments, 32)

        def backward(dy, dfinal, *rest):
            return scan_gradients(dy, dfinal, rest[-1], *rest[:-1], 32)

        ops._scan_cuda.register_kernel("cpu")(forward)
        ops._scan_backward_cuda.register_kernel("cpu")(backward)
    *tokens, state = (z.requires_grad_() for z in inputs(1, 19, 5, 4, 2, device))
    cu_seqlens = torch.tensor([0, 7, 19], device=device)
    torch.library.opcheck(torch.ops.retnet.selective_scan, (*tokens, state, cu_seqlens))
    y, final, _ = torch.ops.retnet.selective_scan(*tokens, state, cu_seqlens)
    dy = torch.randn_like(y)
    found = torch.autograd.grad((y * dy).sum() + final.square().sum(), (*tokens, state))
    wide = [z.detach().double().requires_grad_() for z in (*tokens, state)]
    y, final = by_definition(*wide, [0, 7, 19])
    expected = torch.autograd.grad((y * dy).sum() + final.square().sum(), wide)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


@pytest.mark.gpu
def test_two_runs_at_full_size_give_the_same_bits_and_the_gradients_of_float64(device):
    tensors = inputs(2, 1000, 96, 16, 2, device)
    dy = torch.randn(2, 1000, 96, device=device)
    one, two = both(tensors, None, dy, None), both(tensors, None, dy, None)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    wide = [z.double().requires_grad_() for z in tensors]
    expected = by_definition(*wide, None)
    grads = torch.autograd.grad((expected[0] * dy).sum(), wide)
    for a, b in zip(one, [*expected, *grads], strict=True):
        assert (a.double() - b).norm() <= 4e-6 * b.norm()
