"""Time of one optimizer step on a model's parameters, in ms: AdamW, torch's Muon with AdamW, and ours.

    python benchmarks/bench_optimizer.py [--model retnet-125m] [--dtype float32] [--only NAME ...]

"adamw" is torch's fused AdamW on all parameters. "torch" is torch.optim.Muon on the matrices that ours gives to Muon,
whole, and fused AdamW on the rest. "ours" is `retnet.train.muon`. Gradients are random. torch's Muon iterates in
bfloat16 everywhere, ours in float32 on a CPU; leave "torch" out there for models above a few million parameters.
"""

import argparse

import torch
from runner import median_milliseconds
from torch import nn

from retnet.models.lm import LanguageModel
from retnet.stack.resolve import resolve_config
from retnet.train.muon import Muon, muon_groups

NAMES = ("adamw", "torch", "ours")


def optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    groups = muon_groups(model, 1e-3)
    if name == "ours":
        return [Muon(groups)]
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), fused=True)]
    matrices = [p for group in groups if group["algorithm"] == "muon" for p in group["params"] if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, fused=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="retnet-125m", help="a preset or a stack file")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the parameters")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LanguageModel(resolve_config(options.model)).to(getattr(torch, options.dtype))
    count = sum(p.numel() for p in model.parameters())
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{options.model}, {count / 1e6:.1f}M parameters in {options.dtype}, {where}, torch {torch.__version__}")
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    for name in options.only:
        found = optimizers(name, model)

        def step(found: list[torch.optim.Optimizer] = found) -> None:
            for optimizer in found:
                optimizer.step()

        print(f"{name:>6} {median_milliseconds(step, budget=1.0):9.2f} ms per step", flush=True)


if __name__ == "__main__":
    main()
