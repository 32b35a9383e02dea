"""A training step with about 1.3B parameters on a GPU: retnet, flash-linear-attention's RetNet, a Llama.

    python benchmarks/bench_train.py [--only NAME ...] [--tokens T] [--batch B] [--limit SECONDS] [--csv FILE]

All models have bfloat16 weights created on the device, fused AdamW, and the same loss code (`retnet.models.loss`) on
their own hidden states. "fla" is flash-linear-attention's code in its default configuration with feed-forwards of
width 4096 (1.540B). "ours" is the same architecture in this library, "preset" is `retnet-1.3b`, also with float8
products ("tensorwise", "rowwise"; needs torchao), "llama" a Llama of that width and depth. torch.compile compiles the
layers one by one, except for FLA's, which has fused kernels, and for the rows "eager". Every model runs in its own
process, which ends after --limit seconds.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from runner import Point, arguments, need_gpu, report
from training import Trained, first_steps, llama, measured, ours, training_step

from retnet.models.convert.fla import config_of
from retnet.models.presets import preset

FLA_CONFIG = {"model_type": "retnet", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 8}
FLA_CONFIG |= {"intermediate_size": 4096, "vocab_size": 32000, "tie_word_embeddings": False}
LLAMA = {"layers": 24, "width": 2048, "heads": 16, "feed_forward": 5632, "vocab": 32000, "max_tokens": 131072}
VOCAB_SIZE = 32000  # of the ids; the preset's own is larger


def fla() -> Trained:
    from fla.models import RetNetConfig, RetNetForCausalLM

    options = {k: v for k, v in FLA_CONFIG.items() if k != "model_type"}
    with torch.device("cuda"):
        model = RetNetForCausalLM(RetNetConfig(**options, use_cache=False)).bfloat16()
    return Trained(model, model.model.layers, lambda ids: model.model(ids).last_hidden_state, model.lm_head.weight)


# name -> (function that builds the model, whether its layers are compiled)
MODELS: dict[str, tuple[Callable[[], Trained], bool]] = {
    "ours": (lambda: ours(config_of(FLA_CONFIG)), True),
    "fla": (fla, False),
    "preset": (lambda: ours(preset("retnet-1.3b")), True),
    "preset tensorwise": (lambda: ours(preset("retnet-1.3b"), "tensorwise"), True),
    "preset rowwise": (lambda: ours(preset("retnet-1.3b"), "rowwise"), True),
    "llama": (lambda: llama(**LLAMA), True),
    "ours eager": (lambda: ours(config_of(FLA_CONFIG)), False),
    "llama eager": (lambda: llama(**LLAMA), False),
}


def measure(name: str, options: argparse.Namespace) -> list[Point]:
    build, compiled = MODELS[name]
    trained = build()
    ids = torch.randint(0, VOCAB_SIZE, (options.batch, options.tokens + 1), device="cuda")
    if compiled:
        trained.compile_layers(dynamic=False)
    if options.warm_only:
        trained.model.train()
        print(f"{name}: first two steps {first_steps(training_step(trained, ids)):.0f} s", flush=True)
        return []
    point = measured("train", name, trained, ids, profile=options.profile)
    if compiled:
        print(f"{name}: {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs", flush=True)
    return [point]


def run_apart(name: str, options: argparse.Namespace) -> None:
    """Measure one model in its own process, which prints its row."""
    command = [sys.executable, __file__, "--here", "--only", name]
    command += ["--tokens", str(options.tokens), "--batch", str(options.batch), "--csv", str(options.csv)]
    command += ["--profile", str(options.profile), *(["--warm-only"] if options.warm_only else [])]
    try:
        code = subprocess.run(command, timeout=options.limit, check=False).returncode
    except subprocess.TimeoutExpired:
        code = f"not finished after {options.limit} s"
    if code != 0:
        print(f"{name}: failed ({code})", flush=True)


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_train.csv")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=8192, help="per sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each model's process")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    parser.add_argument("--warm-only", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels of a step")
    options = parser.parse_args()
    need_gpu()
    for name in options.only:
        if options.here:
            report(measure(name, options), options.csv)
        else:
            run_apart(name, options)


if __name__ == "__main__":
    main()
