"""Models by name: presets of both kinds, stack files, saved directories."""

import pytest
import torch

from retnet.models.directory import save_model
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset, retnet_config
from retnet.stack import StackError
from retnet.stack.presets import preset_text
from retnet.stack.resolve import model_label, resolve_config, resolve_model, resolve_stack

from .specs import changed

MINI = "arch_advanced_retnet_mini"
# A small model of the paper's architecture, as a stack.
PAPER = """\
schema_version: 1
model: {name: paper, d_model: 64, vocab_size: 257, max_seq_len: 128, n_heads: 2, mlp_ratio: 2, dtype: float32}
tokenizer_contract: {type: hf, pretrained: bytes}
embedding: {type: learned, positional: rope}
layer_templates:
  r:
    mixer: {type: retnet}
    ffn: {type: mlp, activation: gelu}
    norm: {type: layernorm}
layer_schedule: [{template: r, repeat: 3}]
head: {type: causal_lm}
training_hints: {init: paper, seed: 0}
"""


def test_a_stack_of_retention_is_the_paper_model(tmp_path):
    path = tmp_path / "paper.yml"
    path.write_text(PAPER)
    foundation = LanguageModel(retnet_config("paper", 3, 64, 2, vocab_size=257, bos_token_id=256)).eval()
    model = resolve_model(str(path))
    ids = torch.arange(100)[None]
    assert model.state_dict().keys() == foundation.state_dict().keys()
    torch.testing.assert_close(model(ids).logits, foundation(ids).logits)


def test_a_preset_its_file_and_its_directory_are_the_same_model(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(preset_text(MINI))
    model = resolve_model(MINI)
    save_model(model, tmp_path / "saved")
    ids = torch.arange(50)[None]
    for name in (str(path), str(tmp_path / "saved")):
        assert resolve_config(name) == model.config
        assert torch.equal(resolve_model(name)(ids).logits, model(ids).logits)
        assert resolve_stack(name).text == preset_text(MINI)


def test_retnet_presets_are_not_stacks():
    assert resolve_stack("retnet-tiny") is None
    assert resolve_config("retnet-tiny") == preset("retnet-tiny")


def test_the_label_of_a_model_keeps_its_dots(tmp_path, monkeypatch):
    (tmp_path / "run-0.5").mkdir()
    monkeypatch.chdir(tmp_path / "run-0.5")
    names = ("retnet-1.3b", "out/run-0.5/", "stacks/llama-1.3b.yml", MINI, ".", "..")
    assert [model_label(name) for name in names] == [
        "retnet-1.3b", "run-0.5", "llama-1.3b", MINI, "run-0.5", tmp_path.name,
    ]  # fmt: skip


def test_an_unknown_name_is_refused_with_the_accepted_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"accepted: a preset .`retnet info` lists them"):
        resolve_model(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        resolve_config(str(tmp_path))


def test_a_faulty_file_raises_its_faults(tmp_path):
    path = tmp_path / "faulty.yml"
    path.write_text(changed(("d_model: 64", "d_model: 65")))
    with pytest.raises(StackError, match=r"model.d_model"):
        resolve_config(str(path))
