"""Devices: the one that a user names, whether a tensor goes to kernels, and the GPU that Triton launches on."""

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from retnet.system.checks import quoted
from retnet.system.machine import cpu_name
from retnet.system.sizes import quantity
from retnet.system.suggest import did_you_mean

_NAMES = ("auto", "cpu", "cuda")


def resolve_device(device: torch.device | str) -> torch.device:
    """The device that a user names; "auto" is the GPU if there is one, otherwise the CPU.

    Raises ValueError for a name that torch does not know, a kind without kernels (mps, xpu, meta), and a device that is
    not there.
    """
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"device is {quoted(device)}; accepted: auto, cpu, cuda, cuda:0, ...")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        meant = did_you_mean(str(device), _NAMES)
        raise ValueError(f"device is {quoted(str(device))}; accepted: auto, cpu, cuda, cuda:0, ...{meant}") from error
    if found.type not in ("cpu", "cuda"):  # the operators have kernels for these; AMD's devices are called cuda too
        raise ValueError(f"device is {quoted(str(device))}, which has no kernels here; accepted: auto, cpu, cuda")
    if found.type == "cuda" and not num_gpus:
        raise ValueError(f"device is {quoted(str(device))} and there is no CUDA device here; accepted: cpu, auto")
    if found.type == "cuda" and (found.index or 0) >= num_gpus:
        raise ValueError(f"device is {quoted(str(device))}; accepted: auto, cpu, cuda:0 to cuda:{num_gpus - 1}")
    return found


def hardware(device: torch.device) -> str:
    """A device for captions and reports: 'NVIDIA H200', or 'AMD EPYC 9654, 2 threads' for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {num_threads()}"


def num_threads() -> str:
    """The threads of torch's operators in words: '1 thread', '2 threads'."""
    return quantity(torch.get_num_threads(), "thread")


def current_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one; does nothing where it is already, and on a CPU."""
    return torch.cuda.device(x.device) if _is_elsewhere(x) else nullcontext()


def _is_elsewhere(x: Tensor) -> bool:
    """Whether x is on a GPU that is not the current one."""
    return x.device.type == "cuda" and x.device.index != torch.cuda.current_device()


def own_modes(x: Tensor) -> AbstractContextManager[object]:
    """The modes of torch for work whose results must not depend on the caller's: x's device is current, and autocast,
    gradients and inference mode are off. Tensors made in inference mode could not be updated outside it."""
    kind = x.device.type
    if not (torch.is_autocast_enabled(kind) or torch.is_inference_mode_enabled() or _is_elsewhere(x)):
        return torch.no_grad()  # usually; the others take as long as the host's part of a decode step
    modes = ExitStack()
    modes.enter_context(current_device_of(x))
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.no_grad())
    modes.enter_context(torch.autocast(kind, enabled=False))
    return modes


def uses_kernels(x: Tensor) -> bool:
    """Whether the decode operators run as GPU kernels for x; otherwise they are torch operators chosen for a CPU."""
    return x.is_cuda
