"""Cross-entropy of a linear head, forward and backward: time, and peak memory beyond its inputs and gradients.

    python benchmarks/bench_loss.py [--tokens N ...] [--width D] [--vocab V ...] [--dtype bfloat16] [--only NAME ...]

"plain" makes the logits of all tokens and their float32 log-probabilities, as transformers does; "ours" is
`retnet.models.loss`; "torch" is `torch.nn.functional.linear_cross_entropy` where this torch has it, in its own chunks;
"liger" is liger-kernel's, on CUDA, where it is installed. Memory on a GPU is the allocator's peak, on a CPU the peak of
the resident set, measured in a process of its own for each point.
"""

import argparse
import importlib.util
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from runner import Point, append, median_milliseconds, table
from torch import Tensor

from retnet.models.loss import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torchs_own(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions

    return F.linear_cross_entropy(hidden, weight, labels, options=LinearCrossEntropyOptions())


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def losses() -> dict[str, Loss]:
    """What can be measured here."""
    found: dict[str, Loss] = {"plain": plain, "ours": linear_cross_entropy}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch"] = torchs_own
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger
    return found


def measure(name: str, tokens: int, width: int, vocab: int, dtype: torch.dtype) -> Point:
    """One point, in a process that has done nothing else."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, width, device=device, generator=generator) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    loss = losses()[name]

    def step() -> None:
        loss(hidden, weight, labels).backward()

    if device == "cuda":
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        milliseconds = median_milliseconds(step)
    else:
        F.linear(hidden[:1], weight[:64]).sum().backward()  # loads what a first product loads
        before = _peak_bytes()
        begin = time.perf_counter()
        step()
        milliseconds = 1e3 * (time.perf_counter() - begin)
        extra = _peak_bytes() - before
    case = f"N={tokens} D={width} V={vocab}"
    return Point("loss", case, name, "forward+backward", milliseconds, extra_mebibytes=extra / 2**20, note=str(dtype))


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536 if torch.cuda.is_available() else 2048])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50304, 151936])
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--only", nargs="+", choices=losses(), default=list(losses()))
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    points = []
    for vocab in options.vocab:
        for tokens in options.tokens:
            for name in options.only:
                arguments = (name, tokens, options.width, vocab, getattr(torch, options.dtype))
                with context.Pool(1) as pool:
                    points.append(pool.apply(measure, arguments))
                print(table(points[-1:]), flush=True)
    if options.csv:
        append(options.csv, points)


if __name__ == "__main__":
    main()
