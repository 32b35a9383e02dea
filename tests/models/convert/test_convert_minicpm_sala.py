"""MiniCPM-SALA: logits are those of a float64 reference while its attention is dense, and longer texts are refused."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file

import retnet.hf  # registers the classes  # noqa: F401
from retnet.models.convert import convert, load
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_model
from retnet.models.hf import RetNetForCausalLM
from retnet.models.parallel.context import check_layers_on_shards
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import random_ids

from . import lightning_reference as reference
from .lightning_reference import glu_shapes, random_weights
from .transformers_peers import VOCAB, error, our_stepwise

SALA = {
    "model_type": "minicpm_sala", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 20,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 100.0, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8, "attn_use_rope": False,
    "lightning_use_rope": True, "qk_norm": True, "use_output_gate": True, "use_output_norm": True,
    "attn_use_output_gate": True, "lightning_nh": 4, "lightning_nkv": 4, "lightning_head_dim": 6,
    "lightning_scale": "1/sqrt(d)", "attention_bias": False, "mup_denominator": 32, "rope_scaling": None,
    "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"], "bos_token_id": 1, "eos_token_id": 2,
    "sparse_config": {"kernel_size": 32, "block_size": 64, "topk": 64, "use_nope": False, "dense_len": 16},
    "hidden_act": "silu", "max_position_embeddings": 524288, "tie_word_embeddings": False,
}  # fmt: skip
CASES = {
    "sala": SALA,
    "six heads, shared keys, another scale, rotary in all layers": {
        **SALA, "num_attention_heads": 6, "lightning_nh": 6, "lightning_nkv": 3, "lightning_scale": "1",
        "attn_use_rope": True, "rms_norm_eps": 1e-2,
    },
}  # fmt: skip


def shapes(c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of their tensors."""
    D = c["hidden_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], D)
    for i, kind in enumerate(c["mixer_types"]):
        layer, mixer = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        sparse = kind == "minicpm4"
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        H, G, K = (c[x] for x in (names if sparse else ("lightning_nh", "lightning_nkv", "lightning_head_dim")))
        yield from ((f"{mixer}.{name}_proj.weight", (n * K, D)) for name, n in (("q", H), ("k", G), ("v", G)))
        yield f"{mixer}.{'o_gate' if sparse else 'z_proj'}.weight", (H * K, D)
        yield f"{mixer}.o_proj.weight", (D, H * K)
        if not sparse:
            yield from ((f"{mixer}.{name}_norm.weight", (n,)) for name, n in (("q", K), ("k", K), ("o", H * K)))
        yield from ((f"{layer}.{name}_layernorm.weight", (D,)) for name in ("input", "post_attention"))
        yield from glu_shapes(f"{layer}.mlp", D, c["intermediate_size"])
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (c["vocab_size"], D)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference_whole_and_cached(case):
    config, ids = CASES[case], random_ids(2, 15, high=VOCAB)
    theirs = random_weights(shapes(config))
    expected = reference.minicpm_sala(ids, theirs, config)
    assert expected.std() > 0.1
    ours = load(theirs, config=config)
    with torch.no_grad():
        assert error(ours(ids).logits, expected) <= 1e-10
        assert error(our_stepwise(ours, ids, 7), expected) <= 1e-10
        assert error(our_stepwise(ours, ids, 1), expected) <= 1e-10
        rounded = load({name: x.float() for name, x in theirs.items()}, config=config)
        assert error(rounded(ids).logits, expected) <= 1e-5


def test_texts_in_which_their_attention_is_sparse_are_refused_by_every_interface(tmp_path):
    """Theirs is sparse from 16 tokens on; engine, model and transformers' interface end at 15."""
    (tmp_path / "theirs").mkdir()
    save_file(random_weights(shapes(SALA), torch.float32), tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(SALA))
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours, ids = load_model(tmp_path / "ours"), random_ids(1, 16, high=VOCAB)
    assert ours.config.eos_token_ids == (2,)
    with torch.no_grad(), pytest.raises(ValueError, match=r"a sequence has 16 tokens; .* at most 15"):
        ours(ids)
    with pytest.raises(ValueError, match="max_tokens is 16; accepted: at most 15, the max_context of layer 0"):
        Engine(ours, num_slots=1, max_tokens=16)
    with pytest.raises(ValueError, match="layer 0 has max_context 15, and no process holds a whole row"):
        check_layers_on_shards(ours.config)
    engine = Engine(ours, num_slots=4, max_tokens=15, prompt_chunk=4)
    requests = [Request(ids[0, :n].tolist(), 15 - n, Sampling(temperature=0), ignore_eos=True) for n in (5, 9, 2)]
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [len(generation.tokens) for generation in generations] == [10, 6, 13]
    face = RetNetForCausalLM.from_pretrained(tmp_path / "ours")
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert face.generate(ids[:, :5], max_new_tokens=10, **options)[0, 5:].tolist() == generations[0].tokens
    with pytest.raises(ValueError, match="at most 15"):
        face.generate(ids[:, :5], max_new_tokens=12, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; accepted: False"),
        ({"mixer_types": ["minicpm4"]}, "mixer_types has 1 entries; accepted: 4"),
        ({"mixer_types": ["mamba"] * 4}, "mixer_types is .*mamba.*; accepted: a list of minicpm4, lightning-attn"),
        ({"lightning_nh": 8}, "lightning_nh is 8, which gives the slopes two meanings; accepted: num_attention_heads"),
        ({"sparse_config": {"topk": 4}}, "sparse_config.dense_len is None; accepted: the tokens from which"),
        ({"lightning_scale": "1/d^2"}, r"lightning_scale is '1/d\^2'; accepted: 1/sqrt"),
        ({"lightning_scale": "1", "use_output_norm": False}, "lightning_scale is '1' without use_output_norm"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type is 'longrope'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_features_that_our_models_lack_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        load(random_weights(shapes(SALA), torch.float32), config={**SALA, **change})
