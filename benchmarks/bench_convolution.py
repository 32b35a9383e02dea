"""The short convolution on a GPU: ours, flash-linear-attention's Triton kernels and causal-conv1d in one run.

    python benchmarks/bench_convolution.py                                       all cases
    python benchmarks/bench_convolution.py --case 4,8192,4096,4,silu,1           one case
    python benchmarks/bench_convolution.py --geometries [--rows 4,8]             our kernels' geometries, one by one

A case is B,T,C,W,activation,documents; with more than one document, B is 1 and their lengths are uneven. bfloat16.
The floor is memory traffic at the bandwidth of a device copy: x read and y written forward; x and dy read and dx
written backward. Columns: device time (a captured graph), share of the floor, host time to launch a call, time per
call of many eager calls. `note` is the relative difference of a rival's results from ours. Rivals that are not
installed are left out, with a message.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

import torch
from runner import (
    Point,
    arguments,
    copy_bandwidth,
    device_milliseconds,
    eager_milliseconds,
    failed,
    fla_installed,
    floor_milliseconds,
    installed,
    need_gpu,
    report,
)
from torch import Tensor

from retnet.kernels.convolution.geometry import Geometry
from retnet.kernels.convolution.short import Convolution, convolution_backward, convolution_forward
from retnet.ops.short_convolution import short_convolution


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    C: int
    W: int = 4
    activation: str = "silu"
    documents: int = 1

    @classmethod
    def parse(cls, text: str) -> "Case":
        B, T, C, *rest = text.split(",")
        W, activation, documents = (rest + ["4", "silu", "1"][len(rest) :])[:3]
        return cls(int(B), int(T), int(C), int(W), activation, int(documents))

    def __str__(self) -> str:
        return f"{self.B},{self.T},{self.C},{self.W},{self.activation},{self.documents}"

    def floor(self, *, forward: bool, backward: bool) -> float:
        rows = (2 if forward else 0) + (3 if backward else 0)
        return floor_milliseconds(0, 2 * rows * self.B * self.T * self.C)

    def inputs(self) -> "Inputs":
        generator = torch.Generator(device="cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        x, dy = normal(self.B, self.T, self.C), normal(self.B, self.T, self.C)
        weight, bias = normal(self.C, 1, self.W), normal(self.C)
        cu_seqlens = None
        if self.documents > 1:
            share = torch.rand(self.documents, generator=torch.Generator().manual_seed(0)).square()
            bounds = (share.cumsum(0) / share.sum() * self.T).round().long()
            cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), bounds]).cuda()
        return Inputs(x, weight, bias, dy, cu_seqlens)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    cu_seqlens: Tensor | None

    @cached_property
    def documents(self) -> Tensor | None:
        """The number of every token's document: what causal-conv1d takes."""
        if self.cu_seqlens is None:
            return None
        lengths = self.cu_seqlens.diff()
        return torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)[None].int()


CASES = [
    *(Case(4, 8192, 4096, W, activation) for W, activation in ((4, "silu"), (4, "none"), (8, "silu"))),
    Case(32, 2048, 768),
    Case(32, 2048, 2304),
    Case(1, 65536, 4096, documents=37),
]

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(case: Case, inputs: Inputs) -> Form:
    return lambda x, weight, bias: short_convolution(
        x, weight, bias, activation=case.activation, cu_seqlens=inputs.cu_seqlens
    )[0]


def fla(case: Case, inputs: Inputs) -> Form:
    from fla.modules.convolution import causal_conv1d

    activation = None if case.activation == "none" else case.activation
    return lambda x, weight, bias: causal_conv1d(
        x=x, weight=weight[:, 0], bias=bias, activation=activation, cu_seqlens=inputs.cu_seqlens
    )[0]


def causal_conv1d(case: Case, inputs: Inputs) -> Form:
    from causal_conv1d import causal_conv1d_fn

    if case.W > 4:
        raise RuntimeError("causal-conv1d has widths of 2 to 4")
    activation = None if case.activation == "none" else case.activation
    return lambda x, weight, bias: causal_conv1d_fn(
        x.transpose(1, 2), weight[:, 0], bias, seq_idx=inputs.documents, activation=activation
    ).transpose(1, 2)


FORMS = {"ours": ours, "fla": fla, "causal": causal_conv1d}


def measure(case: Case, implementation: str) -> Iterator[Point]:
    """Forward, and forward + backward."""
    inputs = case.inputs()
    leaves = [z.requires_grad_() for z in (inputs.x, inputs.weight, inputs.bias)]

    def results(form: Form) -> list[Tensor]:
        y = form(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)]

    form = FORMS[implementation](case, inputs)
    note = "" if implementation == "ours" else differences(results(form), results(ours(case, inputs)))

    def forward():
        with torch.no_grad():
            return form(*leaves)

    for what, run, backward in (("forward", forward, False), ("forward+backward", partial(results, form), True)):
        device, host = device_milliseconds(run)
        floor = case.floor(forward=True, backward=backward)
        yield Point(
            "convolution", str(case), implementation, what, device, floor, host, eager_milliseconds(run), note=note
        )


def differences(theirs: list[Tensor], own: list[Tensor]) -> str:
    pairs = zip(("y", "dx", "dw", "db"), theirs, own, strict=True)
    return " ".join(f"{name} {float((a - b).float().norm() / b.float().norm()):.1e}" for name, a, b in pairs)


def measure_geometries(case: Case, rows: list[int]) -> Iterator[Point]:
    """Our forward and our backward alone, by geometry: segment x channels x rows x warps."""
    inputs = case.inputs()
    call = Convolution(inputs.x, inputs.weight, inputs.bias, None, inputs.cu_seqlens, case.activation)
    runs = (
        ("forward", partial(convolution_forward, call), {"forward": True, "backward": False}),
        ("backward", partial(convolution_backward, call, inputs.dy, None), {"forward": False, "backward": True}),
    )
    for what, run, parts in runs:
        for segment, (channels, warps), at_once in product(
            (64, 128, 256), ((128, 1), (256, 1), (256, 2), (512, 2)), rows
        ):
            name = f"{segment}x{channels}x{at_once}x{warps}"
            try:
                device, host = device_milliseconds(
                    partial(run, Geometry(segment, channels, at_once, warps)), budget=0.1
                )
            except RuntimeError as error:
                yield failed("convolution", str(case), name, what, error)
                continue
            yield Point("convolution", str(case), name, what, device, case.floor(**parts), host)


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_convolution.csv")
    parser.add_argument("--case", type=Case.parse, action="append", metavar="B,T,C,W,activation,documents")
    parser.add_argument("--implementations", default=",".join(FORMS))
    parser.add_argument("--geometries", action="store_true", help="our kernels' geometries; default: the first case")
    parser.add_argument("--rows", default="2,4,8", help="rows per step that --geometries tries (default: 2,4,8)")
    options = parser.parse_args()
    need_gpu()
    print(f"copy: {copy_bandwidth() / 1e12:.2f} TB/s")
    if options.geometries:
        for case in options.case or CASES[:1]:
            report(measure_geometries(case, [int(n) for n in options.rows.split(",")]), options.csv)
        return
    for case in options.case or CASES:
        for implementation in options.implementations.split(","):
            if implementation == "fla" and not fla_installed():
                continue
            if implementation == "causal" and not installed("causal_conv1d", "causal-conv1d"):
                continue
            try:
                report(measure(case, implementation), options.csv)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                report([failed("convolution", str(case), implementation, "", error)], options.csv)


if __name__ == "__main__":
    main()
