"""Derivatives beyond the first one in reverse mode, through an operator's plain form.

An operator with kernels of its own has a hand-written backward, which is opaque to autograd. Its plain form computes
the same function in torch's operators, which autograd differentiates any number of times, in reverse and in forward
mode, and which every transform of torch.func takes. Operators run it where a derivative passes through the call itself
(`needs_plain_form`) or through its gradients (`plain_gradients`); it takes more time and memory than the kernels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether a transform of torch.func or a level of forward mode is active: any tensor may be a part of it."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_plain_form(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is active, or one of the tensors has a tangent in forward mode.

    Also for the batched gradients of `torch.autograd.grad(is_grads_batched=True)`.
    """
    if torch._C._are_functorch_transforms_active() or has_tangent(*tensors):
        return True
    if torch.compiler.is_compiling():  # cannot trace the question, and traces no batched gradients
        return False
    return any(x is not None and is_legacy_batchedtensor(x) for x in tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent in forward mode."""
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def plain_gradients(
    plain: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of plain(*inputs) for the needed inputs, as functions of the inputs and of the cotangents.

    cotangents: one per output of `plain`; None where it is zero. For a backward that runs with gradients enabled, as
    under `create_graph=True`.
    """
    with torch.enable_grad():
        # Views, so that the gradient of an input leaves out the path through another input that was computed from it.
        views = [x if x is None else x.view_as(x) for x in inputs]
        pairs = zip(plain(*views), cotangents, strict=True)
        outputs = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
        wanted = {n: x for n, x in enumerate(views) if x is not None and needed[n]}
        found = [torch.zeros_like(x) for x in wanted.values()]
        if outputs:
            ys, dys = zip(*outputs)
            found = torch.autograd.grad(ys, [*wanted.values()], dys, create_graph=True, materialize_grads=True)
    gradients = dict(zip(wanted, found, strict=True))
    return [gradients.get(n) for n in range(len(views))]
