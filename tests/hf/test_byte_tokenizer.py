"""The byte tokenizer in transformers: the ends of texts are learned, pads are not, and older directories still load."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from retnet.data.tokenizer import ByteTokenizer, byte_characters
from retnet.data.tokenizer_json import tokenizer_of_model
from retnet.models.hf.tokenizer import byte_tokenizer
from tests.small_models import hf_model

TEXTS = ["ab", "a longer text: ÿ é 日本 🎉"]


@pytest.fixture
def tokenizer(tmp_path) -> PreTrainedTokenizerFast:
    byte_tokenizer().save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_the_standard_collator_keeps_the_labels_of_ends_and_ignores_those_of_pads(tokenizer):
    features = [tokenizer(text + tokenizer.eos_token) for text in TEXTS]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(features)
    for labels, mask, feature in zip(batch["labels"], batch["attention_mask"], features):
        assert labels[mask.bool()].tolist() == feature["input_ids"]
        assert labels[-1] == 256
        assert (labels[~mask.bool()] == -100).all()


def test_pads_change_no_logits(tokenizer):
    model = hf_model("hybrid")
    batch = DataCollatorWithPadding(tokenizer)([tokenizer(text) for text in TEXTS])
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    padded = model(**batch).logits[0, -ids.shape[1] :]
    torch.testing.assert_close(padded, model(ids).logits[0], rtol=1e-4, atol=1e-4)


def test_the_pad_is_inside_the_vocabulary_and_no_byte_of_any_text(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (255, 256, 256)
    assert len(tokenizer) == 257
    text = "".join(chr(c) for c in [*range(0x1000), 0xFFFD, 0xFFFF, 0x10FFFF])
    assert tokenizer(text)["input_ids"] == ByteTokenizer().encode(text, start=True)
    assert 255 not in tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def with_the_pad_of_older_versions() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(vocab={c: b for b, c in byte_characters().items()}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|document|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|document|>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.mark.parametrize("make", [byte_tokenizer, with_the_pad_of_older_versions])
def test_a_directory_with_either_is_read_as_bytes(tmp_path, make):
    make().save_pretrained(tmp_path)
    assert isinstance(tokenizer_of_model("a model", tmp_path, 257), ByteTokenizer)
