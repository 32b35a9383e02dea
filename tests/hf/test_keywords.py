"""Keywords of a call: understood, ignored where they mean nothing, or refused by name. None is swallowed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer, TrainingArguments

from retnet.models.hf.inputs import Tokens, document_bounds
from retnet.models.hf.tokenizer import byte_tokenizer
from tests.small_models import hf_model

from .conftest import random_ids

IDS = random_ids(2, 6)
FEATURES = [{"input_ids": random_ids(1, length, seed=50 + length)[0].tolist()} for length in (5, 1, 9, 4)]


@pytest.fixture(scope="module")
def hybrid():
    return hf_model("hybrid")


def face(model, kind):
    return model if kind == "causal" else model.base_model


COLLATORS = {
    "seq_idx": {"return_seq_idx": True, "return_position_ids": False},
    "position_ids": {},
    "positions from 2": {"position_ids_start": 2},
    "cu_seq_lens": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


@pytest.mark.parametrize("marks", COLLATORS)
@pytest.mark.parametrize("with_labels", [False, True])
def test_documents_are_kept_apart_by_every_mark_of_the_flattening_collator(model, marks, with_labels):
    features = [f | ({"labels": f["input_ids"]} if with_labels else {}) for f in FEATURES]
    batch = DataCollatorWithFlattening(**COLLATORS[marks])(features)
    packed = model(**batch)
    nats, count, begin = 0.0, 0, 0
    for feature in FEATURES:
        ids = torch.tensor([feature["input_ids"]])
        alone, end = model(ids).logits, begin + ids.shape[1]
        torch.testing.assert_close(packed.logits[0, begin:end], alone[0], rtol=1e-4, atol=1e-4)
        nats += F.cross_entropy(alone[0, :-1], ids[0, 1:], reduction="sum").item()
        count, begin = count + ids.shape[1] - 1, end
    assert packed.loss.item() == pytest.approx(nats / count, rel=1e-4)


def test_documents_are_numbered_in_each_row_on_its_own(hybrid):
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1], [7, 7, 7, 7, 0, 7]])
    packed = hybrid(IDS, seq_idx=seq_idx).logits
    for row, begin, end in ((0, 0, 2), (0, 2, 6), (1, 0, 4), (1, 4, 5), (1, 5, 6)):
        alone = hybrid(IDS[row : row + 1, begin:end]).logits[0]
        torch.testing.assert_close(packed[row, begin:end], alone, rtol=1e-4, atol=1e-4)


def test_rows_of_one_document_each_are_ordinary_rows(hybrid):
    output = hybrid(IDS, seq_idx=torch.tensor([[0] * 6, [1] * 6]))
    torch.testing.assert_close(output.logits, hybrid(IDS).logits)
    assert output.past_key_values is not None


def test_the_trainer_trains_documents_numbered_by_seq_idx(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=0.0, logging_steps=1,
    )  # fmt: skip
    losses = []
    for options in COLLATORS.values():
        collator = DataCollatorWithFlattening(**options)
        trainer = Trainer(hf_model(), arguments, train_dataset=FEATURES, data_collator=collator)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


@pytest.mark.parametrize("kind", ["causal", "base"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_masks": torch.ones(2, 6)}, "attention_masks is no keyword of .*; did you mean 'attention_mask'"),
        ({"attn_mask": torch.ones(2, 6)}, "attn_mask is no keyword of .*; did you mean 'attention_mask'"),
        ({"position_id": torch.zeros(2, 6)}, "did you mean 'position_ids'"),
        ({"cu_seqlens": torch.tensor([0, 12])}, "did you mean 'cu_seq_lens_q'"),
        ({"cu_seq_len_q": torch.tensor([0, 12])}, "did you mean 'cu_seq_lens_q'"),
        ({"seq_ids": torch.zeros(2, 6)}, "did you mean 'seq_idx'"),
        ({"output_hidden_state": True}, "did you mean 'output_hidden_states'"),
        ({"num_item_in_batch": 3}, "did you mean 'num_items_in_batch'"),
        ({"past_key_value": 1}, "did you mean 'past_key_values'"),
        ({"input_embeds": torch.zeros(2, 6, 32)}, "did you mean 'inputs_embeds'"),
        ({"use_caches": True}, "did you mean 'use_cache'"),
        ({"pixel_values": torch.zeros(1)}, "pixel_values is no keyword of"),
        ({"anything": 1}, "anything is no keyword of .*Accepted: "),
        ({"state": 1}, "state is no keyword of"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest_name(hybrid, kind, given, message):
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=message):
            face(hybrid, kind)(IDS, **given)


@pytest.mark.parametrize("kind", ["causal", "base"])
@pytest.mark.parametrize(
    "given",
    [
        {"token_type_ids": torch.zeros(2, 6, dtype=torch.long)},
        {"token_type_ids": None, "pixel_values": None, "anything": None},
        {"special_tokens_mask": torch.ones(2, 6), "offset_mapping": torch.zeros(2, 6, 2), "length": torch.tensor([6])},
        {"is_causal": True, "output_attentions": False, "output_router_logits": False},
        {"cache_position": torch.arange(6)},
        {"max_length_q": 6, "max_length_k": 6},
        {"num_items_in_batch": torch.tensor(3)},
        {"seq_idx": None, "cu_seq_lens_q": None, "position_ids": torch.arange(6)[None] + 40},
    ],
)
def test_what_means_nothing_to_the_model_changes_nothing(hybrid, kind, given):
    assert torch.equal(face(hybrid, kind)(IDS, **given)[0], face(hybrid, kind)(IDS)[0])


@pytest.mark.parametrize("kind", ["causal", "base"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}, "token_type_ids holds values other than 0"),
        ({"is_causal": False}, "is_causal is False; accepted: True"),
        ({"output_attentions": True}, "output_attentions is True; accepted: False"),
        ({"output_router_logits": True}, "output_router_logits is True; accepted: False"),
        ({"cache_position": torch.arange(1, 7)}, "cache_position is .*; accepted: 0 to 5"),
        ({"cu_seq_lens_k": torch.tensor([0, 3, 12])}, "cu_seq_lens_k differs from cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 12]), "cu_seq_lens_k": torch.tensor([0, 3, 12])},
            "cu_seq_lens_k differs from cu_seq_lens_q",
        ),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.int)}, r"seq_idx has shape \[2, 5\]; accepted.*\[2, 6\]"),
        (
            {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]] * 2), "cu_seq_lens_q": torch.tensor([0, 3, 12])},
            "cu_seq_lens_q and seq_idx mark different documents",
        ),
        (
            {
                "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]] * 2),
                "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2),
            },
            "seq_idx and position_ids mark different documents",
        ),
        (
            {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]] * 2), "attention_mask": torch.tensor([[0] + [1] * 5] * 2)},
            r"pads together with packed documents \(seq_idx\)",
        ),
        ({"position_ids": torch.tensor([[0, 1, 2, 1, 2, 3]] * 2)}, r"restart at \[0, 1\]; accepted: all documents"),
    ],
)
def test_a_value_that_would_change_the_result_is_refused(hybrid, kind, given, message):
    with pytest.raises(ValueError, match=message):
        face(hybrid, kind)(IDS, **given)


def test_numbered_documents_do_not_continue_a_cache(hybrid):
    cache = hybrid(IDS).past_key_values
    with pytest.raises(ValueError, match=r"packed documents \(seq_idx\) with a filled cache"):
        hybrid(IDS, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]] * 2), past_key_values=cache)


def test_cache_positions_continue_a_cache(hybrid):
    output = hybrid(IDS[:, :4])
    more = hybrid(IDS[:, 4:], past_key_values=output.past_key_values, cache_position=torch.arange(4, 6))
    torch.testing.assert_close(more.logits, hybrid(IDS).logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("without_logits", [False, True])
def test_arguments_of_the_loss_act_as_in_transformers(training, without_logits):
    model = hf_model().train(training)
    model.config.loss_without_logits = without_logits
    logits = model(IDS).logits
    ignored = int(IDS[0, 2])
    targets = IDS[:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=ignored)
    torch.testing.assert_close(model(IDS, labels=IDS, ignore_index=ignored).loss, expected)
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    torch.testing.assert_close(model(IDS, labels=IDS, num_items_in_batch=7).loss, summed / 7)
    other = random_ids(2, 6, seed=5)
    expected = F.cross_entropy(logits.flatten(0, 1), other.flatten())
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=other).loss, expected)
    assert model(IDS, shift_labels=other).loss is None, "as in transformers, whose Trainer then computes it"


def test_everything_that_a_tokenizer_returns_is_taken(hybrid):
    core = Tokenizer(models.WordLevel({"a": 1, "b": 2, "[PAD]": 0, "[UNK]": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", model_input_names=names)
    batch = tokenizer(
        ["a b a", "b"], return_tensors="pt", padding=True, return_token_type_ids=True, return_special_tokens_mask=True,
        return_offsets_mapping=True, return_length=True,
    )  # fmt: skip
    assert "token_type_ids" in batch
    output = hybrid(**batch)
    alone = hybrid(torch.tensor([[2]])).logits[0, 0]
    torch.testing.assert_close(output.logits[1, 0], alone, rtol=1e-4, atol=1e-4)


def test_attention_weights_asked_for_by_the_configuration_are_refused():
    model = hf_model()
    model.config._output_attentions = True  # as from_pretrained(output_attentions=True) sets it
    with pytest.raises(ValueError, match="output_attentions is True; accepted: False"):
        model(IDS)
    assert model(IDS, output_attentions=False).logits is not None


def test_generate_stops_at_a_string():
    model, tokenizer = hf_model(), byte_tokenizer()
    options = {"max_new_tokens": 40, "do_sample": False}
    free = model.generate(IDS[:1], **options)
    at = next(i for i in range(6, 46) if 33 <= free[0, i] < 127)
    stopped = model.generate(IDS[:1], stop_strings=[chr(free[0, at])], tokenizer=tokenizer, **options)
    assert torch.equal(stopped, free[:, : at + 1])


def test_a_misspelled_keyword_of_generate_is_refused(hybrid):
    with pytest.raises(ValueError, match="attention_masks"):
        hybrid.generate(IDS, attention_masks=torch.ones(2, 6), max_new_tokens=2)


def test_positions_that_start_anywhere_mark_documents():
    assert document_bounds(torch.tensor([[2, 3, 4, 2, 2, 3]])).tolist() == [0, 3, 4, 6]
    assert Tokens.of((1, 4), None, torch.tensor([[5, 6, 7, 8]])).bounds is None
    padded = Tokens.of((1, 5), torch.tensor([[1, 1, 0, 1, 1]]), torch.tensor([[0, 1, 1, 2, 3]]))
    assert padded.bounds is None, "positions of padding inside a row say nothing"
