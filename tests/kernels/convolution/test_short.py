"""The short convolution's kernels against its definition in float64: outputs, states, gradients; packs, strides."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from retnet.ops import short_convolution as ops

pytest.importorskip("triton")

from retnet.kernels.convolution import recorded
from retnet.kernels.convolution.geometry import Geometry
from retnet.kernels.convolution.short import (
    Convolution,
    convolution_backward,
    convolution_forward,
)

NAMES = ("y", "final", "dx", "dweight", "dbias", "drecent")


def by_definition(x: Tensor, weight: Tensor, bias: Tensor, recent: Tensor, bounds: list[int] | None, activation: str):
    """y [B, T, C] and the last inputs [N, W - 1, C], every sequence by itself through PyTorch's convolution."""
    past = weight.shape[-1] - 1
    parts = list(x) if bounds is None else [x[0, a:b] for a, b in pairwise(bounds)]
    outs, finals = [], []
    for part, before in zip(parts, recent, strict=True):
        inputs = torch.cat([before, part])
        outs.append(part)  # of no token, where silu(nothing) is nothing
        if len(part):
            outs[-1] = torch.nn.functional.conv1d(inputs.mT[None], weight, bias, groups=weight.shape[0])[0].mT
        finals.append(inputs[len(inputs) - past :])
    y = torch.stack(outs) if bounds is None else torch.cat(outs)[None]
    return torch.nn.functional.silu(y) if activation == "silu" else y, torch.stack(finals)


def inputs(B: int, T: int, C: int, W: int, sequences: int, device: str) -> list[Tensor]:
    """x is a part of a wider tensor, as the layers' inputs are."""
    torch.manual_seed(0)
    x = torch.randn(B, T, 2 * C + 3, device=device)[..., 3 : 3 + C]
    weight, bias = torch.randn(C, 1, W, device=device), torch.randn(C, device=device)
    return [x, weight, bias, torch.randn(sequences, W - 1, C, device=device)]


def by_kernels(
    tensors: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    activation: str = "silu",
    tile: Geometry | None = None,
) -> list[Tensor]:
    call = Convolution(*tensors, cu_seqlens, activation)
    return [*convolution_forward(call, tile), *convolution_backward(call, dy, dfinal, tile)]


CASES = [
    pytest.param(2, 35, 5, 4, None, id="several segments"),
    pytest.param(1, 1, 3, 8, None, id="one token"),
    pytest.param(3, 2, 3, 4, None, id="fewer tokens than the width"),
    pytest.param(1, 17, 1, 6, None, id="one channel"),
    pytest.param(1, 18, 130, 5, None, id="more channels than a program has"),
    pytest.param(1, 40, 7, 3, [0, 1, 1, 21, 40], id="packed with an empty document"),
    pytest.param(1, 24, 4, 7, [0, 2, 5, 24], id="packed with documents shorter than the width"),
    pytest.param(1, 9, 6, 2, [0, 0, 9, 9], id="packed with empty documents at both ends"),
    pytest.param(2, 0, 3, 4, None, id="no token"),
    pytest.param(1, 0, 3, 4, [0, 0, 0], id="no token, packed"),
]


def agrees(name: str, ours: Tensor, right: Tensor) -> None:
    assert ours.shape == right.shape, name
    assert (ours.double() - right).norm() <= 2e-6 * right.norm(), name


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("B", "T", "C", "W", "bounds"), CASES)
def test_kernels_agree_with_the_definition(B, T, C, W, bounds, activation, device):
    tensors = inputs(B, T, C, W, B if bounds is None else len(bounds) - 1, device)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    wide = [z.double().requires_grad_() for z in tensors]
    expected = by_definition(*wide, bounds, activation)
    dy, dfinal = (torch.randn_like(z) for z in expected)
    loss = (expected[0] * dy).sum() + (expected[1] * dfinal).sum()
    expected = [*expected, *torch.autograd.grad(loss, wide, materialize_grads=True)]
    strided = torch.randn(*dy.shape[:2], C + 1, device=device)
    strided[..., :C] = dy
    found = by_kernels(tensors, cu_seqlens, strided[..., :C], dfinal.float(), activation)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        agrees(name, a, b)


@pytest.mark.parametrize(
    "tile",
    [Geometry(16, 8, 1), Geometry(32, 4, 3), Geometry(64, 8, 16)],
    ids=["a row at a time", "rows that do not divide the segment", "more rows than the width"],
)
def test_the_geometry_does_not_change_a_bit_of_the_rows(tile, device):
    tensors, bounds = inputs(1, 21, 5, 4, 2, device), torch.tensor([0, 19, 21], device=device)
    dy, dfinal = torch.randn(1, 21, 5, device=device), torch.randn(2, 3, 5, device=device)
    for name, a, b in zip(
        NAMES, by_kernels(tensors, bounds, dy, dfinal, tile=tile), by_kernels(tensors, bounds, dy, dfinal), strict=True
    ):
        if name in ("dweight", "dbias"):
            agrees(name, a, b.double())
        else:
            assert torch.equal(a, b), name


def test_without_recent_inputs_a_sequence_starts_from_zeros(device):
    x, weight, bias, recent = inputs(2, 18, 5, 4, 2, device)
    dy = torch.randn(2, 18, 5, device=device)
    without = by_kernels([x, weight, bias, None], None, dy, None)
    zeros = by_kernels([x, weight, bias, torch.zeros_like(recent)], None, dy, None)
    assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True))


def test_a_packed_document_is_bit_identical_to_the_same_document_alone_whatever_its_neighbours_are(device):
    x, weight, bias, recent = inputs(1, 40, 5, 4, 3, device)
    dy, dfinal = torch.randn(1, 40, 5, device=device), torch.randn(3, 3, 5, device=device)
    bounds, own = torch.tensor([0, 6, 25, 40], device=device), slice(6, 25)
    alone = by_kernels([x[:, own], weight, bias, recent[1:2]], None, dy[:, own], dfinal[1:2])
    for z, inside in ((x, own), (dy, own)):
        z[:, : inside.start], z[:, inside.stop :] = torch.nan, torch.nan
    recent[::2], dfinal[::2] = torch.nan, torch.nan
    packed = by_kernels([x, weight, bias, recent], bounds, dy, dfinal)
    for name, a, b in zip(NAMES, packed, alone, strict=True):
        if name in ("y", "dx"):
            assert torch.equal(a[:, own], b), name
        if name in ("final", "drecent"):
            assert torch.equal(a[1:2], b), name


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["", "float32 weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype, weight_dtype, device):
    tensors = [z.to(dtype) for z in inputs(1, 18, 5, 4, 1, device)]
    tensors[1:3] = [z.to(weight_dtype or dtype) for z in tensors[1:3]]
    wide = [z.double().requires_grad_() for z in tensors]
    y, final = by_definition(*wide, None, "silu")
    dy = torch.randn_like(y).to(dtype)
    expected = [y, final, *torch.autograd.grad(y, wide, dy.double())]
    found = by_kernels(tensors, None, dy, None)
    dtypes = [dtype, dtype, dtype, tensors[1].dtype, tensors[2].dtype, dtype]
    for name, a, b, kind in zip(NAMES, found, expected, dtypes, strict=True):
        assert a.dtype == kind, name
        assert (a.double() - b).norm() <= (torch.finfo(kind).eps / 2 + 2e-6) * b.norm(), name
    assert torch.equal(found[1].double(), final)


def test_calls_of_one_kind_are_replayed_on_their_own_tensors(device):
    recorded.forward_passes.forget()
    recorded.backward_passes.forget()
    cu_seqlens = torch.tensor([0, 2, 2, 6], device=device)
    first = inputs(1, 6, 5, 4, 3, device)
    wide = torch.randn(1, 6, 2 * 5 + 3, device=device)
    second = [wide[..., 3 : 3 + 5], *(z / 2 for z in first[1:])]
    dys = [torch.randn(1, 6, 5, device=device) for _ in range(2)]
    for n in range(4):  # the first runs, the second is recorded
        tensors, dy = (first, second)[n % 2], dys[n % 2]
        found = recorded.convolve(*tensors, cu_seqlens, "silu")
        gradients = recorded.convolve_backward(dy, None, *tensors, cu_seqlens, "silu")
        for a, b in zip((*found, *gradients), by_kernels(tensors, cu_seqlens, dy, None), strict=True):
            assert torch.equal(a, b)
    assert any(recorded.forward_passes._found.values())
    assert any(recorded.backward_passes._found.values())


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_the_operator_has_the_shapes_and_gradients_of_its_kernels(activation, device):
    """`torch.ops.retnet.short_convolution` and its autograd, on a CPU through kernels registered there."""
    if device == "cpu":

        def forward(*arguments):
            return recorded.convolve(*arguments)

        def backward(dy, dfinal, *arguments):
            return recorded.convolve_backward(dy, dfinal, *arguments)

        ops._convolution_cuda.register_kernel("cpu")(forward)
        ops._convolution_backward_cuda.register_kernel("cpu")(backward)
    tensors = [z.requires_grad_() for z in inputs(1, 6, 5, 4, 2, device)]
    cu_seqlens = torch.tensor([0, 2, 6], device=device)
    if activation == "silu":  # the checks of the operator itself take longest and do not depend on the activation
        torch.library.opcheck(torch.ops.retnet.short_convolution, (*tensors, cu_seqlens, activation))
    y, final = torch.ops.retnet.short_convolution(*tensors, cu_seqlens, activation)
    dy = torch.randn_like(y)
    found = torch.autograd.grad((y * dy).sum() + final.square().sum(), tensors)
    wide = [z.detach().double().requires_grad_() for z in tensors]
    y, final = by_definition(*wide, [0, 2, 6], activation)
    expected = torch.autograd.grad((y * dy).sum() + final.square().sum(), wide)
    for name, a, b in zip(NAMES[2:], found, expected, strict=True):
        agrees(name, a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, 3, 4, 8])
@pytest.mark.parametrize(("C", "W"), [(1, 2), (100, 3), (257, 4), (512, 5), (768, 6), (1000, 7), (96, 8)])
def test_slices_at_any_offset_of_any_width_agree_with_the_definition(C, W, offset, dtype, device):
    torch.manual_seed(0)
    B, T = 2, 700
    product, dys = (torch.randn(B, T, C + 16, device=device, dtype=dtype) for _ in range(2))
    weight, bias, recent = (torch.randn(s, device=device, dtype=dtype) for s in ((C, 1, W), (C,), (B, W - 1, C)))
    x, dy = product[..., offset : offset + C], dys[..., offset : offset + C]
    wide = [z.double().requires_grad_() for z in (x, weight, bias, recent)]
    y, final = by_definition(*wide, None, "silu")
    expected = [y, final, *torch.autograd.grad(y, wide, dy.double())]
    for name, a, b in zip(NAMES, by_kernels([x, weight, bias, recent], None, dy, None), expected, strict=True):
        size = b.norm()
        if name in ("dweight", "dbias"):  # sums over tokens may cancel: their error is of the size of their terms
            size = max(size, (B * T * b.numel()) ** 0.5)
        assert (a.double() - b).norm() <= torch.finfo(dtype).eps / 2 * b.norm() + 2e-6 * size, name


@pytest.mark.gpu
def test_the_public_function_gives_the_same_with_kernels_and_without(device, monkeypatch):
    tensors = [z.requires_grad_() for z in inputs(1, 1000, 96, 4, 3, device)]
    x, weight, bias, recent = tensors
    cu_seqlens = torch.tensor([0, 300, 300, 1000], device=device)

    def results():
        y, final = ops.short_convolution(
            x, weight, bias, activation="silu", recent=recent, cu_seqlens=cu_seqlens
        )  # fmt: skip
        return [y, final, *torch.autograd.grad(y.square().sum() + final.square().sum(), tensors)]

    one, two = results(), results()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    monkeypatch.setattr(ops, "KERNEL_DTYPES", ())
    for a, b in zip(one, results(), strict=True):
        assert (a - b).norm() <= 4e-6 * b.norm()
