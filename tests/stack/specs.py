"""A small valid stack as text, and functions to change it."""

import torch

from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.stack import Fault, Stack, StackError, parse_stack

FLOAT32 = "n_heads: 4", "n_heads: 4\n  dtype: float32"  # a change of BASE
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


def assert_decodes_as_it_reads(config: ModelConfig) -> LanguageModel:
    """Piece by piece, a stack's model gives the logits of one forward. Returns the model, in float64."""
    model, ids = LanguageModel(config).double().eval(), torch.arange(9)[None]
    state, logits = None, []
    with torch.no_grad():
        for piece in ids.split([5, 1, 3], 1):
            output = model(piece, state, carry=True)
            state = output.state
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-10, atol=1e-10)
    return model


def legend_of(found: Stack, config: ModelConfig) -> set[str]:
    """The labels in the legend of a stack's picture."""
    from retnet.stack.picture import draw_stack  # needs matplotlib

    return {text.get_text() for legend in draw_stack(found, config).legends for text in legend.get_texts()}
