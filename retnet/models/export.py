"""Export for other runtimes: torch.export and ONNX graphs of a decode step and of a prompt chunk, with explicit states.

    step    ids [B, 1], position [B], state of each layer  ->  logits [B, vocab], position, states
    block   the same with ids [B, T], T from 2 to `BLOCK_TOKENS`; repeated calls read a prompt of any length

Both consist of plain operators (`backend="aten"`): the step in the recurrent form, the block in the parallel form.
Logits are those after the last token. Not exported: layers whose state grows with the tokens, and Mamba's scans.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from retnet.layers.mixers import mixer_of
from retnet.models.config import ModelConfig
from retnet.models.directory import build_empty
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.system.extras import require
from retnet.system.files import write_json

BLOCK_TOKENS = 512
MANIFEST_FILE = "export.json"


class StatefulModel(nn.Module):
    """`LanguageModel` as a function of tensors. All layers count the same tokens, so there is one position."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(logits [B, vocab], position [B], the other tensors of every layer's state) after ids [B, T]."""
        layers, given = [], iter(tensors)
        for layer, names in zip(self.model.config.layers, _state_fields(self.model), strict=True):
            fields = {name: next(given) for name in names}
            layers.append(mixer_of(layer.mixer).state.from_tensors({"position": position, **fields}))
        hidden, after = self.model.hidden(ids, ModelState(tuple(layers)), carry=True)
        assert after is not None
        return self.model.logits(hidden[:, -1]), *_flat(after)


def initial_state(model: LanguageModel, batch_size: int = 1) -> tuple[Tensor, ...]:
    """The state that a graph takes before the first token: (position, the other tensors of every layer).

    Raises ValueError for models with mixers that cannot be exported.
    """
    exportable_config(model.config, one_token=True)
    return tuple(_flat(model.init_state(batch_size)))


def exportable_config(config: ModelConfig, one_token: bool) -> ModelConfig:
    """The model in plain operators, for graphs of one token or of several.

    Raises ValueError naming a layer whose mixer cannot be exported.
    """
    layers = []
    for i, layer in enumerate(config.layers):
        mixer = layer.mixer.for_export(one_token)
        if mixer is None:
            raise ValueError(
                f"layer {i} is {type(layer.mixer).__name__}, which cannot be exported; accepted for export: mixers "
                "whose state has a constant size and whose operators are plain, as RetentionConfig"
            )
        layers.append(replace(layer, mixer=mixer))
    return replace(config, layers=tuple(layers))


def _flat(state: ModelState) -> Iterator[Tensor]:
    """The position, which is the same in all layers, and the other tensors of every layer's state."""
    yield state.position
    for layer in state:
        yield from (x for name, x in layer.tensors().items() if name != "position")


def _state_fields(model: LanguageModel) -> list[list[str]]:
    """The names of each layer's state tensors, without the position."""
    empty = model.init_state(0, device=torch.device("meta"))
    return [[name for name in layer.tensors() if name != "position"] for layer in empty]


def export_step(model: LanguageModel, batch_size: int = 1) -> ExportedProgram:
    """The graph that reads one token."""
    return _export(model, batch_size, 1)


def export_block(model: LanguageModel, batch_size: int = 1) -> ExportedProgram:
    """The graph that reads 2 to BLOCK_TOKENS tokens; the number may differ from call to call."""
    return _export(model, batch_size, BLOCK_TOKENS)


def _export(model: LanguageModel, batch_size: int, num_tokens: int) -> ExportedProgram:
    state = initial_state(model, batch_size)
    config = exportable_config(model.config, one_token=num_tokens == 1)
    function = StatefulModel(build_empty(config))
    function.model.load_state_dict(model.state_dict(), assign=True)
    function.eval()
    ids = torch.zeros(batch_size, num_tokens, dtype=torch.int64)
    with torch.no_grad():
        function(ids, *state)  # makes the layers' constants, which tracing would otherwise make from fake tensors
        tokens = {1: Dim("tokens", min=2, max=BLOCK_TOKENS)} if num_tokens > 1 else {}
        shapes = (tokens, {}, tuple({} for _ in state[1:]))
        return torch.export.export(function, (ids, *state), dynamic_shapes=shapes, strict=False)


def export_onnx(model: LanguageModel, directory: str | os.PathLike[str], batch_size: int = 1) -> None:
    """Write step.onnx, block.onnx and export.json, which names their inputs with shapes and dtypes.

    Raises MissingExtra without the extra `onnx`, ValueError for models that cannot be exported.
    """
    require("onnx", "An export to ONNX")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = initial_state(model, batch_size)
    names = ["position", *(f"{name}_{i}" for i, layer in enumerate(_state_fields(model)) for name in layer)]
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
    write_json(directory / MANIFEST_FILE, manifest)
