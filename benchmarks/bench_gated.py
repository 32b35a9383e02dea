"""Retention with a decay per token on a GPU: Hopper kernels, portable kernels, a fixed decay, flash-linear-attention.

    python benchmarks/bench_gated.py                              gated RetNet's head sizes, and Mamba-2's
    python benchmarks/bench_gated.py --case 4,8192,32,1,128,64    one case: B,T,H,G,K,V

walk: with `extended_walks`. portable: without. portable-split: the same, where sequences are split only below three
quarters of the processors. fixed: a decay per head, as for walk, without its gradient. fla: `chunk_simple_gla`, forward
alone, since it refuses its backward pass on Hopper with Triton 3.6; heads that share queries and keys are expanded
before. Columns: device time (a captured graph), host time to launch a call, time per call of many eager calls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from runner import (
    Point,
    arguments,
    device_milliseconds,
    eager_milliseconds,
    need_gpu,
    report_cases,
)
from torch import Tensor

from retnet.kernels.retention import dispatch
from retnet.kernels.retention.portable import border_states
from retnet.ops.decay import paper_log_decay
from retnet.ops.retention import retention

IMPLEMENTATIONS = ("walk", "portable", "portable-split", "fixed", "fla")


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    H: int
    G: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"{self.B},{self.T},{self.H},{self.G},{self.K},{self.V}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        return cls(*map(int, text.split(",")))


CASES = [Case(4, 8192, 8, 8, 256, 512), Case(4, 8192, 16, 16, 128, 128), Case(4, 8192, 32, 1, 128, 64)]


def inputs(case: Case) -> list[Tensor]:
    """q, k, v, log_decay and dout. Decays are those of gated RetNet: log sigmoid of a normal number, over 16."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    qk, v = (case.B, case.T, case.G, case.K), (case.B, case.T, case.H, case.V)
    log_decay = torch.nn.functional.logsigmoid(normal(*v[:3]).float()) / 16
    return [normal(*qk), normal(*qk) * case.K**-0.5, normal(*v), log_decay, normal(*v)]


def measure(case: Case, implementation: str) -> list[Point]:
    """Forward, and forward + backward with the gradient of log_decay."""
    q, k, v, log_decay, dout = inputs(case)
    runs: dict[str, Callable[[], object]] = {}
    if implementation == "fla":
        from fla.ops.simple_gla import chunk_simple_gla

        q, k = (x.repeat_interleave(case.H // case.G, 2) for x in (q, k))
        runs["forward"] = torch.no_grad()(lambda: chunk_simple_gla(q, k, v, g=log_decay)[0])
    else:
        dispatch.extended_walks = implementation in ("walk", "fixed")
        border_states.SPLIT_BELOW = 0.75 if implementation == "portable-split" else 1.0
        for passes in (dispatch.forward_passes, dispatch.backward_passes):
            passes.forget()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if implementation == "fixed":
            log_decay = paper_log_decay(case.H).cuda()
        else:
            leaves.append(log_decay.requires_grad_())
        form = partial(retention, q, k, v, log_decay, mode="chunkwise", return_state=False)
        runs["forward"] = torch.no_grad()(lambda: form()[0])
        runs["forward+backward"] = lambda: torch.autograd.grad(form()[0], leaves, dout)
    rows = []
    for what, run in runs.items():
        run()  # compiles and allocates, which is not to be measured
        device, host = device_milliseconds(run)
        eager = eager_milliseconds(run)
        row = Point("gated", str(case), implementation, what, device, None, host, eager)
        rows.append(row)
    return rows


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_gated.csv")
    parser.add_argument("--case", type=Case.parse, action="append", metavar="B,T,H,G,K,V")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    options = parser.parse_args()
    need_gpu()
    report_cases("gated", options.case or CASES, options.implementations.split(","), measure, options.csv)


if __name__ == "__main__":
    main()
