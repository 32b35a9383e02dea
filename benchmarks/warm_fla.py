"""Warm-up of flash-linear-attention: its kernels compiled in parallel and tuned, in a minute or two. Needs a GPU.

    python benchmarks/warm_fla.py [PROCESSES]         both
    python benchmarks/warm_fla.py compile PROCESSES   compile; may share the GPU with other work
    python benchmarks/warm_fla.py tune                tune; needs the GPU alone

The first call of flash-linear-attention at a head size compiles up to 48 configurations of each kernel one after
another, which takes minutes at K = 256. Here several processes compile a share each: they run their configurations
once on a short input without timing, and Triton keeps the binaries in its cache folder. Then one process tunes at the
sizes of `bench_retention.py` and `bench_train.py`, with 20 ms per configuration instead of 100. The choices are kept
in the same folder, where the benchmarks find them.
"""

import os
import subprocess
import sys
from collections.abc import Callable

SIZES = [(4, 8192, 8, 256, 512), (4, 8192, 16, 128, 128), (8, 4096, 16, 64, 128)]  # B, T, H, K, V
LAYER = (2, 8192)  # B, T of a layer of the trained model


def take_share(share: int, shares: int) -> None:
    """Give the autotuner every `shares`-th configuration from `share` on, and run each once instead of timing it."""
    from triton.runtime.autotuner import Autotuner

    make = Autotuner.__init__

    def with_fewer(self, fn, arg_names, configs, *args, **kwargs):
        # A share may have only configurations that do not fit the device, so the smallest of all is added to each.
        leanest = min(
            configs,
            key=lambda config: (
                config.num_stages,
                sum(x for x in config.kwargs.values() if isinstance(x, int)),
                config.num_warps,
            ),
        )
        make(self, fn, arg_names, [*configs[share::shares], leanest], *args, **kwargs)

    def run_once(call, quantiles=None):
        call()
        return [1.0, 1.0, 1.0]

    Autotuner.__init__ = with_fewer
    time_with(run_once)


def time_with(clock: Callable) -> None:
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = property(lambda self: clock)


def run_everything(*, short: bool) -> None:
    """Forward + backward of the operator at every head size, and of a model of one layer."""
    import torch
    from fla.models import RetNetConfig, RetNetForCausalLM
    from fla.ops.retention import chunk_retention

    for B, T, H, K, V in SIZES:
        B, T = (1, 256) if short else (B, T)
        leaves = [
            torch.randn(B, T, H, width, device="cuda", dtype=torch.bfloat16).requires_grad_() for width in (K, K, V)
        ]
        out = chunk_retention(*leaves)[0]
        torch.autograd.grad(out, leaves, out)
    with torch.device("cuda"):
        config = RetNetConfig(num_hidden_layers=1, intermediate_size=4096, use_cache=False)
        model = RetNetForCausalLM(config).bfloat16()
        hidden = model.model(torch.zeros((1, 256) if short else LAYER, dtype=torch.long)).last_hidden_state
    hidden.float().square().mean().backward()
    torch.cuda.synchronize()


def compile_share(share: int, shares: int) -> None:
    os.environ["FLA_CACHE_RESULTS"] = "0"  # nothing was timed, so there is no choice to keep
    take_share(share, shares)
    run_everything(short=True)


def compile_all(shares: int) -> None:
    command = [sys.executable, __file__, "share"]
    children = [subprocess.Popen([*command, str(share), str(shares)]) for share in range(shares)]
    failed = [share for share, child in enumerate(children) if child.wait() != 0]
    if failed:
        print(f"shares {failed} of {shares} failed: tuning will compile their configurations")


def tune() -> None:
    from triton.testing import do_bench

    time_with(lambda call, quantiles=None: do_bench(call, warmup=5, rep=20, quantiles=quantiles))
    run_everything(short=False)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["share"]:
        compile_share(int(arguments[1]), int(arguments[2]))
    elif arguments == ["tune"]:
        tune()
    elif arguments[:1] == ["compile"]:
        compile_all(int(arguments[1]))
    else:
        compile_all(int(arguments[0]) if arguments else os.cpu_count() or 1)
        tune()


if __name__ == "__main__":
    main()
