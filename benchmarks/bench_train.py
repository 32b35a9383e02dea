"""A whole training step of about 1.3B parameters on a GPU: ours, flash-linear-attention's RetNet, a Llama.

    python benchmarks/bench_train.py [--only NAME ...] [--tokens T] [--batch B] [--csv FILE]

All models: bfloat16 weights, fused AdamW, and the same loss (`retnet.models.loss`) on their own hidden states. "fla" is
its default configuration with 4096 wide feed-forwards, "fla config" that same architecture as ours, "preset" our
`retnet-1.3b`, "llama" a Llama of the width and depth. Blocks of ours are compiled one by one.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from runner import Point, append, median_milliseconds, table
from torch import Tensor, nn

from retnet import LanguageModel
from retnet.models.convert.fla import config_of
from retnet.models.loss import linear_cross_entropy
from retnet.models.presets import preset

FLA_CONFIG = {"model_type": "retnet", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 8}
FLA_CONFIG |= {"intermediate_size": 4096, "vocab_size": 32000, "tie_word_embeddings": False}

# name -> (model, its hidden states, the head's weight)
Built = tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]


def ours(config) -> Built:
    with torch.device("cuda"):
        model = LanguageModel(config).bfloat16()
    for layer in model.layers:
        layer.compile()
    return model, lambda ids: model.hidden(ids)[0], model.head.weight


def fla() -> Built:
    from fla.models import RetNetConfig, RetNetForCausalLM

    options = {k: v for k, v in FLA_CONFIG.items() if k != "model_type"}
    with torch.device("cuda"):
        model = RetNetForCausalLM(RetNetConfig(**options, use_cache=False)).bfloat16()
    return model, lambda ids: model.model(ids).last_hidden_state, model.lm_head.weight


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
    return model, lambda ids: model.model(ids).last_hidden_state, model.lm_head.weight


MODELS: dict[str, Callable[[], Built]] = {
    "fla config": lambda: ours(config_of(FLA_CONFIG)),
    "preset": lambda: ours(preset("retnet-1.3b")),
    "fla": fla,
    "llama": llama,
}


def measure(name: str, batch: int, tokens: int) -> Point:
    model, hidden, weight = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, 32000, (batch, tokens + 1), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        linear_cross_entropy(hidden(ids[:, :-1]), weight, ids[:, 1:]).backward()
        optimizer.step()

    step()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_milliseconds(step, budget=4.0)
    parameters = sum(p.numel() for p in model.parameters())
    note = f"{1e3 * batch * tokens / milliseconds:.0f} tokens/s, {parameters / 1e9:.3f}B parameters"
    peak = torch.cuda.max_memory_allocated() / 2**20
    return Point("train", f"B={batch} T={tokens}", name, "step", milliseconds, extra_mebibytes=peak, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    points = []
    for name in options.only:
        points.append(measure(name, options.batch, options.tokens))
        print(table(points[-1:]), flush=True)
        torch.cuda.empty_cache()
    if options.csv:
        append(options.csv, points)


if __name__ == "__main__":
    main()
