"""A whole training step of about 1.3B parameters on a GPU: ours, flash-linear-attention's RetNet, a Llama.

    python benchmarks/bench_train.py [--only NAME ...] [--tokens T] [--batch B] [--limit SECONDS] [--csv FILE]

All models: bfloat16 weights made on the device, fused AdamW, and the same loss (`retnet.models.loss`) on their own
hidden states. "fla" is flash-linear-attention's own code with its default configuration and 4096 wide feed-forwards
(1.540B), "ours" that same architecture as ours, "preset" our `retnet-1.3b`, "llama" a Llama of the width and depth.
Layers are compiled one by one with torch.compile, but for FLA's, whose kernels are fused by hand, and for the rows
"eager". Every model runs in a process of its own, which ends after --limit seconds.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from runner import Point, append, median_milliseconds, need_gpu, profile_table, table
from torch import Tensor, nn

from retnet import LanguageModel
from retnet.models.convert.fla import config_of
from retnet.models.loss import linear_cross_entropy
from retnet.models.presets import preset

FLA_CONFIG = {"model_type": "retnet", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 8}
FLA_CONFIG |= {"intermediate_size": 4096, "vocab_size": 32000, "tie_word_embeddings": False}
VOCAB_SIZE = 32000  # of the ids; the preset's own is larger

# (model, its layers, its hidden states, the head's weight)
Built = tuple[nn.Module, nn.ModuleList, Callable[[Tensor], Tensor], Tensor]


def ours(config) -> Built:
    with torch.device("cuda"):
        model = LanguageModel(config).bfloat16()
    return model, model.layers, lambda ids: model.hidden(ids)[0], model.head.weight


def fla() -> Built:
    from fla.models import RetNetConfig, RetNetForCausalLM

    options = {k: v for k, v in FLA_CONFIG.items() if k != "model_type"}
    with torch.device("cuda"):
        model = RetNetForCausalLM(RetNetConfig(**options, use_cache=False)).bfloat16()
    return model, model.model.layers, lambda ids: model.model(ids).last_hidden_state, model.lm_head.weight


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=131072,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    return model, model.model.layers, lambda ids: model.model(ids).last_hidden_state, model.lm_head.weight


# name -> (what builds it, whether its layers are compiled)
MODELS: dict[str, tuple[Callable[[], Built], bool]] = {
    "ours": (lambda: ours(config_of(FLA_CONFIG)), True),
    "fla": (fla, False),
    "preset": (lambda: ours(preset("retnet-1.3b")), True),
    "llama": (llama, True),
    "ours eager": (lambda: ours(config_of(FLA_CONFIG)), False),
    "llama eager": (llama, False),
}


def training_step(model: nn.Module, hidden: Callable[[Tensor], Tensor], weight: Tensor, ids: Tensor) -> Callable:
    """One step on ids [B, T + 1]: loss, gradients, update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        linear_cross_entropy(hidden(ids[:, :-1]), weight, ids[:, 1:]).backward()
        optimizer.step()

    return step


def measure(name: str, batch: int, tokens: int, *, warm_only: bool, profile: int) -> Point | None:
    build, compiled = MODELS[name]
    model, layers, hidden, weight = build()
    model.train()
    ids = torch.randint(0, VOCAB_SIZE, (batch, tokens + 1), device="cuda")
    if compiled:
        for layer in layers:
            layer.compile(dynamic=False)
    step = training_step(model, hidden, weight, ids)
    begin = time.perf_counter()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    if warm_only:
        print(f"{name}: two steps in {first:.0f} s", flush=True)
        return None
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_milliseconds(step, budget=4.0)
    peak = torch.cuda.max_memory_allocated() / 2**20
    if profile:
        print(profile_table(step, 2, profile, torch.device("cuda")), flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    note = f"{1e3 * batch * tokens / milliseconds:.0f} tokens/s, {parameters / 1e9:.3f}B parameters"
    note += f", first two steps {first:.0f} s"
    if compiled:
        note += f", {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs"
    return Point("train", f"B={batch} T={tokens}", name, "step", milliseconds, extra_mebibytes=peak, note=note)


def run_apart(name: str, options: argparse.Namespace) -> None:
    """Measure one model in a process of its own, which prints its row."""
    command = [sys.executable, __file__, "--here", "--only", name]
    command += ["--tokens", str(options.tokens), "--batch", str(options.batch), "--csv", str(options.csv)]
    command += ["--profile", str(options.profile), *(["--warm-only"] if options.warm_only else [])]
    try:
        code = subprocess.run(command, timeout=options.limit, check=False).returncode
    except subprocess.TimeoutExpired:
        code = f"no end after {options.limit} s"
    if code != 0:
        print(f"{name}: failed ({code})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300, help="seconds for each model's process")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    parser.add_argument("--warm-only", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels of a step")
    parser.add_argument("--csv", type=Path, default=Path("out/bench_train.csv"))
    options = parser.parse_args()
    need_gpu()
    run = partial(
        measure, batch=options.batch, tokens=options.tokens, warm_only=options.warm_only, profile=options.profile
    )
    for name in options.only:
        if not options.here:
            run_apart(name, options)
            continue
        point = run(name)
        if point is not None:
            print(table([point]), flush=True)
            append(options.csv, [point])


if __name__ == "__main__":
    main()
