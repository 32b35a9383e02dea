"""Checks that need PyTorch: devices and their speed, and a self-check of the package on tiny inputs.

Every check yields findings and imports what it needs inside. A check that raises is a problem with the error's text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from retnet.cli.diagnosis.finding import Finding, reason
from retnet.cli.diagnosis.installation import driver
from retnet.system.extras import LIBRARIES, install_command
from retnet.system.machine import usable_cores
from retnet.system.sizes import format_bytes

if TYPE_CHECKING:
    from retnet.models.lm import LanguageModel

TORCH = "PyTorch"
SHAPE = (1, 48, 2, 16, 32)  # B, T, H, K, V of the operator's inputs
GPU_SHAPE = (1, 128, 2, 64, 128)
CHUNKS = (16,)
TOKENS = 24
PRODUCT, PRODUCT_SECONDS = 512, 0.15


def torch_build() -> Iterator[Finding]:
    """The build of torch, its threads and its mathematics library."""
    import torch

    cuda = torch.version.cuda or getattr(torch.version, "hip", None)
    yield Finding(TORCH, "ok", f"{torch.__version__}, built for {f'CUDA {cuda}' if cuda else 'CPUs'}")
    threads, cores = torch.get_num_threads(), usable_cores()
    library = "MKL" if torch.backends.mkl.is_available() else _blas()
    text = f"{threads} threads, {library}, instructions {torch.backends.cpu.get_cpu_capability()}"
    if threads < cores:
        told = [f"{n}={os.environ[n]}" for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if n in os.environ]
        why = f" ({', '.join(told)})" if told else ""
        advice = f"unset {told[0].partition('=')[0]}" if told else f"set OMP_NUM_THREADS={cores}"
        yield Finding("threads", "slow", f"{text}: {threads} of {cores} cores are used{why}", advice)
    else:
        yield Finding("threads", "ok", text)


def _blas() -> str:
    import torch

    line = next((x for x in torch.__config__.show().splitlines() if "BLAS_INFO" in x), "")
    return line.partition("BLAS_INFO=")[2].partition(",")[0] or "BLAS of unknown kind"


def devices() -> Iterator[Finding]:
    """The GPUs that torch can use; why it cannot where there seems to be one."""
    import torch

    loaded = driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            text = f"{properties.name}, capability {properties.major}.{properties.minor}, "
            yield Finding(f"GPU {index}", "ok", f"{text}{format_bytes(free, 3)} of {format_bytes(total, 3)} free")
    elif loaded and torch.version.cuda is None:
        yield Finding(
            "GPU",
            "slow",
            f"this PyTorch is built for CPUs, and an NVIDIA driver is loaded ({loaded}): the GPU is not used",
            "install a build of PyTorch for CUDA: https://pytorch.org/get-started/locally",
        )
    elif torch.version.cuda is not None:
        try:
            torch.cuda.init()
            why = "no device"
        except Exception as error:
            why = reason(error)
        advice = "" if loaded is None else "compare the driver's CUDA version with that of PyTorch: nvidia-smi"
        yield Finding("GPU", "problem" if loaded else "note", f"PyTorch finds none ({why})", advice)
    else:
        yield Finding("GPU", "note", "none: no NVIDIA driver is loaded, and PyTorch is built for CPUs")


def processor_speed() -> Iterator[Finding]:
    """Measured rates of matrix products on one core; whether bfloat16 is slower than float32.

    They are operations per second of processor time, which other processes do not change.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {dtype: _product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    finally:
        torch.set_num_threads(threads)
    shown = ", ".join(f"{str(d).removeprefix('torch.')} {rate / 1e9:,.0f} GFLOP/s" for d, rate in rates.items())
    text = f"products of {PRODUCT} x {PRODUCT} on one core, measured: {shown}"
    if rates[torch.bfloat16] < rates[torch.float32]:
        yield Finding("CPU speed", "slow", f"{text}: bfloat16 is slower", "on this CPU, keep models in float32")
    else:
        yield Finding("CPU speed", "ok", text)


def _product_rate(dtype: object) -> float:
    import torch

    a = torch.linspace(-1, 1, PRODUCT * PRODUCT).view(PRODUCT, PRODUCT).to(dtype)  # type: ignore[call-overload]
    times: list[float] = []
    while len(times) < 3 or (sum(times) < PRODUCT_SECONDS and len(times) < 50):
        began = time.process_time()
        torch.mm(a, a)
        times.append(max(time.process_time() - began, 1e-6))
    return 2 * PRODUCT**3 / min(times)


def forms_agree() -> Iterator[Finding]:
    """The three forms of the operator, and of a small model, against float64."""
    from retnet.eval.agreement import check_model, check_operator

    rows = [*check_operator(SHAPE, ["float32"], CHUNKS), *check_model(_model(), _ids(), ["float32"], CHUNKS)]
    failed = [f"{row.way} differs by {row.relative:.1e}" for row in rows if not row.passed]
    if failed:
        yield Finding("forms agree", "problem", "; ".join(failed), "results of this installation cannot be trusted")
    else:
        worst = max(row.relative for row in rows)
        text = f"parallel, recurrent and chunkwise, {len(rows)} ways, differ from float64 by at most {worst:.0e}"
        yield Finding("forms agree", "ok", text)


def train_step() -> Iterator[Finding]:
    """A few steps of AdamW on one small batch: the loss is finite and falls."""
    import torch
    import torch.nn.functional as F

    model, ids = _model().train(), _ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    text = f"the loss of one batch goes from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses) - 1} steps"
    learns = losses[-1] < losses[0]  # False for nan
    yield Finding("training step", "ok" if learns else "problem", text)


def save_and_load() -> Iterator[Finding]:
    """A model that is saved and loaded gives the same bits."""
    import torch

    from retnet.models.directory import load_model, save_model

    model, ids = _model(), _ids()
    with TemporaryDirectory() as folder, torch.inference_mode():
        save_model(model, folder)
        same = torch.equal(load_model(Path(folder))(ids).logits, model(ids).logits)
    text = "a saved model gives the same logits" if same else "a saved model gives other logits"
    yield Finding("save and load", "ok" if same else "problem", text)


def kernels() -> Iterator[Finding]:
    """Triton's kernels compile and agree with float64 on the GPU, forward and backward."""
    import torch

    name = "kernels"
    if not torch.cuda.is_available():
        yield Finding(name, "not run", "they are for GPUs; a CPU runs PyTorch's operators")
        return
    if find_spec("triton") is None:
        text = "triton is not installed: the kernels cannot run"
        yield Finding(name, "problem", text, install_command("triton"))
        return
    from retnet.eval.agreement import check_operator
    from retnet.ops.retention import retention

    began = time.perf_counter()
    rows = list(check_operator(GPU_SHAPE, ["bfloat16", "float32"], (64,), device="cuda"))
    failed = [f"{row.way} in {row.dtype} differs by {row.relative:.1e}" for row in rows if not row.passed]
    grads = []
    for device in ("cpu", "cuda"):
        B, T, H, K, V = GPU_SHAPE
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, T, H, D, generator=generator).to(device).requires_grad_() for D in (K, K, V))
        out, _ = retention(q, k, v, torch.tensor([-0.1] * H, device=device))
        out.square().sum().backward()
        grads.append([x.grad.double().cpu() for x in (q, k, v) if x.grad is not None])
    worst = max(((a - b).norm() / b.norm()).item() for b, a in zip(*grads, strict=True))
    if not worst <= 1e-3:  # also for nan
        failed.append(f"gradients differ from the CPU's by {worst:.1e}")
    seconds = time.perf_counter() - began
    if failed:
        yield Finding(name, "problem", "; ".join(failed), "results of this GPU cannot be trusted")
    else:
        yield Finding(name, "ok", f"{len(rows)} ways and the gradients agree; compiled and run in {seconds:.1f} s")


def tuned() -> Iterator[Finding]:
    """Whether block shapes were measured on this GPU."""
    import torch

    if not torch.cuda.is_available() or find_spec("triton") is None:
        return
    from retnet.kernels.retention.tiles import cache_file, stored_tiles

    device = torch.cuda.get_device_name()
    count = sum(key.startswith(device) for key in stored_tiles())
    text = f"{count} measured block shapes for {device} in {cache_file()}"
    yield Finding("tuning", "ok", text, "" if count else "retnet tune MODEL measures them; otherwise a table is used")


def _importer(extra: str) -> Callable[[], Iterator[Finding]]:
    """A check that the libraries of an extra can be imported, where they are installed."""

    def imports() -> Iterator[Finding]:
        for library in LIBRARIES[extra]:
            if find_spec(library) is None:
                return  # which is a finding of the installation
        began = time.perf_counter()
        for library in LIBRARIES[extra]:
            try:
                import_module(library)
            except Exception as error:
                yield Finding(f"import {library}", "problem", reason(error), install_command(extra))
                return
        text = f"{', '.join(LIBRARIES[extra])} in {time.perf_counter() - began:.1f} s"
        yield Finding(f"imports of {extra}", "ok", text)

    return imports


def _model() -> LanguageModel:
    import torch

    from retnet.layers.block import BlockConfig
    from retnet.layers.feed_forward import FeedForwardConfig
    from retnet.layers.retention import RetentionConfig
    from retnet.models.config import ModelConfig
    from retnet.models.lm import LanguageModel

    block = BlockConfig(RetentionConfig(num_heads=2, key_dim=16, value_dim=32), FeedForwardConfig(32))
    with torch.device("cpu"):
        return LanguageModel(ModelConfig(vocab_size=37, d_model=16, layers=(block, block))).eval()


def _ids():
    import torch

    return torch.randint(37, (1, TOKENS), generator=torch.Generator().manual_seed(0))


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    TORCH: torch_build,
    "devices": devices,
    "CPU speed": processor_speed,
    "forms agree": forms_agree,
    "training step": train_step,
    "save and load": save_and_load,
    "kernels": kernels,
    "tuning": tuned,
    **{f"imports of {extra}": _importer(extra) for extra in ("hf", "train", "plots", "serve")},
}
