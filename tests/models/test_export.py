"""Exported graphs compute what the model computes, in torch and in onnxruntime."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.export import ExportedProgram

from retnet.models import export
from retnet.models.export import BLOCK_TOKENS, export_block, export_onnx, export_step, initial_state
from retnet.models.lm import LanguageModel
from tests.small_models import LIGHTNING, PAPER, WINDOW, random_ids, small_model

LENGTHS = (200, 1, 3, 1, 2, 512)  # tokens of one call after another


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Fixed and gated decay, with and without rotary, convolution and norms of q and k; lightning attention."""
    options = (
        {"decay_norm": True, "conv_width": 4},
        {"decay": "gated", "rotary": "none", "gate": "sigmoid", "qk_norm": "rms"},
    )
    layers = [replace(PAPER, mixer=replace(PAPER.mixer, **option)) for option in options]
    return small_model([*layers, LIGHTNING], logit_scale=0.5)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return random_ids(1, sum(LENGTHS))


def expected_logits(model, ids):
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    with torch.no_grad():
        return model(ids).logits[0, ends]


@pytest.fixture(scope="module")
def logits_before(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def programs(model, logits_before) -> tuple[ExportedProgram, ExportedProgram]:
    """The model's step and block, exported after `logits_before`."""
    return export_step(model), export_block(model)


def test_exported_programs_read_a_text_in_any_pieces(model, ids, programs):
    step, block = (program.module() for program in programs)
    state, logits = initial_state(model), []
    for piece in ids.split(LENGTHS, 1):
        run = step if piece.shape[1] == 1 else block
        row, *state = run(piece, *state)
        logits.append(row[0])
    torch.testing.assert_close(torch.stack(logits), expected_logits(model, ids), rtol=1e-4, atol=1e-4)
    assert state[0].tolist() == [sum(LENGTHS)]


def test_the_graphs_hold_plain_operators_alone(programs):
    for program in programs:
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert targets
        assert not [target for target in targets if "retnet" in target]


def test_exporting_leaves_the_model_as_it_was(model, ids, logits_before, programs):
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits_before)


@pytest.mark.slow
def test_onnxruntime_gives_equal_logits(model, ids, programs, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name, program in zip(("export_step", "export_block"), programs, strict=True):  # as above, traced once
        monkeypatch.setattr(export, name, lambda model, batch_size, program=program: program)
    export_onnx(model, tmp_path)
    manifest = json.loads((tmp_path / "export.json").read_text())
    assert (manifest["vocab_size"], manifest["block_tokens"]) == (61, BLOCK_TOKENS)
    step, block = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("step", "block"))
    names = [entry["name"] for entry in manifest["state"]]
    state = {name: x.numpy() for name, x in zip(names, initial_state(model))}
    logits = []
    for piece in ids.split(LENGTHS, 1):
        session = step if piece.shape[1] == 1 else block
        row, *after = session.run(None, {"ids": piece.numpy(), **state})
        state = dict(zip(names, after))
        logits.append(torch.from_numpy(row[0]))
    torch.testing.assert_close(torch.stack(logits), expected_logits(model, ids), rtol=1e-4, atol=1e-4)
    assert state["position"].tolist() == [sum(LENGTHS)]


def test_a_layer_that_cannot_be_exported_is_named():
    model = small_model([PAPER, WINDOW])
    with pytest.raises(ValueError, match="layer 1 is AttentionConfig, which cannot be exported"):
        export_step(model)
