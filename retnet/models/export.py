"""The model for other runtimes: torch.export and ONNX graphs of one step and of one block, states in and states out.

    step    ids [B, 1], position [B], memory of each layer  ->  logits [B, vocab], position, memories
    block   ids [B, T], T from 2 to `BLOCK_TOKENS`, the same otherwise; called again and again it reads any prompt

Both are plain operators (`backend="aten"`): the step in the recurrent form, the block in the parallel form. Logits are
those after the last token. Left out: layers whose state grows with the tokens, and Mamba's scans.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from retnet.layers.retention import RetentionConfig
from retnet.layers.state import RetentionState
from retnet.models.directory import build_empty
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops.dtypes import wide_dtype

BLOCK_TOKENS = 512
MANIFEST_FILE = "export.json"


class StatefulModel(nn.Module):
    """`LanguageModel` as a function of tensors alone. All layers count the same tokens, so there is one position."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position: Tensor, *memories: Tensor) -> tuple[Tensor, ...]:
        """(logits [B, vocab], position [B], memories [B, H, K, V] of every layer) after ids [B, T]."""
        state = ModelState(tuple(RetentionState(position, memory=memory) for memory in memories))
        hidden, after = self.model.hidden(ids, state, carry=True)
        assert after is not None
        return self.model.logits(hidden[:, -1]), after.position, *(layer.memory for layer in _retention_states(after))


def initial_state(model: LanguageModel, batch_size: int = 1) -> tuple[Tensor, ...]:
    """(position, memories): what a graph takes before the first token. Raises ValueError for other mixers."""
    mixers = [layer.mixer for layer in model.config.layers]
    for i, mixer in enumerate(mixers):
        if not isinstance(mixer, RetentionConfig):
            raise ValueError(
                f"layer {i} is {type(mixer).__name__}; accepted for export: RetentionConfig in every layer"
            )
    wide = wide_dtype(model.config.torch_dtype)
    shapes = [
        (batch_size, m.num_heads, m.head_key_dim, m.head_value_dim) for m in mixers if isinstance(m, RetentionConfig)
    ]
    return torch.zeros(batch_size, dtype=torch.int64), *(torch.zeros(shape, dtype=wide) for shape in shapes)


def export_step(model: LanguageModel, batch_size: int = 1) -> ExportedProgram:
    """The graph that reads one token."""
    return _export(model, batch_size, 1)


def export_block(model: LanguageModel, batch_size: int = 1) -> ExportedProgram:
    """The graph that reads 2 to BLOCK_TOKENS tokens; how many is free at every call."""
    return _export(model, batch_size, BLOCK_TOKENS)


def _export(model: LanguageModel, batch_size: int, num_tokens: int) -> ExportedProgram:
    state = initial_state(model, batch_size)
    # The form is fixed: "auto" would make a graph for as many tokens as the example has.
    mode = "recurrent" if num_tokens == 1 else "parallel"
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, mode=mode))
        for layer in model.config.layers
        if isinstance(layer.mixer, RetentionConfig)
    )
    function = StatefulModel(build_empty(replace(model.config, layers=layers)))
    function.model.load_state_dict(model.state_dict(), assign=True)
    function.eval()
    ids = torch.zeros(batch_size, num_tokens, dtype=torch.int64)
    with torch.no_grad():
        function(ids, *state)  # makes the layers' constants, which tracing would otherwise make of fake tensors
        tokens = {1: Dim("tokens", min=2, max=BLOCK_TOKENS)} if num_tokens > 1 else {}
        shapes = (tokens, {}, tuple({} for _ in state[1:]))
        return torch.export.export(function, (ids, *state), dynamic_shapes=shapes, strict=False)


def export_onnx(model: LanguageModel, directory: str | os.PathLike[str], batch_size: int = 1) -> None:
    """Write step.onnx, block.onnx and export.json, which names their inputs with shapes and dtypes.

    Needs the extra `onnx`. Raises ValueError for models that cannot be exported.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = initial_state(model, batch_size)
    names = ["position", *(f"memory_{i}" for i in range(len(state) - 1))]
    for name, program in (("step", export_step(model, batch_size)), ("block", export_block(model, batch_size))):
        torch.onnx.export(
            program,
            (),
            str(directory / f"{name}.onnx"),
            dynamo=True,
            input_names=["ids", *names],
            output_names=["logits", *(f"next_{n}" for n in names)],
            external_data=True,
            verbose=False,
        )
    manifest = {
        "vocab_size": model.config.vocab_size,
        "bos_token_id": model.config.bos_token_id,
        "batch_size": batch_size,
        "block_tokens": BLOCK_TOKENS,
        "state": [
            {"name": name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
            for name, x in zip(names, state)
        ],
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def _retention_states(state: ModelState) -> Iterator[RetentionState]:
    """The layers' states, which `initial_state` has seen to be of retention."""
    return (layer for layer in state if isinstance(layer, RetentionState))
