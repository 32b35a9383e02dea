"""Products of a layer in float8 beside bfloat16 on a GPU: what each gains, its casts included.

    python benchmarks/bench_float8.py [--model retnet-1.3b] [--tokens N] [--csv FILE]

One row per product size of the model's first layer, compiled: "forward", and "forward+backward" with the gradients of
input and weight. The floor is that of bfloat16. `bench_train.py --only preset "preset tensorwise" "preset rowwise"`
has whole training steps.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from runner import Point, arguments, device_milliseconds, failed, floor_milliseconds, need_gpu, report
from torch import nn

from retnet import LanguageModel
from retnet.models.presets import preset
from retnet.train.float8 import float8_layers, use_float8

SCALINGS = (None, "tensorwise", "rowwise")


def products(name: str) -> dict[tuple[int, int], list[str]]:
    """(in, out) -> the layers of that size in the model's first block."""
    found: dict[tuple[int, int], list[str]] = {}
    for layer, linear in float8_layers(first_block(name)).items():
        found.setdefault((linear.in_features, linear.out_features), []).append(layer.rpartition(".")[2])
    return found


def first_block(name: str) -> LanguageModel:
    config = preset(name)
    with torch.device("cuda"):
        return LanguageModel(replace(config, layers=config.layers[:1])).bfloat16()


def measure(name: str, tokens: int) -> Iterator[Point]:
    for size, layers in products(name).items():
        case = f"{tokens}x{size[0]}x{size[1]} {', '.join(layers)}"
        for scaling in SCALINGS:
            model = first_block(name)
            if scaling is not None:
                use_float8(model, scaling, torch.device("cuda"))
            linear = next(m for n, m in model.named_modules() if n.rpartition(".")[2] == layers[0])
            yield from timed(linear, case, scaling or "bfloat16", tokens)


def timed(linear: nn.Module, case: str, implementation: str, tokens: int) -> Iterator[Point]:
    weight = linear.weight
    N, K = weight.shape
    x = torch.randn(tokens, K, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(tokens, N, device="cuda", dtype=torch.bfloat16)
    linear.compile(dynamic=False)
    moved = 2 * (tokens * (K + N) + N * K)

    def forward() -> None:
        with torch.no_grad():
            linear(x)

    def both() -> None:
        torch.autograd.grad(linear(x), (x, weight), dy)

    for what, run, times in (("forward", forward, 1), ("forward+backward", both, 3)):
        try:
            device, host = device_milliseconds(run)
        except Exception as error:  # one size or scaling does not end the others
            yield failed("float8", case, implementation, what, error)
            continue
        floor = floor_milliseconds(times * 2 * tokens * N * K, times * moved)
        yield Point("float8", case, implementation, what, device, floor, host)


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_float8.csv")
    parser.add_argument("--model", default="retnet-1.3b", help="a preset")
    parser.add_argument("--tokens", type=int, default=16384, help="per step")
    options = parser.parse_args()
    need_gpu()
    report(measure(options.model, options.tokens), options.csv)


if __name__ == "__main__":
    main()
