"""Inputs of recomputed layers that wait on the host between their forward and their backward.

On a GPU, copies run on a stream of their own into pinned memory: to the host while the next layers compute, and back
one layer ahead of the backward, which recomputes and differentiates a layer meanwhile. On a CPU they are plain copies.
"""

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Waiting:
    """One tensor on the host. `before`: the tensor that was put there before it, and is needed after it."""

    def __init__(self, x: Tensor, stream: Any, before: "_Waiting | None"):
        self.device, self.stream, self.back = x.device, stream, None
        self.before = None if before is None else ref(before)
        x = x.detach()
        if stream is None:
            self.host = x.clone()
            return
        self.host = torch.empty_like(x, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not reused before the copy is done

    def fetch(self) -> Tensor:
        """Begin the copy back, if it has not begun."""
        if self.back is None and self.stream is None:
            self.back = self.host.clone()
        elif self.back is None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)
        assert self.back is not None
        return self.back

    def take(self) -> Tensor:
        """The tensor on its device; the copy of the one before begins."""
        x, self.back = self.fetch(), None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            x.record_stream(current)
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return x


class waiting_on_host(saved_tensors_hooks):
    """Floating-point tensors on `device` that autograd saves inside wait on the host: inside a checkpointed call, its
    arguments alone (older versions of PyTorch add an empty tensor). Entered again for every layer.
    """

    def __init__(self, device: torch.device):
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        last: _Waiting | None = None

        def pack(x: Tensor) -> Tensor | _Waiting:
            nonlocal last
            if x.device != device or not x.is_floating_point() or not x.numel():
                return x
            last = _Waiting(x, stream, last)
            return last

        def unpack(packed: Tensor | _Waiting) -> Tensor:
            return packed.take() if isinstance(packed, _Waiting) else packed

        super().__init__(pack, unpack)
