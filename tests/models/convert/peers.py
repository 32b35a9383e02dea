"""Small random checkpoints of other implementations, and the logits that those implementations compute from them.

The forwards are written from the published conventions, in float64 and quadratic in time. Nothing of `retnet` is used,
so that a convention misread there cannot agree with itself here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

VOCAB = 61
TORCHSCALE_ARGS = {
    "decoder_embed_dim": 32,
    "decoder_value_embed_dim": 48,
    "decoder_retention_heads": 4,
    "decoder_ffn_embed_dim": 40,
    "decoder_layers": 2,
    "vocab_size": VOCAB,
    "layernorm_eps": 1e-5,
}
FLA_CONFIG = {
    "model_type": "retnet",
    "hidden_size": 32,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "norm_eps": 1e-5,
    "vocab_size": VOCAB,
}


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Matrices at unit gain, norms around one, so that nothing can be dropped unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            state[name] = 0.1 * x
        else:
            state[name] = 1 + 0.1 * x if len(shape) == 1 else x * shape[-1] ** -0.5
    return state


def log_decay(args: dict) -> Tensor:
    """log gamma [H], float64."""
    H = args["decoder_retention_heads"]
    if args.get("use_lm_decay"):
        return (1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), H, dtype=torch.float64))).log()
    return (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).log()


def torchscale_state(args: dict, *, prefix: str = "", head: str = "output_projection.weight") -> dict[str, Tensor]:
    """A random state dict of torchscale's RetNet (syncdoth's with its prefix and head), buffers included."""
    D, V, H = (args[f"decoder_{key}"] for key in ("embed_dim", "value_embed_dim", "retention_heads"))
    ffn, subln = args["decoder_ffn_embed_dim"], args.get("subln", True) and not args.get("deepnorm")
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB, D)}
    for i in range(args["decoder_layers"]):
        layer = f"layers.{i}."
        shapes |= {f"{layer}retention.{name}_proj.weight": (D, D) for name in "qk"}
        shapes |= {f"{layer}retention.{name}_proj.weight": (V, D) for name in "vg"}
        shapes |= {f"{layer}retention.out_proj.weight": (D, V), f"{layer}retention_layer_norm.weight": (D,)}
        shapes |= {f"{layer}final_layer_norm.weight": (D,), f"{layer}ffn.fc1.weight": (ffn, D)}
        shapes |= {f"{layer}ffn.fc2.weight": (D, ffn)}
        if args.get("use_glu", True):
            shapes[f"{layer}ffn.gate.weight"] = (ffn, D)
        else:
            shapes |= {f"{layer}ffn.fc1.bias": (ffn,), f"{layer}ffn.fc2.bias": (D,)}
            if subln:
                shapes[f"{layer}ffn.ffn_layernorm.weight"] = (ffn,)
                if not args.get("use_ffn_rms_norm"):
                    shapes[f"{layer}ffn.ffn_layernorm.bias"] = (ffn,)
    if args.get("layernorm_embedding"):
        shapes["layernorm_embedding.weight"] = (D,)
    if args.get("decoder_normalize_before", True):
        shapes["layer_norm.weight"] = (D,)
    state = random_state(shapes)
    angle = 1.0 / 10000 ** torch.linspace(0, 1, D // H // 2)
    state["retnet_rel_pos.angle"] = angle.repeat_interleave(2)
    state["retnet_rel_pos.decay"] = log_decay(args).float()
    state = {prefix + name: x for name, x in state.items()}
    state[head] = random_state({head: (VOCAB, D)}, seed=1)[head]
    return state


def torchscale_logits(
    state: dict[str, Tensor],
    args: dict,
    ids: Tensor,
    *,
    prefix: str = "",
    head: str = "output_projection.weight",
    stored_decay: bool = False,
) -> Tensor:
    """The recurrent form (no clamp of scores), float64, [B, T, vocab].

    stored_decay: with the decays in the checkpoint instead of the exact ones that they are rounded from.
    """
    w = {name.removeprefix(prefix): x.double() for name, x in state.items()}
    D, H, eps = args["decoder_embed_dim"], args["decoder_retention_heads"], args["layernorm_eps"]
    T, K = ids.shape[1], D // H
    decay = (w["retnet_rel_pos.decay"] if stored_decay else log_decay(args)).exp()
    angle = torch.arange(T)[:, None] * 10000 ** -torch.linspace(0, 1, K // 2, dtype=torch.float64)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.where(distance >= 0, decay[:, None, None] ** distance.clamp(min=0), 0)
    mask = mask / mask.sum(-1, keepdim=True).sqrt()
    act = {"gelu": F.gelu, "swish": F.silu, "relu": F.relu}[args.get("activation_fn", "gelu")]
    pre, deepnorm = args.get("decoder_normalize_before", True), args.get("deepnorm", False)
    alpha = (2 * args["decoder_layers"]) ** 0.25 if deepnorm else 1.0

    def rms(x: Tensor, weight: Tensor | float) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def turn(x: Tensor) -> Tensor:  # neighbours as the real and imaginary part of a number
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(z).flatten(-2)

    def retention(x: Tensor, p: str) -> Tensor:
        q, k, v = ((x @ w[f"{p}.{n}_proj.weight"].T).unflatten(-1, (H, -1)).transpose(1, 2) for n in "qkv")
        scores = turn(q) @ turn(k * K**-0.5).transpose(-1, -2) * mask
        y = rms((scores @ v).transpose(1, 2), 1.0).flatten(-2)
        return (F.silu(x @ w[f"{p}.g_proj.weight"].T) * y) @ w[f"{p}.out_proj.weight"].T

    def ffn(x: Tensor, p: str) -> Tensor:
        if f"{p}.gate.weight" in w:
            return (act(x @ w[f"{p}.fc1.weight"].T) * (x @ w[f"{p}.gate.weight"].T)) @ w[f"{p}.fc2.weight"].T
        h = act(x @ w[f"{p}.fc1.weight"].T + w[f"{p}.fc1.bias"])
        if f"{p}.ffn_layernorm.bias" in w:
            h = F.layer_norm(h, h.shape[-1:], w[f"{p}.ffn_layernorm.weight"], w[f"{p}.ffn_layernorm.bias"], eps)
        elif f"{p}.ffn_layernorm.weight" in w:
            h = rms(h, w[f"{p}.ffn_layernorm.weight"])
        return h @ w[f"{p}.fc2.weight"].T + w[f"{p}.fc2.bias"]

    x = w["embed_tokens.weight"][ids] * (1.0 if args.get("no_scale_embedding", True) else math.sqrt(D))
    if "layernorm_embedding.weight" in w:
        x = rms(x, w["layernorm_embedding.weight"])
    for i in range(args["decoder_layers"]):
        p = f"layers.{i}"
        for part, norm in ((retention, "retention_layer_norm"), (ffn, "final_layer_norm")):
            name = f"{p}.{'retention' if part is retention else 'ffn'}"
            weight = w[f"{p}.{norm}.weight"]
            if pre:
                x = alpha * x + part(rms(x, weight), name)
            else:
                x = rms(alpha * x + part(x, name), weight)
    return (rms(x, w["layer_norm.weight"]) if pre else x) @ w[head].T


def fla_state(config: dict) -> dict[str, Tensor]:
    """A random state dict of FLA's RetNetForCausalLM, with convolutions if its blocks pass `use_short_conv` on."""
    D, H, ffn = config["hidden_size"], config["num_heads"], config["intermediate_size"]
    K, V = int(D * config.get("expand_k", 1)), int(D * config.get("expand_v", 2))
    share = H // (config.get("num_kv_heads") or H)
    gate, affine = config.get("use_output_gate", True), config.get("elementwise_affine", True)
    norm = "g_norm_swish_gate" if gate and config.get("fuse_norm", True) else "g_norm"
    attn = config.get("attn") or {"layers": []}
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "attn_norm.weight": (D,), p + "mlp_norm.weight": (D,), p + "mlp.down_proj.weight": (D, ffn)}
        shapes |= {p + "mlp.gate_proj.weight": (ffn, D), p + "mlp.up_proj.weight": (ffn, D)}
        if i in attn["layers"]:
            kv = D // attn["num_heads"] * attn["num_kv_heads"]
            widths = {"q": D, "k": kv, "v": kv}
            shapes[p + "attn.o_proj.weight"] = (D, D)
            if attn.get("qkv_bias"):
                shapes |= {f"{p}attn.{name}_proj.bias": (width,) for name, width in widths.items()}
        else:
            widths = {"q": K, "k": K // share, "v": V // share} | ({"g": V} if gate else {})
            shapes[p + "attn.o_proj.weight"] = (D, V)
            if config.get("use_short_conv"):
                taps = (1, config.get("conv_size", 4))
                shapes |= {f"{p}attn.{name}_conv1d.weight": (widths[name], *taps) for name in "qkv"}
            if affine:
                shapes[f"{p}attn.{norm}.weight"] = (V // H,)
        shapes |= {f"{p}attn.{name}_proj.weight": (width, D) for name, width in widths.items()}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, D)
    return random_state(shapes)


def fla_logits(state: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """FLA's RetNet, float64, [B, T, vocab]."""
    w = {name: x.double() for name, x in state.items()}
    D, H, eps = config["hidden_size"], config["num_heads"], config["norm_eps"]
    T = ids.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    mask = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0)
    attn = config.get("attn") or {"layers": []}

    def rms(x: Tensor, weight: Tensor | float) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def turn(x: Tensor, base: float) -> Tensor:  # halves as the real and imaginary part of a number
        K = x.shape[-1]
        angle = torch.arange(T)[:, None] * base ** -(torch.arange(0, K, 2, dtype=torch.float64) / K)
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    def heads(x: Tensor, name: str, dim: int, count: int) -> Tensor:
        y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
        taps = w.get(name.replace("_proj", "_conv1d.weight"))
        if taps is not None:  # the last tap is of the token itself
            late = F.pad(y, (0, 0, taps.shape[-1] - 1, 0))
            y = F.silu(sum(taps[:, 0, i] * late[:, i : i + T] for i in range(taps.shape[-1])))
        return y.unflatten(-1, (-1, dim)).transpose(1, 2).repeat_interleave(count // (y.shape[-1] // dim), 1)

    def retention(x: Tensor, p: str) -> Tensor:
        K, V = int(D * config.get("expand_k", 1)) // H, int(D * config.get("expand_v", 2)) // H
        q, k, v = (heads(x, f"{p}.{n}_proj", dim, H) for n, dim in zip("qkv", (K, K, V)))
        y = (turn(q, 1e4) @ turn(k, 1e4).transpose(-1, -2) * K**-0.5 * mask @ v).transpose(1, 2)
        y = rms(y, w.get(f"{p}.g_norm_swish_gate.weight", w.get(f"{p}.g_norm.weight", 1.0))).flatten(-2)
        if f"{p}.g_proj.weight" in w:
            y = F.silu(x @ w[f"{p}.g_proj.weight"].T) * y
        return y @ w[f"{p}.o_proj.weight"].T

    def attention(x: Tensor, p: str) -> Tensor:
        K, base = D // attn["num_heads"], attn.get("rope_theta", 1e4)
        q, k, v = (heads(x, f"{p}.{n}_proj", K, attn["num_heads"]) for n in "qkv")
        seen = (distance >= 0) & (distance < (attn.get("window_size") or T))
        scores = (turn(q, base) @ turn(k, base).transpose(-1, -2) * K**-0.5).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ w[f"{p}.o_proj.weight"].T

    x = w["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        mixer = attention if i in attn["layers"] else retention
        x = x + mixer(rms(x, w[f"{p}.attn_norm.weight"]), f"{p}.attn")
        y = rms(x, w[f"{p}.mlp_norm.weight"])
        y = F.silu(y @ w[f"{p}.mlp.gate_proj.weight"].T) * (y @ w[f"{p}.mlp.up_proj.weight"].T)
        x = x + y @ w[f"{p}.mlp.down_proj.weight"].T
    head = "model.embeddings.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return rms(x, w["model.norm.weight"]) @ w[head].T
