"""flash-linear-attention's layers and two of its models in float64, written from what its code computes.

Every sum over earlier tokens is taken term by term. Nothing of `retnet` is used. The arguments are those of FLA's
constructors, with its defaults where they matter here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .peers import VOCAB, random_state

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def layer_state(kind: str, o: dict[str, Any], seed: int = 0) -> Weights:
    """A random state dict of one layer, float64."""
    shapes = {"Mamba2": _mamba2_shapes, "Attention": _attention_shapes}.get(kind, _linear_shapes)(kind, o)
    return {name: x.double() for name, x in random_state(shapes, seed).items()}


def _mamba2_shapes(kind: str, o: dict[str, Any]) -> Shapes:
    D, N, G = o["hidden_size"], o["state_size"], o.get("n_groups", 1)
    inner = int(o.get("expand", 2) * D)
    heads, conv = inner // o["head_dim"], inner + 2 * G * N
    shapes: Shapes = {"in_proj.weight": (inner + conv + heads, D), "conv1d.weight": (conv, 1, o.get("conv_kernel", 4))}
    shapes |= {"A_log": (heads,), "D": (heads,), "dt_bias": (heads,), "out_proj.weight": (D, inner)}
    if o.get("use_conv_bias", True):
        shapes["conv1d.bias"] = (conv,)
    if o.get("use_bias"):
        shapes |= {"in_proj.bias": (inner + conv + heads,), "out_proj.bias": (D,)}
    if o.get("rmsnorm", True):
        shapes["norm.weight"] = (inner,)
    return shapes


def _attention_shapes(kind: str, o: dict[str, Any]) -> Shapes:
    D, H = o["hidden_size"], o["num_heads"]
    K = D // H
    kv = K * (o.get("num_kv_heads") or H)
    widths = {"q": D, "k": kv, "v": kv}
    shapes: Shapes = {f"{name}_proj.weight": (width, D) for name, width in widths.items()}
    shapes["o_proj.weight"] = (D, D)
    if o.get("qkv_bias"):
        shapes |= {f"{name}_proj.bias": (width,) for name, width in widths.items()}
    if o.get("qk_norm"):
        shapes |= {"q_norm.weight": (K,), "k_norm.weight": (K,)}
    return shapes


def _linear_shapes(kind: str, o: dict[str, Any]) -> Shapes:
    D, H, yoco = o["hidden_size"], o["num_heads"], kind == "YOCOGatedRetention"
    K, V = (int(D * (1 if yoco else o.get(f"expand_{x}", 1.0))) for x in "kv")
    share = H // (o.get("num_kv_heads") or H)
    widths = {"q": K, "k": K // share, "v": V // share, "g": V}
    if not o.get("use_output_gate", True):
        del widths["g"]
    shapes: Shapes = {f"{name}_proj.weight": (width, D) for name, width in widths.items()}
    shapes["o_proj.weight"] = (D, V)
    if kind != "MultiScaleRetention":
        shapes["gk_proj.weight"] = (H, D)
    if kind == "SimpleGatedLinearAttention":
        shapes["gk_proj.bias"] = (H,)
    if not yoco:
        fused = o.get("gate_fn", "swish") == "swish" and "g" in widths
        shapes["g_norm_swish_gate.weight" if fused else "g_norm.weight"] = (V // H,)
        if o.get("use_short_conv", kind == "SimpleGatedLinearAttention"):
            shapes |= {f"{name}_conv1d.weight": (widths[name], 1, o.get("conv_size", 4)) for name in "qkv"}
    return shapes


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, angle: Tensor, neighbours: bool) -> Tensor:
    """x [..., T, K] rotated by angle [T, K / 2]: neighbours, or the two halves, as real and imaginary parts."""
    real, imag = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    a, b = real * angle.cos() - imag * angle.sin(), real * angle.sin() + imag * angle.cos()
    return torch.stack([a, b], -1).flatten(-2) if neighbours else torch.cat([a, b], -1)


def convolved(x: Tensor, taps: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """silu of the causal convolution of x [B, T, C]; the last tap is of the token itself."""
    width, T = taps.shape[-1], x.shape[1]
    late = F.pad(x, (0, 0, width - 1, 0))
    return F.silu(sum(taps[:, 0, i] * late[:, i : i + T] for i in range(width)) + bias)


def decayed_sum(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """sum_{s <= t} (q_t k_s) prod_{s < r <= t} exp(log_decay_r) v_s; q, k [B, H, T, K], v [B, H, T, V]."""
    T = q.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for t in range(T):
        for s in range(t + 1):
            weight = (q[:, :, t] * k[:, :, s]).sum(-1) * log_decay[:, :, s + 1 : t + 1].sum(-1).exp()
            out[:, :, t] += weight[..., None] * v[:, :, s]
    return out


def layer_output(kind: str, w: Weights, o: dict[str, Any], x: Tensor) -> Tensor:
    """What a layer computes from x [B, T, D]."""
    if kind == "Mamba2":
        return mamba2(w, o, x)
    return attention(w, o, x) if kind == "Attention" else linear_attention(kind, w, o, x)


def linear_attention(kind: str, w: Weights, o: dict[str, Any], x: Tensor) -> Tensor:
    """MultiScaleRetention, SimpleGatedLinearAttention and YOCOGatedRetention."""
    H, T = o["num_heads"], x.shape[1]
    eps = o.get("norm_eps", 1e-6 if kind == "YOCOGatedRetention" else 1e-5)
    parts = {}
    for name in "qkv":
        y = x @ w[f"{name}_proj.weight"].T
        y = convolved(y, w[f"{name}_conv1d.weight"]) if f"{name}_conv1d.weight" in w else y
        count = H if name == "q" else o.get("num_kv_heads") or H
        parts[name] = y.unflatten(-1, (count, -1)).transpose(1, 2).repeat_interleave(H // count, 1)
    q, k, v = parts["q"], parts["k"], parts["v"]
    K = q.shape[-1]
    pairs = torch.arange(K // 2, dtype=torch.float64)
    if kind == "MultiScaleRetention":
        angle = torch.arange(T)[:, None] * 10000 ** -(2 * pairs / K)
        q, k = (turned(y, angle, neighbours=False) for y in (q, k))
        log_decay = (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).log()[None, :, None].expand(len(x), H, T)
    else:
        opened = x @ w["gk_proj.weight"].T + w.get("gk_proj.bias", 0.0)
        log_decay = (F.logsigmoid(opened) / o.get("gate_logit_normalizer", 16)).transpose(1, 2)
    if kind == "YOCOGatedRetention":
        exponents = pairs / (K // 2 - 1) if o.get("rope_inv_freq") == "yoco" else 2 * pairs / K
        angle = torch.arange(T)[:, None] * o.get("rope_theta", 1e4) ** -exponents
        q, k = (turned(y, angle, neighbours=True) for y in (q, k))
    y = decayed_sum(q, k, v, log_decay).transpose(1, 2) * K**-0.5
    y = rms(y, w.get("g_norm_swish_gate.weight", w.get("g_norm.weight", 1.0)), eps).flatten(-2)
    if "g_proj.weight" in w:
        gate = x @ w["g_proj.weight"].T
        y = y * (gate.sigmoid() if o.get("gate_fn") == "sigmoid" else F.silu(gate))
    return y @ w["o_proj.weight"].T


def mamba2(w: Weights, o: dict[str, Any], x: Tensor) -> Tensor:
    inner, N, G = int(o.get("expand", 2) * x.shape[-1]), o["state_size"], o.get("n_groups", 1)
    H = inner // o["head_dim"]
    z, u, dt = (x @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)).split((inner, inner + 2 * G * N, H), -1)
    u, B, C = convolved(u, w["conv1d.weight"], w.get("conv1d.bias", 0.0)).split((inner, G * N, G * N), -1)
    u = u.unflatten(-1, (H, -1)).transpose(1, 2)
    B, C = (y.unflatten(-1, (G, N)).transpose(1, 2).repeat_interleave(H // G, 1) for y in (B, C))
    dt = F.softplus(dt + w["dt_bias"]).clamp(*o.get("dt_limit", (0.0, math.inf))).transpose(1, 2)
    y = decayed_sum(C, B, u * dt[..., None], -w["A_log"].exp()[:, None] * dt) + w["D"][:, None, None] * u
    y, gate = y.transpose(1, 2).flatten(-2), F.silu(z)

    def normed(y: Tensor) -> Tensor:
        return rms(y.unflatten(-1, (G, -1)), 1.0, o.get("norm_eps", 1e-5)).flatten(-2) * w["norm.weight"]

    if not o.get("rmsnorm", True):
        y = y * gate
    else:
        y = normed(y) * gate if o.get("norm_before_gate") else normed(y * gate)
    return y @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)


def attention(w: Weights, o: dict[str, Any], x: Tensor) -> Tensor:
    H, T = o["num_heads"], x.shape[1]
    K = x.shape[-1] // H
    parts = {}
    for name in "qkv":
        y = (x @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0.0)).unflatten(-1, (-1, K))
        y = rms(y, w[f"{name}_norm.weight"], 1e-5) if f"{name}_norm.weight" in w else y
        parts[name] = y.transpose(1, 2).repeat_interleave(H // y.shape[2], 1)
    pairs = torch.arange(K // 2, dtype=torch.float64)
    angle = torch.arange(T)[:, None] * o.get("rope_theta", 1e4) ** -(2 * pairs / K)
    q, k = (turned(parts[name], angle, neighbours=False) for name in "qk")
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < (o.get("window_size") or T))
    scores = (q @ k.transpose(-1, -2) * K**-0.5).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ parts["v"]).transpose(1, 2).flatten(-2) @ w["o_proj.weight"].T


def transformer_state(o: dict[str, Any]) -> Weights:
    """A random state dict of TransformerForCausalLM, float64."""
    D, ffn = o["hidden_size"], o["intermediate_size"]
    state = random_state({
        "model.embeddings.weight": (VOCAB, D), "model.norm.weight": (D,), "lm_head.weight": (VOCAB, D)
    })  # fmt: skip
    for i in range(o["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes: Shapes = {"attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.down_proj.weight": (D, ffn)}
        shapes |= {"mlp.gate_proj.weight": (ffn, D), "mlp.up_proj.weight": (ffn, D)}
        state |= {p + name: x for name, x in random_state(shapes, 7 * i + 1).items()}
        state |= {f"{p}attn.{name}": x for name, x in layer_state("Attention", o, 7 * i + 2).items()}
    return {name: x.double() for name, x in state.items()}


def transformer_logits(w: Weights, o: dict[str, Any], ids: Tensor) -> Tensor:
    eps, x = o.get("norm_eps", 1e-6), w["model.embeddings.weight"][ids]
    for i in range(o["num_hidden_layers"]):
        p = f"model.layers.{i}."
        x = x + attention(_under(w, f"{p}attn."), o, rms(x, w[f"{p}attn_norm.weight"], eps))
        y = rms(x, w[f"{p}mlp_norm.weight"], eps)
        y = F.silu(y @ w[f"{p}mlp.gate_proj.weight"].T) * (y @ w[f"{p}mlp.up_proj.weight"].T)
        x = x + y @ w[f"{p}mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def mamba2_state(o: dict[str, Any]) -> Weights:
    """A random state dict of FLA's Mamba2ForCausalLM, float64."""
    D = o["hidden_size"]
    state = random_state({
        "backbone.embeddings.weight": (VOCAB, D), "backbone.norm_f.weight": (D,), "lm_head.weight": (VOCAB, D),
        **{f"backbone.layers.{i}.norm.weight": (D,) for i in range(o["num_hidden_layers"])},
    })  # fmt: skip
    for i in range(o["num_hidden_layers"]):
        state |= {f"backbone.layers.{i}.mixer.{name}": x for name, x in layer_state("Mamba2", o, i).items()}
    return {name: x.double() for name, x in state.items()}


def mamba2_logits(w: Weights, o: dict[str, Any], ids: Tensor) -> Tensor:
    eps, x = o.get("norm_eps", 1e-5), w["backbone.embeddings.weight"][ids]
    for i in range(o["num_hidden_layers"]):
        p = f"backbone.layers.{i}."
        x = x + mamba2(_under(w, f"{p}mixer."), o, rms(x, w[f"{p}norm.weight"], eps))
    return rms(x, w["backbone.norm_f.weight"], eps) @ w["lm_head.weight"].T


def _under(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
