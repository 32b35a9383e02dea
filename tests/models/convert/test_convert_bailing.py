"""Ling- and Ring-linear 2.0: logits are those of a float64 reference, whole and cached; what is refused."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file

from retnet.models.convert import convert, load
from retnet.models.directory import load_model
from tests.small_models import random_ids

from . import lightning_reference as reference
from .lightning_reference import glu_shapes, random_weights
from .transformers_peers import VOCAB, error, our_stepwise

RING = {
    "model_type": "bailing_moe_linear", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "layer_group_size": 3,
    "group_norm_size": 2, "first_k_dense_replace": 1, "num_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "num_shared_experts": 1, "moe_intermediate_size": 12, "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5, "rope_theta": 600.0, "rms_norm_eps": 1e-5, "score_function": "sigmoid",
    "norm_topk_prob": True, "use_qk_norm": True, "router_dtype": "fp32", "moe_router_enable_expert_bias": True,
    "max_position_embeddings": 64, "architectures": ["BailingMoeLinearV2ForCausalLM"], "dtype": "float64",
}  # fmt: skip
CASES = {
    "ring": RING,
    "six heads, all normed together, one of one kind each": {
        **RING, "num_attention_heads": 6, "num_key_value_heads": 6, "group_norm_size": 1, "partial_rotary_factor": 1.0,
        "num_experts_per_tok": 1, "topk_group": 1, "num_shared_experts": 0, "layer_group_size": 2,
        "num_hidden_layers": 5, "first_k_dense_replace": 0,
    },
    "dense": {**RING, "num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": None},
}  # fmt: skip


def shapes(c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of their tensors."""
    D, H, G, K = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    L, period = c["num_hidden_layers"], c["layer_group_size"]
    yield "model.word_embeddings.weight", (c["vocab_size"], D)
    for i in range(L):
        layer, mixer, fed = f"model.layers.{i}", f"model.layers.{i}.attention", f"model.layers.{i}.mlp"
        is_softmax = (i + 1) % period == 0 or i >= L // period * period
        yield f"{layer}.input_layernorm.weight", (D,)
        yield f"{mixer}.query_key_value.weight", ((H + 2 * (G if is_softmax else H)) * K, D)
        yield from ((f"{mixer}.{name}_layernorm.weight", (K,)) for name in ("query", "key"))
        if not is_softmax:
            yield f"{mixer}.g_proj.weight", (H * K, D)
            yield f"{mixer}.g_norm.weight", (H * K,)
        yield f"{mixer}.dense.weight", (D, H * K)
        yield f"{layer}.post_attention_layernorm.weight", (D,)
        if i < c["first_k_dense_replace"] or c["num_experts"] == 1:
            yield from glu_shapes(fed, D, c["intermediate_size"])
            continue
        yield f"{fed}.gate.weight", (c["num_experts"], D)
        yield f"{fed}.gate.expert_bias", (c["num_experts"],)
        for e in range(c["num_experts"]):
            yield from glu_shapes(f"{fed}.experts.{e}", D, c["moe_intermediate_size"])
        if c["num_shared_experts"]:
            yield from glu_shapes(f"{fed}.shared_experts", D, c["num_shared_experts"] * c["moe_intermediate_size"])
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (c["vocab_size"], D)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference_whole_and_cached(case):
    config, ids = CASES[case], random_ids(2, 11, high=VOCAB)
    theirs = random_weights(shapes(config))
    expected = reference.bailing(ids, theirs, config)
    assert expected.std() > 0.3
    ours = load(theirs, config=config)
    with torch.no_grad():
        assert error(ours(ids).logits, expected) <= 1e-10
        assert error(our_stepwise(ours, ids, 5), expected) <= 1e-10
        assert error(our_stepwise(ours, ids, 1), expected) <= 1e-10
        rounded = load({name: x.float() for name, x in theirs.items()}, config=config)
        assert error(rounded(ids).logits, expected) <= 1e-5


def test_a_directory_in_half_precision_keeps_routers_and_norms_as_they_are(tmp_path):
    theirs = random_weights(shapes(RING), torch.bfloat16)
    theirs = {name: x.float() if "mlp.gate." in name or "g_norm" in name else x for name, x in theirs.items()}
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**RING, "dtype": "bfloat16"}))
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours, ids = load_model(tmp_path / "ours"), random_ids(1, 9, high=VOCAB)
    assert ours.config.dtype == "bfloat16"
    mixture = ours.layers[1].feed_forward
    assert mixture.router.weight.dtype == mixture.routing_bias.dtype == torch.float32
    assert torch.equal(mixture.routing_bias, theirs["model.layers.1.mlp.gate.expert_bias"])
    expected = reference.bailing(ids, {name: x.double() for name, x in theirs.items()}, RING)
    with torch.no_grad():
        assert error(ours(ids).logits.double(), expected) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qkv_bias": True}, "use_qkv_bias is True; accepted: False"),
        ({"linear_silu": True}, "linear_silu is True; accepted: False"),
        ({"score_function": "softmax"}, "score_function is 'softmax'; accepted: 'sigmoid'"),
        ({"norm_head": True}, "norm_head is True; accepted: False"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1; accepted: 0"),
        ({"group_norm_size": 8}, "group_norm_size is 8; accepted: a divisor of num_attention_heads 4"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1; accepted: 2 or more"),
        (
            {"moe_shared_expert_intermediate_size": 16},
            "moe_shared_expert_intermediate_size is 16; accepted: moe_interm",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling has type 'yarn' or 'llama3'; accepted: none"),
        ({"kv_lora_rank": 8}, "kv_lora_rank is 8; accepted: None"),
        ({"model_type": "bailing_hybrid"}, "model_type is 'bailing_hybrid': Kimi delta attention"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_features_that_our_models_lack_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        load(random_weights(shapes(RING), torch.float32), config={**RING, **change})
