"""A small valid stack as text, and functions to change it."""

from retnet.stack import Fault, Stack, StackError, parse_stack

BASE = """\
schema_version: 1
model:
  name: base
  d_model: 64
  vocab_size: 257
  max_seq_len: 256
  n_heads: 4
tokenizer_contract:
  type: hf
  pretrained: bytes
embedding:
  type: learned
  positional: rope
layer_templates:
  r:
    mixer:
      type: retnet
      retnet: {chunk_size: 32}
    ffn: {type: gated_mlp}
  a:
    mixer:
      type: attention
      attention: {window: 16}
    ffn: {type: mlp}
layer_schedule:
- {template: r, repeat: 2}
- template: a
head:
  type: causal_lm
"""


def changed(*pairs: tuple[str, str], more: str = "") -> str:
    """BASE with each `old` replaced by `new` (each occurs exactly once), and `more` appended."""
    text = BASE
    for old, new in pairs:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in the base"
        text = text.replace(old, new)
    return text + more


def faults(text: str) -> list[Fault]:
    """The faults of a text; [] if it is valid."""
    try:
        parse_stack(text)
    except StackError as error:
        return list(error.faults)
    return []


def only(text: str) -> Fault:
    """The only fault of a text."""
    [fault] = faults(text)
    return fault


def stack(*pairs: tuple[str, str], more: str = "") -> Stack:
    return parse_stack(changed(*pairs, more=more))
