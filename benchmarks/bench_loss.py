"""Cross-entropy of a linear head, forward + backward: time, and peak memory beyond inputs and gradients.

    python benchmarks/bench_loss.py [--tokens N ...] [--width D] [--vocab V ...] [--dtype bfloat16] [--only NAME ...]

"plain" computes the logits of all tokens and their float32 log-probabilities, as transformers does. "ours" is
`retnet.models.loss`. "torch" is `torch.nn.functional.linear_cross_entropy` with its default chunks, if this torch has
it. "liger" is liger-kernel's, on CUDA, if it is installed. Memory is the allocator's peak on a GPU and the peak
resident set on a CPU, measured in a new process for each point.
"""

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from runner import Point, arguments, extra_bytes, median_milliseconds, report
from torch import Tensor

from retnet.models.loss import linear_cross_entropy
from retnet.system.memory import peak_bytes

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
    """The implementations that are available here."""
    found: dict[str, Loss] = {"plain": plain, "ours": linear_cross_entropy}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch"] = torchs_own
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger
    return found


def measure(name: str, tokens: int, width: int, vocab: int, dtype: torch.dtype) -> Point:
    """One point. On a CPU, the process must not have done anything else before."""
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
        extra = extra_bytes(step)
        milliseconds = median_milliseconds(step)
    else:
        F.linear(hidden[:1], weight[:64]).sum().backward()  # the first product loads libraries
        before = peak_bytes()
        begin = time.perf_counter()
        step()
        milliseconds = 1e3 * (time.perf_counter() - begin)
        extra = peak_bytes() - before
    case = f"N={tokens} D={width} V={vocab}"
    return Point("loss", case, name, "forward+backward", milliseconds, extra_bytes=extra, note=str(dtype))


def in_new_processes(cases: list[tuple]) -> Iterator[Point]:
    for case in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield pool.apply(measure, case)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536 if torch.cuda.is_available() else 2048])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50304, 151936])
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--only", nargs="+", choices=losses(), default=list(losses()))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    shapes = product(options.vocab, options.tokens, options.only)
    cases = [(name, tokens, options.width, vocab, dtype) for vocab, tokens, name in shapes]
    report(in_new_processes(cases), options.csv)


if __name__ == "__main__":
    main()
