"""Students from stack files: the schedule and the keys that a file sets, on the teacher's sizes."""

import pytest

from retnet.layers.retention import RetentionConfig
from retnet.stack.load import parse_stack
from retnet.train.distil.from_stack import all_retention, retention_everywhere, stack_mixers
from tests.train.distil.models import teacher

STACK = """
schema_version: 1
model:
  {name: hybrid, d_model: 32, vocab_size: 257, max_seq_len: 64, n_heads: 4, n_kv_heads: 2, mlp_ratio: 1, dtype: float32}
tokenizer_contract: {type: hf, pretrained: byte}
embedding: {type: learned, positional: rope}
head: {type: causal_lm}
layer_templates:
  kept: {mixer: {type: attention}, ffn: {type: gated_mlp}}
  ours:
    mixer: {type: retnet, retnet: {vendor.retnet.conv_width: 3, vendor.retnet.decay: experiment}}
    ffn: {type: gated_mlp}
layer_schedule: [{template: ours}, {template: kept}]
"""


def mixers(text=STACK, num_layers=2, **attention):
    return stack_mixers(teacher(num_layers, **attention).config, parse_stack(text, "hybrid.yml"))


def test_keys_that_a_file_sets_are_taken_and_the_rest_is_the_teachers_or_the_usual():
    first, second = mixers()
    assert second is None
    assert isinstance(first, RetentionConfig)
    assert (first.conv_width, first.decay, first.gated_start) == (3, "experiment", None)
    assert (first.gate, first.head_norm_affine, first.num_kv_heads, first.rotary) == ("sigmoid", "per_head", 2, "half")


def test_attention_that_is_to_be_chosen_becomes_the_first_retention_of_the_file():
    taught, stack = teacher(2).config, parse_stack(STACK)
    first, second = retention_everywhere(taught, stack_mixers(taught, stack), stack)
    assert first == second
    assert first.conv_width == 3
    assert [mixer.conv_width for mixer in all_retention(taught)] == [4, 4]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("d_model: 32", "d_model: 64", "hybrid.yml is not of the teacher's sizes: d_model 64, the teacher's 32"),
        ("n_heads: 4, n_kv_heads: 2", "n_heads: 2", "n_heads 2, the teacher's 4"),
        ("n_kv_heads: 2", "n_kv_heads: 4", "n_kv_heads 4, the teacher's 2"),
        ("{template: ours}", "{template: ours, repeat: 3}", "the schedule's layers 4, the teacher's 2"),
        ("{type: attention}", "{type: mamba}", "hybrid.yml, layer 1: its mixer is mamba; accepted: retnet, attention"),
        ("{type: attention}", "{type: attention, attention: {window: 8}}", "layer 1: window of attention is 8"),
        ("decay: experiment", "key_dim: 64", "layer 0: key_dim is 64 and the teacher's is 32"),
        ("decay: experiment", "rotary: interleaved", "layer 0: rotary is 'interleaved' and the teacher's is 'half'"),
        ("{template: ours}", "{template: kept}", "hybrid.yml has no retnet layer"),
        ("{type: gated_mlp}", "{type: gated_mlp}, residual: {type: hyper_connection, hyper: {expand: 2}}",
         "layer 1: its residual is hyper_connection; accepted: the teacher's"),
    ],
)  # fmt: skip
def test_what_is_not_the_teachers_is_refused(old, new, message):
    assert old in STACK
    with pytest.raises(ValueError, match=message):
        mixers(STACK.replace(old, new, 1))
