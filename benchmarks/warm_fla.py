"""Compiles in parallel what flash-linear-attention's autotuner will try, so that tuning only measures.

    python benchmarks/warm_fla.py [PROCESSES]

Its first call at a head size compiles up to 48 configurations of each kernel one after another, minutes at K = 256.
Here every process takes its share of each kernel's configurations and runs them once on a short input, without timing:
Triton keeps the binaries in its cache folder, and the benchmarks that follow tune undisturbed. Needs a GPU.
"""

import os
import subprocess
import sys

SIZES = [(8, 256, 512), (16, 128, 128), (16, 64, 128)]  # H, K, V of bench_retention's cases


def take_share(share: int, shares: int) -> None:
    """Let the autotuner see every `shares`-th configuration from `share` on, and run each once instead of timing it."""
    from triton.runtime.autotuner import Autotuner

    make = Autotuner.__init__

    def with_fewer(self, fn, arg_names, configs, *args, **kwargs):
        make(self, fn, arg_names, configs[share::shares] or configs[:1], *args, **kwargs)

    def run_once(call, quantiles=None, **options):
        call()
        return [1.0, 1.0, 1.0]

    Autotuner.__init__ = with_fewer
    Autotuner.do_bench = property(lambda self: run_once)


def compile_share(share: int, shares: int) -> None:
    os.environ["FLA_CACHE_RESULTS"] = "0"  # these are no results
    take_share(share, shares)
    import torch
    from fla.models import RetNetConfig, RetNetForCausalLM
    from fla.ops.retention import chunk_retention

    for H, K, V in SIZES:
        leaves = [
            torch.randn(1, 256, H, width, device="cuda", dtype=torch.bfloat16).requires_grad_() for width in (K, K, V)
        ]
        out = chunk_retention(*leaves)[0]
        torch.autograd.grad(out, leaves, out)
    with torch.device("cuda"):
        config = RetNetConfig(num_hidden_layers=1, intermediate_size=4096, use_cache=False)
        model = RetNetForCausalLM(config).bfloat16()
        hidden = model.model(torch.zeros(1, 256, dtype=torch.long)).last_hidden_state
    hidden.float().square().mean().backward()


def main() -> None:
    if len(sys.argv) == 3:
        compile_share(int(sys.argv[1]), int(sys.argv[2]))
        return
    shares = int(sys.argv[1]) if len(sys.argv) == 2 else os.cpu_count() or 1
    children = [subprocess.Popen([sys.executable, __file__, str(i), str(shares)]) for i in range(shares)]
    failed = [share for share, child in enumerate(children) if child.wait() != 0]
    if failed:
        sys.exit(f"shares {failed} of {shares} failed: their configurations are compiled when they are tuned")


if __name__ == "__main__":
    main()
