"""The error tables of docs/reference/numerics.md: each form and dtype against the float64 oracle, torchscale's forms.

    python benchmarks/numerics.py [--oracle FOLDER]

For retention, the relative error of outputs, final state and gradients, with up to 4096 tokens and decays over four
decades. With --oracle, a folder that holds torchscale's own logits (`torchscale_small.safetensors`), also the relative
difference between torchscale's forms.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from retnet import retention
from retnet.ops import reference

FORMS = {
    "parallel": {"mode": "parallel"},
    "recurrent": {"mode": "recurrent"},
    "chunkwise, 16": {"mode": "chunkwise", "chunk_size": 16},
    "chunkwise, 64": {"mode": "chunkwise", "chunk_size": 64},
    "chunkwise, 100": {"mode": "chunkwise", "chunk_size": 100},
}
NAMES = ("out", "state", "dq", "dk", "dv", "dlog_decay")


def solve(form, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, dout: Tensor, **options) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
    out, state = form(*inputs, **options)
    return [out.detach(), state.detach(), *torch.autograd.grad(out, inputs, dout)]


def ours(num_tokens: int, dtype: torch.dtype, per_token: bool) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, num_tokens, 4, D, generator=generator).to(dtype) for D in (32, 32, 48, 48))
    shape = (1, num_tokens, 4) if per_token else (4,)
    wide = torch.promote_types(dtype, torch.float32)
    log_decay = (-(10 ** (-4 * torch.rand(*shape, generator=generator)))).to(wide)
    exact = solve(reference.recurrent, *(x.double() for x in (q, k, v, log_decay, dout)))
    lines = []
    for name, options in FORMS.items():
        got = solve(retention, q, k, v, log_decay, dout, **options)
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
        decay = "per token" if per_token else "fixed"
        label = str(dtype).removeprefix("torch.")
        lines.append(f"| {label} | {decay} | {num_tokens} | {name} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
    return lines


def torchscale(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "torchscale_small.safetensors")
    parallel = tensors["logits.parallel.f64"]
    lines = []
    for name in ("recurrent", "chunk8", "chunk16"):
        other = tensors[f"logits.{name}.f64"]
        changed = (other.argmax(-1) != parallel.argmax(-1)).sum().item()
        relative = ((other - parallel).norm() / parallel.norm()).item()
        lines.append(f"| {name} | {relative:.1e} | {changed} of {parallel[..., 0].numel()} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", type=Path, default=None, metavar="FOLDER", help="folder of torchscale's logits")
    options = parser.parse_args()
    print("| dtype | decay | T | form | " + " | ".join(NAMES) + " |")
    print("|---" * (4 + len(NAMES)) + "|")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for per_token in (False, True):
            print("\n".join(ours(4096 if dtype == torch.float32 else 512, dtype, per_token)))
    if options.oracle:
        print(
            "\n| torchscale's form | difference from its parallel form | predicted tokens that differ |\n|---|---|---|"
        )
        print("\n".join(torchscale(options.oracle)))


if __name__ == "__main__":
    main()
