"""Float64 references of Ling-/Ring-linear 2.0 and MiniCPM-SALA, written from the definitions of their published code.

Weights are their tensors by name; every sum is written out, without state and without chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def glu_shapes(place: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{place}.{name}_proj.weight", (hidden, width)) for name in ("gate", "up"))
    yield f"{place}.down_proj.weight", (width, hidden)


def random_weights(
    named: Iterator[tuple[str, tuple[int, ...]]], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random tensors at unit gain: norms around 1, biases of experts that change their order."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, shape in named:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2:
            x = x * (1.0 if "embed" in name else shape[1] ** -0.5)
        else:
            x = 0.2 * x + (0.0 if name.endswith("bias") else 1.0)
        found[name] = x.to(dtype)
    return found


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def slopes(heads: int) -> Tensor:
    """The slopes of ALiBi, by the recursion of the authors' code."""

    def of(n: int) -> list[float]:
        if math.log2(n).is_integer():
            start = 2.0 ** (-(2.0 ** -(math.log2(n) - 3)))
            return [start ** (i + 1) for i in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return of(below) + of(2 * below)[::2][: n - below]

    return torch.tensor(of(heads), dtype=torch.float64)


def rotated(x: Tensor, width: int, base: float) -> Tensor:
    """x [B, T, H, K] with its first `width` components rotated in halves by their position."""
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def lightning(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, scale: float) -> Tensor:
    """out_t = scale sum_s exp(-slope (t - s)) (q_t k_s) v_s over s <= t; all [B, T, H, K], slope [H]."""
    T = q.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    decay = torch.where(distance >= 0, torch.exp(-slope[:, None, None] * distance.clamp_min(0)), 0.0)
    return torch.einsum("bthk,bshk,hts,bshv->bthv", scale * q, k, decay, v)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, T, H, K], k and v [B, T, G, K] -> [B, T, H, K]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhts,bshk->bthk", logits.softmax(-1), v)


def glu(x: Tensor, w: Weights, place: str) -> Tensor:
    gate, up = x @ w[f"{place}.gate_proj.weight"].T, x @ w[f"{place}.up_proj.weight"].T
    return (F.silu(gate) * up) @ w[f"{place}.down_proj.weight"].T


def experts(x: Tensor, w: Weights, place: str, c: Mapping) -> Tensor:
    """Each token alone: the best groups by the sum of their two best biased scores, then the best experts in them."""
    E, groups = c["num_experts"], c["n_group"]
    rows = []
    for token in x.flatten(0, 1):
        scores = torch.sigmoid(w[f"{place}.gate.weight"] @ token)
        biased = scores + w[f"{place}.gate.expert_bias"]
        worth = [sum(sorted(biased[g * E // groups : (g + 1) * E // groups].tolist())[-2:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -worth[g])[: c["topk_group"]]
        open_to = [e for e in range(E) if e * groups // E in allowed]
        chosen = sorted(open_to, key=lambda e: -biased[e].item())[: c["num_experts_per_tok"]]
        total = sum(scores[e] for e in chosen) if len(chosen) > 1 else 1.0
        routed = sum(scores[e] / total * glu(token, w, f"{place}.experts.{e}") for e in chosen)
        shared = glu(token, w, f"{place}.shared_experts") if c["num_shared_experts"] else 0.0
        rows.append(c["routed_scaling_factor"] * routed + shared)
    return torch.stack(rows).view(x.shape)


def bailing(ids: Tensor, w: Weights, c: Mapping) -> Tensor:
    """Logits [B, T, vocab] of `bailing_moe_linear`."""
    L, H, G, K, eps = (
        c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rms_norm_eps"]
    )  # fmt: skip
    width, period = int(K * c["partial_rotary_factor"]), c["layer_group_size"]
    x = w["model.word_embeddings.weight"][ids]
    for i in range(L):
        place = f"model.layers.{i}"
        is_softmax = (i + 1) % period == 0 or i >= L // period * period
        y = rms(x, w[f"{place}.input_layernorm.weight"], eps)
        shared = G if is_softmax else H
        fused = (y @ w[f"{place}.attention.query_key_value.weight"].T).unflatten(-1, (H + 2 * shared, K))
        q, k, v = fused.split([H, shared, shared], -2)
        q = rotated(rms(q, w[f"{place}.attention.query_layernorm.weight"], eps), width, c["rope_theta"])
        k = rotated(rms(k, w[f"{place}.attention.key_layernorm.weight"], eps), width, c["rope_theta"])
        if is_softmax:
            out = softmax_attention(q, k, v).flatten(-2)
        else:
            slope = slopes(H) * (1 - (i - 1) / (L - 1) + 1e-5)
            out = lightning(q, k, v, slope, K**-0.5).flatten(-2).unflatten(-1, (c["group_norm_size"], -1))
            out = rms(out, torch.ones(()), eps).flatten(-2) * w[f"{place}.attention.g_norm.weight"]
            out = out * torch.sigmoid(y @ w[f"{place}.attention.g_proj.weight"].T)
        x = x + out @ w[f"{place}.attention.dense.weight"].T
        y = rms(x, w[f"{place}.post_attention_layernorm.weight"], eps)
        is_dense = i < c["first_k_dense_replace"] or c["num_experts"] == 1
        x = x + (glu(y, w, f"{place}.mlp") if is_dense else experts(y, w, f"{place}.mlp", c))
    return rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def minicpm_sala(ids: Tensor, w: Weights, c: Mapping) -> Tensor:
    """Logits [B, T, vocab] of `minicpm_sala` for T below dense_len."""
    H, G, K, eps = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rms_norm_eps"]
    N, S, d = c["lightning_nh"], c["lightning_nkv"], c["lightning_head_dim"]
    scale = {"1/sqrt(d)": d**-0.5, "1/d": 1 / d, "1": 1.0}[c["lightning_scale"]]
    branch = c["scale_depth"] / math.sqrt(c["num_hidden_layers"])
    x = w["model.embed_tokens.weight"][ids] * c["scale_emb"]
    for i, kind in enumerate(c["mixer_types"]):
        place = f"model.layers.{i}.self_attn"
        y = rms(x, w[f"model.layers.{i}.input_layernorm.weight"], eps)
        q, k, v = (y @ w[f"{place}.{name}_proj.weight"].T for name in "qkv")
        if kind == "minicpm4":
            q, k, v = (z.unflatten(-1, (n, K)) for z, n in ((q, H), (k, G), (v, G)))
            if c["attn_use_rope"]:
                q, k = rotated(q, K, c["rope_theta"]), rotated(k, K, c["rope_theta"])
            out, gate = softmax_attention(q, k, v).flatten(-2), "o_gate"
        else:
            q, k, v = (z.unflatten(-1, (n, d)) for z, n in ((q, N), (k, S), (v, S)))
            q, k = rms(q, w[f"{place}.q_norm.weight"], eps), rms(k, w[f"{place}.k_norm.weight"], eps)
            q, k = rotated(q, d, c["rope_theta"]), rotated(k, d, c["rope_theta"])
            k, v = (z.repeat_interleave(N // S, 2) for z in (k, v))
            out = rms(lightning(q, k, v, slopes(N), scale).flatten(-2), w[f"{place}.o_norm.weight"], eps)
            gate = "z_proj"
        out = out * torch.sigmoid(y @ w[f"{place}.{gate}.weight"].T)
        x = x + branch * (out @ w[f"{place}.o_proj.weight"].T)
        y = rms(x, w[f"model.layers.{i}.post_attention_layernorm.weight"], eps)
        x = x + branch * glu(y, w, f"model.layers.{i}.mlp")
    hidden = rms(x, w["model.norm.weight"], eps) / (c["hidden_size"] / c["dim_model_base"])
    return hidden @ w["lm_head.weight"].T
