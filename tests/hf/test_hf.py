"""The Hugging Face classes compute what the core model computes, under transformers' names and conventions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from retnet.models.directory import load_model, save_model
from retnet.models.hf import RetNetConfig, RetNetForCausalLM, document_bounds
from retnet.models.presets import preset
from tests.small_models import random_ids, small_config


@pytest.fixture(scope="module")
def config():
    return small_config(bos_token_id=3, tie_embeddings=True)


@pytest.fixture(scope="module")
def model(config):
    return RetNetForCausalLM(RetNetConfig.of(config)).eval()


def test_the_configuration_shows_the_usual_names(config):
    face = RetNetConfig.of(config)
    assert (face.vocab_size, face.hidden_size, face.num_hidden_layers) == (61, 32, 2)
    assert (face.bos_token_id, face.tie_word_embeddings) == (3, True)
    assert face.core == config


def test_logits_and_loss_are_those_of_the_core_model(model):
    ids = random_ids(2, 20)
    output = model(ids, labels=ids)
    expected = model.model(ids).logits
    assert torch.equal(output.logits, expected)
    shifted = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(shifted.item(), rel=1e-6)


def test_packed_documents_give_what_each_gives_alone(model):
    ids = random_ids(2, 15)
    positions = torch.tensor([[*range(6), *range(9)], [*range(15)]])
    packed = model(ids, position_ids=positions).logits
    for row, begin, end in ((0, 0, 6), (0, 6, 15), (1, 0, 15)):
        torch.testing.assert_close(packed[row, begin:end], model(ids[row : row + 1, begin:end]).logits[0])


def test_the_first_token_of_a_document_is_not_predicted(model):
    ids = random_ids(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    logits = model(ids, position_ids=positions).logits[0]
    targets = [t for t in range(12) if t not in (0, 5)]
    expected = F.cross_entropy(logits[[t - 1 for t in targets]], ids[0, targets])
    assert model(ids, position_ids=positions, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    ids = random_ids(1, 10)
    pads = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], 1)
    mask = torch.cat([pads, torch.ones_like(ids)] if side == "left" else [torch.ones_like(ids), pads], 1)
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], model(ids).logits[0])


def test_pads_together_with_packed_documents_are_refused(model):
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 0] = 0
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="pads together with packed documents"):
        model(random_ids(1, 8), attention_mask=mask, position_ids=positions)


def test_rows_that_do_not_begin_at_position_0_are_refused():
    with pytest.raises(ValueError, match=r"start at \[3\]"):
        document_bounds(torch.tensor([[3, 4, 0, 1]]))


def test_retnet_and_transformers_read_each_others_files(model, config, tmp_path):
    ids = random_ids(2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "face")
    core = load_model(tmp_path / "face")
    assert core.config == config
    assert torch.equal(core(ids).logits, expected)
    save_model(core, tmp_path / "core")
    again = RetNetForCausalLM.from_pretrained(tmp_path / "core").eval()
    assert torch.equal(again(ids).logits, expected)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_the_default_is_a_preset_as_transformers_expects():
    assert RetNetConfig().core == preset("retnet-125m")


def test_a_wrong_model_configuration_is_refused_with_its_path(config):
    with pytest.raises(ValueError, match=r"config\.vocab_sise: unknown key"):
        RetNetConfig(model_config=config.to_dict() | {"vocab_sise": 3})
