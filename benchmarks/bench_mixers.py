"""Mixers and stacks of them, side by side in one run.

    python benchmarks/bench_mixers.py mixer [--csv FILE]       one Mamba layer's mixing: ours, FLA's, mamba-ssm's;
                                                               on a CPU also whole layers, and transformers' slow path
    python benchmarks/bench_mixers.py stack [--only NAME ...]  a training step of the tri-mixer `arch_expert_research`
                                                               (1.53B), a pure RetNet and a Llama of as many parameters

On a GPU bfloat16 throughout, fused AdamW for `stack`. Mamba-2's recurrence is retention with queries and keys shared by
all heads; flash-linear-attention wants them for every head, so "fla" copies them as a Mamba-2 of its would, and "per
head" compares the operators alone, both with queries and keys a head. Implementations that are not installed are left
out and named.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from runner import Point, append, device_milliseconds, extra_mebibytes, floor_milliseconds, median_milliseconds, table
from torch import Tensor, nn

from retnet import LanguageModel, ModelConfig, retention
from retnet.layers.mamba1 import Mamba1, Mamba1Config
from retnet.layers.mamba2 import Mamba2, Mamba2Config
from retnet.layers.token_layout import TokenLayout
from retnet.models.cost import parameter_counts
from retnet.models.loss import linear_cross_entropy
from retnet.ops.selective_scan import selective_scan
from retnet.stack.resolve import resolve_config

MAMBA2_CASES = ((4, 8192, 32, 128, 64), (1, 32768, 32, 128, 64))  # B, T, heads, d_state, width of a head
MAMBA1_CASES = ((1, 8192, 1536, 16), (4, 8192, 1536, 16))  # B, T, D, d_state
CPU_MAMBA2 = (1, 1024, 768)  # B, T, width of the model
CPU_MAMBA1 = (1, 128, 768)  # transformers' backward takes time quadratic in T: 5 s here, minutes at 1024
CHUNK = 64  # of the floor's count of operations
COMPILED_SCAN = importlib.util.find_spec("selective_scan_cuda") is not None  # mamba-ssm's extension


# --- one mixer on a GPU ---


@torch.compile(dynamic=False)
def written(x: Tensor, step: Tensor) -> Tensor:
    """x [B, T, H, V] times its steps [B, T, H]: one kernel each way, as in a compiled model; mamba-ssm fuses it."""
    return x * step[..., None].to(x.dtype)


def mamba2_forms(H: int) -> dict[str, tuple[bool, Callable[..., Tensor]]]:
    """Implementation -> (queries and keys a head?, (C, B, x, step) -> out), for rates of -1."""

    def ours(q, k, x, step):
        return retention(q, k, written(x, step), -step, scale=1.0, return_state=False)[0]

    forms: dict[str, tuple[bool, Callable[..., Tensor]]] = {"ours": (False, ours), "ours per head": (True, ours)}
    if importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        def fla(q, k, x, step):
            q, k = (z.expand(-1, -1, x.shape[2], -1).contiguous() if z.shape[2] == 1 else z for z in (q, k))
            return chunk_simple_gla(q, k, written(x, step), -step, scale=1.0)[0]

        forms |= {"fla": (False, fla), "fla per head": (True, fla)}
    else:
        print("flash-linear-attention is not installed (pip install retnet[bench]): left out")
    if importlib.util.find_spec("mamba_ssm"):
        if not COMPILED_SCAN:  # built without Mamba-1, which its import asks for and Mamba-2 does not call
            sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        rates = -torch.ones(H, device="cuda")

        def mamba_ssm(q, k, x, step):
            return mamba_chunk_scan_combined(x, step, rates, k, q, chunk_size=256)

        forms["mamba-ssm"] = (False, mamba_ssm)
    else:
        print("mamba-ssm is not installed: left out")
    return forms


def mamba2_points(only: Sequence[str] | None, B: int, T: int, H: int, K: int, V: int) -> Iterator[Point]:
    for name, (per_head, form) in mamba2_forms(H).items():
        if only is not None and name not in only:
            continue
        G = H if per_head else 1
        generator = torch.Generator("cuda").manual_seed(0)
        draw = partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
        q, k, x = draw(B, T, G, K), draw(B, T, G, K) * K**-0.5, draw(B, T, H, V)
        step = 0.1 * torch.rand(B, T, H, generator=generator, device="cuda")
        floors = [_mamba2_floor(B * T, G, H, K, V, backward) for backward in (False, True)]
        yield from _timed("mamba2", f"mamba2 {B},{T},{H},{K},{V}", name, form, [q, k, x, step], floors)


def _mamba2_floor(tokens: int, G: int, H: int, K: int, V: int, backward: bool) -> float:
    """Operations of retention's count; queries and keys are moved once a group, steps in float32."""
    operations = H * (CHUNK * (K + V) + 4 * K * V)
    moved = 2 * (2 * G * K + 2 * H * V) + 4 * H
    if backward:
        operations += H * (CHUNK * (3 * K + 2 * V) + 10 * K * V)
        moved += 2 * (4 * G * K + 3 * H * V) + 8 * H
    return floor_milliseconds(tokens * operations, tokens * moved)


def mamba1_points(only: Sequence[str] | None, B: int, T: int, D: int, N: int) -> Iterator[Point]:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, generator=generator, device="cuda")
    x, write, read = draw(B, T, D).bfloat16(), draw(B, T, N).bfloat16(), draw(B, T, N).bfloat16()
    step, rate = F.softplus(draw(B, T, D) - 4), -torch.arange(1, N + 1, device="cuda").expand(D, N).float()
    forms: dict[str, Callable[..., Tensor]] = {"ours": lambda *z: selective_scan(*z)[0]}
    if importlib.util.find_spec("mamba_ssm") and COMPILED_SCAN:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def mamba_ssm(x, step, rate, write, read):
            turned = [z.transpose(1, 2) for z in (x, step.to(x.dtype), write, read)]
            return selective_scan_fn(turned[0], turned[1], rate, *turned[2:]).transpose(1, 2)

        forms["mamba-ssm"] = mamba_ssm
    # Read x, step, write, read and write y; the backward reads them and dy and writes their gradients.
    moved = [B * T * (2 * D + 4 * D + 2 * 2 * N + 2 * D)]
    moved.append(2 * moved[0] + B * T * (2 * D + 4 * D + 2 * 2 * N))
    floors = [floor_milliseconds(0, count) for count in moved]
    tensors = [x, step, rate.contiguous(), write, read]
    for name, form in forms.items():
        if only is None or name in only:
            yield from _timed("mamba1", f"mamba1 {B},{T},{D},{N}", name, form, tensors, floors)


def _timed(
    bench: str, case: str, name: str, form: Callable, tensors: list[Tensor], floors: list[float]
) -> Iterator[Point]:
    """Forward, and forward and backward with its peak memory; a point that fails says why."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    dout = torch.randn_like(tensors[2] if bench == "mamba2" else tensors[0])

    def forward():
        with torch.no_grad():
            return form(*leaves)

    def both():
        return torch.autograd.grad(form(*leaves), leaves, dout)

    for what, run, floor in (("forward", forward, floors[0]), ("forward+backward", both, floors[1])):
        try:
            run()
            memory = extra_mebibytes(run, sum(x.numel() * x.element_size() for x in leaves)) if run is both else None
            device, host = device_milliseconds(run)
            yield Point(bench, case, name, what, device, floor, host, extra_mebibytes=memory)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            yield Point(bench, case, name, what, float("inf"), note=str(error).splitlines()[0][:100])
        torch.cuda.empty_cache()


# --- on a CPU: Mamba-2's recurrence alone, and whole layers ---


def cpu_scan_points() -> Iterator[Point]:
    """The recurrence of Mamba-2 beside transformers' slow path for it, on the same float32 inputs."""
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        print("this version of transformers has no scan apart from its layer: left out")
        return
    B, T, D = CPU_MAMBA2
    H, K, V = 2 * D // 64, 128, 64
    x, step, rate = torch.randn(B, T, H, V), 0.1 * torch.rand(B, T, H), -1 - 15 * torch.rand(H)
    write, read = torch.randn(B, T, 1, K), torch.randn(B, T, 1, K)

    def ours(x, step, rate, write, read):
        return retention(read, write, x * step[..., None], rate * step, scale=1.0, return_state=False)[0]

    def theirs(x, step, rate, write, read):
        return mamba2_chunk_scan(x, step, rate, write, read, chunk_size=256)

    dout = torch.randn(B, T, H, V)
    for name, form in {"ours": ours, "transformers": theirs}.items():
        leaves = [z.clone().requires_grad_() for z in (x, step, rate, write, read)]
        with torch.no_grad():
            forward = median_milliseconds(lambda form=form, leaves=leaves: form(*leaves))
        both = median_milliseconds(lambda form=form, leaves=leaves: torch.autograd.grad(form(*leaves), leaves, dout))
        yield from _pair("mamba2 scan", f"{B},{T},{H},{K},{V}", name, forward, both)


def cpu_points() -> Iterator[Point]:
    """A layer's forward and backward in float32 (transformers has no kernels of its own there: its slow path)."""
    for name, (B, T, D), layers in (("mamba2", CPU_MAMBA2, _mamba2_layers), ("mamba1", CPU_MAMBA1, _mamba1_layers)):
        ours, theirs = layers(D)
        x, layout = torch.randn(B, T, D), TokenLayout.of((B, T), torch.device("cpu"))
        runs = {"ours": lambda y, ours=ours, layout=layout: ours(y, None, layout)[0], "transformers": theirs}
        for implementation, run in runs.items():
            input = x.clone().requires_grad_()
            with torch.no_grad():
                forward = median_milliseconds(lambda run=run, x=x: run(x))
            both = median_milliseconds(lambda run=run, input=input: run(input).sum().backward())
            yield from _pair(f"{name} layer", f"{B},{T},{D}", implementation, forward, both)


def _pair(bench: str, case: str, name: str, forward: float, both: float) -> list[Point]:
    return [
        Point(bench, f"{bench} {case}", name, what, milliseconds)
        for what, milliseconds in (("forward", forward), ("forward+backward", both))
    ]


def _mamba2_layers(D: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import Mamba2Config as Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = Mamba2Mixer(
        Config(hidden_size=D, num_heads=2 * D // 64, head_dim=64, state_size=128, n_groups=1, expand=2), layer_idx=0
    )
    return Mamba2(Mamba2Config(2 * D), D), theirs


def _mamba1_layers(D: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import MambaConfig as Config
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return Mamba1(Mamba1Config(2 * D, D // 16), D), MambaMixer(Config(hidden_size=D), layer_idx=0)


# --- training stacks of 1.5B ---

# (model, its hidden states, the head's weight)
Built = tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]
WIDTH_STEP = 128  # of feed-forwards, so that tensor cores are full


def stack_configs() -> dict[str, ModelConfig]:
    """The preset, and its retention layer in every place with the preset's parameters."""
    tri_mixer = replace(resolve_config("arch_expert_research"), gradient_checkpointing=False)
    target = parameter_counts(tri_mixer)["total"]
    layer = next(layer for layer in tri_mixer.layers if layer.mixer.kind == "retention")

    def pure(width: int) -> ModelConfig:
        block = replace(layer, feed_forward=replace(layer.feed_forward, hidden_dim=width))
        return replace(tri_mixer, layers=(block,) * len(tri_mixer.layers))

    width = _matching_width(lambda width: parameter_counts(pure(width))["total"], target)
    return {"tri-mixer": tri_mixer, "retnet": pure(width)}


def _matching_width(parameters: Callable[[int], int], target: int) -> int:
    """The feed-forward width at which parameters, linear in it, come nearest to the target."""
    one, two = parameters(WIDTH_STEP), parameters(2 * WIDTH_STEP)
    return WIDTH_STEP * (1 + round((target - one) / (two - one)))


def ours(config: ModelConfig, compile: bool) -> Built:
    with torch.device("cuda"):
        model = LanguageModel(config).bfloat16()
    if compile:
        for layer in model.layers:
            layer.compile()
    return model, lambda ids: model.hidden(ids)[0], model.head.weight


def llama(like: ModelConfig, compile: bool) -> Built:
    """transformers' Llama of the width, depth, heads and vocabulary, attention by SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def config(width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=like.vocab_size,
            hidden_size=like.d_model,
            intermediate_size=width,
            num_hidden_layers=len(like.layers),
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )

    def parameters(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in LlamaForCausalLM(config(width)).parameters())

    width = _matching_width(parameters, parameter_counts(like)["total"])
    with torch.device("cuda"):
        model = LlamaForCausalLM(config(width)).bfloat16()
    if compile:
        for layer in model.model.layers:
            layer.compile()
    return model, lambda ids: model.model(ids).last_hidden_state, model.lm_head.weight


def stack_points(name: str, batch: int, tokens: int, compile: bool) -> Iterator[Point]:
    torch.cuda.empty_cache()  # of the stack before
    configs = stack_configs()
    model, hidden, weight = llama(configs["tri-mixer"], compile) if name == "llama" else ours(configs[name], compile)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, configs["tri-mixer"].vocab_size, (batch, tokens + 1), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        linear_cross_entropy(hidden(ids[:, :-1]), weight, ids[:, 1:]).backward()
        optimizer.step()

    step()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_milliseconds(step, budget=3.0)
    parameters = sum(p.numel() for p in model.parameters())
    note = f"{1e3 * batch * tokens / milliseconds:.0f} tokens/s, {parameters / 1e9:.3f}B parameters"
    note += ", compiled" if compile else ", eager"
    peak = torch.cuda.max_memory_allocated() / 2**20
    yield Point("stack", f"B={batch} T={tokens}", name, "step", milliseconds, extra_mebibytes=peak, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mixer", "stack"])
    parser.add_argument("--only", nargs="+", choices=["tri-mixer", "retnet", "llama"], help="of the stacks")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="of the mixers on a GPU")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile the stacks' layers")
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    measures: list[Callable[[], Iterator[Point]]]
    if options.what == "stack":
        names = options.only or ("tri-mixer", "retnet", "llama")
        measures = [partial(stack_points, name, options.batch, options.tokens, not options.eager) for name in names]
    elif not torch.cuda.is_available():
        measures = [cpu_scan_points, cpu_points]
    else:
        measures = [partial(mamba2_points, options.implementations, *case) for case in MAMBA2_CASES]
        measures += [partial(mamba1_points, options.implementations, *case) for case in MAMBA1_CASES]
    for measure in measures:
        for point in measure():
            print(table([point]), flush=True)
            if options.csv:
                append(options.csv, [point])  # at once: a run that is cut short keeps what it measured


if __name__ == "__main__":
    main()
