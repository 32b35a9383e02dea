"""Training steps on a GPU: models of about 1.5B parameters, the loss code that all share, and one timed step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rivals import llama_config
from runner import Point, median_milliseconds, profile_table
from torch import Tensor, nn

from retnet import LanguageModel, ModelConfig
from retnet.models.loss import linear_cross_entropy
from retnet.train.float8 import Float8, use_float8


@dataclass(frozen=True)
class Trained:
    """A model to train: its layers, its hidden states as a function of ids, the weight of its output head."""

    model: nn.Module
    layers: nn.ModuleList
    hidden: Callable[[Tensor], Tensor]
    head: Tensor

    def compile_layers(self, **options: bool) -> None:
        for layer in self.layers:
            layer.compile(**options)


def ours(config: ModelConfig, float8: Float8 | None = None) -> Trained:
    with torch.device("cuda"):
        model = LanguageModel(config).bfloat16()
    if float8 is not None:
        use_float8(model, float8, torch.device("cuda"))
    return Trained(model, model.layers, lambda ids: model.hidden(ids)[0], model.head.weight)


def llama(**shape: int | bool) -> Trained:
    """transformers' Llama with attention through PyTorch; `shape` as for `llama_config`."""
    from transformers import LlamaForCausalLM

    config = llama_config(**shape, use_cache=False, attn_implementation="sdpa")
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    return Trained(model, model.model.layers, lambda ids: model.model(ids).last_hidden_state, model.lm_head.weight)


def training_step(trained: Trained, ids: Tensor) -> Callable[[], None]:
    """One step on ids [B, T + 1]: loss, gradients, fused AdamW."""
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        linear_cross_entropy(trained.hidden(ids[:, :-1]), trained.head, ids[:, 1:]).backward()
        optimizer.step()

    return step


def first_steps(step: Callable[[], None], count: int = 2) -> float:
    """Seconds of the first steps, which compile, tune and allocate."""
    begin = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measured(
    bench: str, name: str, trained: Trained, ids: Tensor, *, note: str = "", budget: float = 4.0, profile: int = 0
) -> Point:
    """The point of a training step, with the peak memory of the whole process. profile: kernels to print."""
    trained.model.train()
    step = training_step(trained, ids)
    first = first_steps(step)
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_milliseconds(step, budget=budget)
    peak = torch.cuda.max_memory_allocated()
    if profile:
        print(profile_table(step, 2, profile, torch.device("cuda")), flush=True)
    batch, tokens = ids.shape[0], ids.shape[1] - 1
    parameters = sum(p.numel() for p in trained.model.parameters())
    facts = f"{1e3 * batch * tokens / milliseconds:.0f} tokens/s, {parameters / 1e9:.3f}B parameters"
    facts += f", first two steps {first:.0f} s" + (f", {note}" if note else "")
    return Point(bench, f"B={batch} T={tokens}", name, "step", milliseconds, extra_bytes=peak, note=facts)
