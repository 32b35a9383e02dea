"""Chunkwise retention on a GPU: ours, our portable kernels, flash-linear-attention, and causal attention in one run.

    python benchmarks/bench_retention.py                          the paper's head sizes
    python benchmarks/bench_retention.py --sweep                  T from 512 to 32768, 32768 tokens in total
    python benchmarks/bench_retention.py --plot PNG               a plot of the sweep's rows

Attention has the same width (16 heads of 128 for d = 2048) and runs through PyTorch's cuDNN and flash backends.
Columns: device time (a captured graph), share of the floor, host time to launch a call, time per call of many eager
calls, and peak memory beyond inputs, outputs and gradients. The tensors of every case exceed the caches.
Implementations that are not installed are left out, with a message. The first call of flash-linear-attention tunes its
kernels for minutes; `warm_fla.py` compiles their configurations in several processes before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from plots import lines, save_panels
from runner import (
    Point,
    arguments,
    device_milliseconds,
    eager_milliseconds,
    extra_bytes,
    floor_milliseconds,
    need_gpu,
    read,
    report_cases,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from retnet.kernels.retention.portable.passes import portable_backward, portable_forward
from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops.decay import paper_log_decay
from retnet.ops.retention import retention
from retnet.plots.numbers import bytes_of, tokens
from retnet.plots.panels import Panel, Scale

CHUNK = 64  # tokens per chunk in the floor's count of operations


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"{self.B},{self.T},{self.H},{self.K},{self.V}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        return cls(*map(int, text.split(",")))

    def floor(self, *, backward: bool) -> float:
        """Operations and bytes that every order of summation needs, forward or forward + backward."""
        tokens, K, V = self.B * self.T * self.H, self.K, self.V
        operations = CHUNK * (K + V) + 4 * K * V
        moved = 2 * (2 * K + 2 * V)
        if backward:
            operations += CHUNK * (3 * K + 2 * V) + 10 * K * V
            moved += 2 * (4 * K + 3 * V)
        return floor_milliseconds(tokens * operations, tokens * moved)


CASES = [
    Case(4, 8192, 8, 256, 512),
    Case(16, 2048, 8, 256, 512),
    Case(1, 32768, 8, 256, 512),
    Case(1, 131072, 8, 256, 512),
    Case(4, 8192, 16, 128, 128),
    Case(8, 4096, 16, 64, 128),
]
SWEEP = [Case(max(1, 32768 // T), T, 8, 256, 512) for T in (512, 1024, 2048, 4096, 8192, 16384, 32768)]

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def our_form(log_decay: Tensor) -> Form:
    return lambda q, k, v: retention(q, k, v, log_decay, mode="chunkwise", return_state=False)[0]


def fla_form() -> Form:
    from fla.ops.retention import chunk_retention

    return lambda q, k, v: chunk_retention(q, k, v)[0]


def attention_form(backend: SDPBackend) -> Form:
    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return form


def inputs(case: Case, implementation: str) -> list[Tensor]:
    """q, k, v and dout. Attention gets heads of 128 with the total width of q."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    if implementation in ("cudnn", "flash"):
        return [normal(case.B, case.H * case.K // 128, case.T, 128) for _ in range(4)]
    qk, v = (case.B, case.T, case.H, case.K), (case.B, case.T, case.H, case.V)
    return [normal(*qk), normal(*qk) * case.K**-0.5, normal(*v), normal(*v)]


def measure(case: Case, implementation: str) -> list[Point]:
    """Forward, and forward + backward with its peak memory."""
    q, k, v, dout = inputs(case, implementation)
    log_decay = paper_log_decay(case.H).cuda()
    if implementation == "portable":
        problem = RetentionProblem(q, k, v, log_decay, case.K**-0.5)
        forward = partial(portable_forward, problem, None)

        def both():
            return forward(), portable_backward(problem, dout, None, need_dlog_decay=False, need_dstate=False)
    else:
        form = {
            "ours": partial(our_form, log_decay),
            "fla": fla_form,
            "cudnn": partial(attention_form, SDPBackend.CUDNN_ATTENTION),
            "flash": partial(attention_form, SDPBackend.FLASH_ATTENTION),
        }[implementation]()
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def forward():
            with torch.no_grad():
                return form(*leaves)

        def both():
            out = form(*leaves)
            return out, *torch.autograd.grad(out, leaves, dout)

    own = implementation in ("ours", "portable", "fla")
    point = partial(Point, "retention", str(case), implementation)
    both()  # compiles and allocates, which is not to be measured
    memory = extra_bytes(both, kept=sum(x.nbytes for x in (q, k, v, dout)))
    rows = []
    for what, run in (("forward", forward), ("forward+backward", both)):
        device, host = device_milliseconds(run)
        floor = case.floor(backward=run is both) if own else None
        extra = memory if run is both else None
        rows.append(point(what, device, floor, host, eager_milliseconds(run), extra))
    return rows


def plot(points: list[Point], path: Path) -> None:
    """Time and memory against T, from the points with 32768 tokens in total."""

    def length(p: Point) -> int:
        return Case.parse(p.case).T

    chosen = [
        p
        for p in points
        if p.what == "forward+backward" and (case := Case.parse(p.case)).B * case.T == 32768 and case.K == 256
    ]
    x = Scale("tokens per sequence, 32K in total", tokens, 2)
    memory = lines(chosen, length, lambda p: p.extra_bytes)
    panels = [
        Panel("Forward + backward", x, Scale("ms per call", log=10), lines(chosen, length, lambda p: p.milliseconds)),
        Panel("Peak memory beyond inputs and results", x, Scale("bytes", bytes_of, limits=(0, None)), memory),
    ]
    save_panels(path, panels, "Chunkwise retention, 8 heads of 256 keys and 512 values", chosen, "bfloat16")


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_retention.csv")
    parser.add_argument(
        "--case", type=Case.parse, action="append", metavar="B,T,H,K,V", help="a case (default: the paper's head sizes)"
    )
    parser.add_argument("--sweep", action="store_true", help="T from 512 to 32768, 32768 tokens in total")
    parser.add_argument("--implementations", default="ours,portable,fla,cudnn,flash")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="only plot the sweep's rows of the CSV file")
    options = parser.parse_args()
    if options.plot:
        plot(read(options.csv), options.plot)
        return
    need_gpu()
    cases = options.case or (SWEEP if options.sweep else CASES)
    report_cases("retention", cases, options.implementations.split(","), measure, options.csv)


if __name__ == "__main__":
    main()
